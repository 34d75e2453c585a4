"""Look up what the CPU image installs in the Python Packaging Advisory Database, by pip-audit.

Exit code 0: no known vulnerability. 1: at least one. 3: nobody could be asked, because the database cannot be reached;
--allow-offline makes that 0.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CONSTRAINTS = Path(__file__).parents[1] / "deploy/docker/constraints-cpu.txt"


def audit(pins: list[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """Ask for the advisories of packages.

    Args:
        pins: Lines `name==version`.

    Returns:
        The packages with advisories, as pip-audit reports them, and the names that it could not look up.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as requirements:
        requirements.write("\n".join(pins))
        requirements.flush()
        flags = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json"]
        done = subprocess.run(
            ["pip-audit", "--requirement", requirements.name, *flags], capture_output=True, text=True, timeout=600
        )
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except ValueError:  # a connection that fails ends pip-audit before it reports
        return [], [pin.partition("==")[0] for pin in pins]
    # what is not found is no error of pip-audit's, yet it was not audited
    return [package for package in packages if package.get("vulns")], [
        package["name"] for package in packages if "skip_reason" in package
    ]


def main() -> int:
    pins = [line for line in CONSTRAINTS.read_text().splitlines() if line and not line.startswith("#")]
    # one package first: without a database there is no need to ask for the others
    _, unknown = audit(pins[:1])
    vulnerable, unknown = ([], ["all"]) if unknown else audit(pins)
    for package in vulnerable:
        for advisory in package["vulns"]:
            fixed = ", ".join(advisory["fix_versions"]) or "no version yet"
            sys.stdout.write(f"{package['name']} {package['version']}: {advisory['id']}, fixed in {fixed}\n")
    if vulnerable:
        return 1
    if unknown == ["all"]:
        sys.stdout.write("NOT AUDITED: the advisory database cannot be reached from here\n")
        return 0 if "--allow-offline" in sys.argv[1:] else 3
    sys.stdout.write(f"no known vulnerability in {len(pins) - len(unknown)} packages\n")
    if unknown:
        sys.stdout.write(f"not on the package index, hence not audited: {', '.join(unknown)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
