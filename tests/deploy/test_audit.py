"""`make audit`: a database out of reach is never mistaken for a clean result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.image import ROOT

CLEAN = {"name": "first", "version": "1", "vulns": []}
VULNERABLE = {"name": "second", "version": "2", "vulns": [{"id": "PYSEC-2026-1", "fix_versions": ["2.1"]}]}
NOT_FOUND = {"name": "third", "skip_reason": "Dependency not found on PyPI and could not be audited"}


def run_audit(folder: Path, answer: str | list[dict[str, Any]], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script with a pip-audit that prints `answer`."""
    program = folder / "pip-audit"
    text = answer if isinstance(answer, str) else json.dumps({"dependencies": answer})
    program.write_text(f"#!{sys.executable}\nprint({text!r})\n")
    program.chmod(0o755)
    command = [sys.executable, ROOT / ".ci/audit.py", *arguments]
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("answer", "exit_code", "words"),
    [
        ([CLEAN], 0, "no known vulnerability"),
        ([CLEAN, VULNERABLE], 1, "second 2: PYSEC-2026-1, fixed in 2.1"),
        ([NOT_FOUND], 3, "NOT AUDITED"),
        ("", 3, "NOT AUDITED"),
    ],
)
def test_exit_codes(tmp_path: Path, answer: str | list[dict[str, Any]], exit_code: int, words: str) -> None:
    done = run_audit(tmp_path, answer)
    assert (done.returncode, done.stderr) == (exit_code, "")
    assert words in done.stdout


def test_only_a_database_out_of_reach_can_be_allowed(tmp_path: Path) -> None:
    assert run_audit(tmp_path, [NOT_FOUND], "--allow-offline").returncode == 0
    assert run_audit(tmp_path, [VULNERABLE], "--allow-offline").returncode == 1
