"""The picture of CONTRIBUTING.md, drawn from the imports.

    python -m tools.picture            # write it
    python -m tools.picture --check    # exit code 1 where it is out of date

It shows the one way for data, and the parts of the package with an arrow from each to those that it imports. An import
that others imply is left out, and so are the parts that all may use and that use none.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "vllm_toptheta"
MODULES = sorted(PACKAGE.rglob("*.py"))
PAGE = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- drawn by python -m tools.picture; do not edit -->", "<!-- end of the picture -->"

# what data becomes on its way, and the module that makes it. Each reaches the one before by imports, or is reached by
# it: where neither is so, there is no such way any more, and nothing is drawn.
WAY = {
    "text": "calibration.data",
    "evidence": "evaluation.tune",
    "store": "store",
    "thresholds of a model": "selection",
    "plan of a layer": "backend.plan",
    "kernels": "kernels.contract",
    "counters": "backend.counters",
    "a worker's answer": "backend.hooks.worker_stats",
    "statistics": "telemetry.stats",
}


def imports(tree: ast.AST, *, top_level: bool = False) -> Iterator[str]:
    """Full names of what a module imports; `from a import b` counts as a and as a.b."""
    for node in tree.body if top_level and isinstance(tree, ast.Module) else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def name_of(module: Path) -> str:
    """The dotted name of a file."""
    return ".".join((PACKAGE.name, *module.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def part(module: Path) -> str:
    """The part of the package that a file belongs to."""
    return module.relative_to(PACKAGE).parts[0].removesuffix(".py")


def files_imported() -> dict[str, set[str]]:
    """The modules of the package, and which others each imports, also inside functions and for types only."""
    names = {name_of(module) for module in MODULES}
    graph = {}
    for module in MODULES:
        found = set(imports(ast.parse(module.read_text(encoding="utf-8")))) & names
        # `from a import b` is an import of a only where b is no module
        graph[name_of(module)] = {name for name in found if not any(is_within(other, name) for other in found - {name})}
    return graph


def parts_imported() -> dict[str, set[str]]:
    """The parts of the package, and which others each imports."""
    graph: dict[str, set[str]] = {part(module): set() for module in MODULES if module.parent != PACKAGE}
    graph |= {part(module): set() for module in MODULES if part(module) != "__init__"}
    for name, used in files_imported().items():
        own = name.split(".")[1] if "." in name else None
        if own is not None:
            graph[own] |= {other.split(".")[1] for other in used} - {own}
    return graph


def reached(graph: Mapping[str, set[str]], start: str) -> set[str]:
    """All that a node leads to."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        new = graph[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def gaps(way: Mapping[str, str] = WAY) -> list[tuple[str, str]]:
    """The steps of the way whose modules know nothing of each other."""
    graph = files_imported()
    names = [f"{PACKAGE.name}.{module}" for module in way.values()]
    return [
        (one, other)
        for one, other in pairwise(names)
        if other not in reached(graph, one) and one not in reached(graph, other)
    ]


def picture() -> str:
    """What stands between the markers, in the language of Mermaid, which GitHub draws."""
    graph = parts_imported()
    ground = {name for name, used in graph.items() if not used and sum(name in other for other in graph.values()) > 1}
    shown = {name: used - ground for name, used in graph.items() if name not in ground}
    lines = ["```mermaid", "flowchart LR"]
    lines += [f'    {number}(["{what}<br>{module}"])' for number, (what, module) in enumerate(WAY.items())]
    lines += ["    " + " ==> ".join(map(str, range(len(WAY)))), "```", "", "```mermaid", "flowchart TB"]
    for name, used in sorted(shown.items()):
        implied = set().union(*(reached(shown, other) for other in used))
        lines += [f"    {name} --> {other}" for other in sorted(used - implied)]
    lines += ["```", "", f"Left out, because all may use them: {', '.join(f'`{name}`' for name in sorted(ground))}."]
    return "\n".join(lines)


def drawn(page: str) -> str:
    """The page with the picture as it is now."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{PAGE.name} lacks the line {(END if begin else BEGIN)!r}")
    return f"{before}{BEGIN}\n\n{picture()}\n\n{END}{after}"


def main() -> int:
    for one, other in gaps():
        raise SystemExit(f"{one} and {other} know nothing of each other: mend WAY in tools/picture.py")
    page = PAGE.read_text(encoding="utf-8")
    if page == drawn(page):
        return 0
    if "--check" in sys.argv[1:]:
        sys.stderr.write("out of date, run: python -m tools.picture\n")
        return 1
    PAGE.write_text(drawn(page), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
