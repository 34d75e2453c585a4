"""What keeps the rooms of the package small: few parameters, short files, names that say which of two is meant."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import typer

from tools.picture import MODULES, PACKAGE
from vllm_toptheta.cli.main import app

MAX_PARAMETERS = 8
MAX_LINES = 400
RECORD_BASES = {"NamedTuple", "BaseModel"}
# parameters of a kernel are what the compiler specialises on, and arrays that Numba takes one by one
COMPILED = {"jit", "njit", "intrinsic", "_compiled"}
# functions with more parameters -> why
LONG = {
    "backend/cpu.py __init__": "vLLM's signature",
    "backend/gpu.py forward": "vLLM's signature",
    "backend/drafts/v1_runner.py propose": "vLLM's signature",
    "backend/drafts/v2_runner.py propose": "vLLM's signature",
}
# rooms whose functions may have more: the truth names each of the paper's modes, and is read beside the paper
LONG_ROOMS = ("reference/",)
# files of the same name in several rooms -> what tells them apart, beside the room
SAME_NAME: dict[str, str] = {
    "candidates.py": "keys that shadow keys ask for: where they are calibrated, evaluated, and on GPUs",
    "model.py": "calibration loads and runs a model, support says which are served",
    "model_config.py": "store reads the fingerprint off config.json, server all that vLLM will read of it",
    "pages.py": "kernels say what lies in a page, backend asks vLLM for pages with room for it",
    "quality.py": "store: evidence of it; report: what of it is drawn; cli: its table; benchmarks: that of the kernel",
    "record.py": "benchmarks record where survivors are, report keeps the record of a page",
    "relative.py": "reference has the threshold, calibration the attention by it",
    "report.py": "results of that room, and in cli the command",
    "run.py": "the order of things in that room",
    "scores.py": "of the reference, and of the kernels for CPUs",
    "scratch.py": "of the kernels of each device",
    "shadow.py": "shadow keys in that room",
    "survivors.py": "kernels attend to them, the report measures them",
    "subject.py": "evaluation: a model in transformers; engine: the same in vLLM",
    "tails.py": "of the kernels of each device",
    "thresholds.py": "thresholds in that room, and in cli the command",
    "tiers.py": "copies of keys and values in that room",
    "tune.py": "evaluation finds a floor, benchmarks launch parameters; in cli the command",
    "values.py": "of the kernels of each device",
}


def commands(group: typer.Typer) -> Iterator[str]:
    """The functions that typer makes commands of: a flag of each parameter."""
    for command in group.registered_commands:
        assert command.callback is not None
        yield command.callback.__name__
    for inner in group.registered_groups:
        assert inner.typer_instance is not None
        yield from commands(inner.typer_instance)


def trees() -> dict[str, ast.Module]:
    return {str(module.relative_to(PACKAGE)): ast.parse(module.read_text(encoding="utf-8")) for module in MODULES}


def identifiers(node: ast.AST | None) -> set[str]:
    """Names in an expression, the last part of dotted ones, also in quotes."""
    if node is None:
        return set()
    found = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
    return found | {inner.attr for inner in ast.walk(node) if isinstance(inner, ast.Attribute)}


def records(modules: dict[str, ast.Module]) -> set[str]:
    """The classes of the package that are records: their fields are named where they are made."""
    classes = [node for tree in modules.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    found = {node.name for node in classes if any("dataclass" in identifiers(mark) for mark in node.decorator_list)}
    found |= RECORD_BASES
    while more := {node.name for node in classes if any(identifiers(base) & found for base in node.bases)} - found:
        found |= more
    return found


def long_functions(modules: dict[str, ast.Module]) -> set[str]:
    """The functions with more parameters than `MAX_PARAMETERS` that are no records."""
    found, known = set(), records(modules)
    for name, tree in modules.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if any(identifiers(mark) & COMPILED for mark in node.decorator_list):
                continue
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            plain = [
                one.arg
                for one in arguments
                if one.arg not in ("self", "cls") and not identifiers(one.annotation) & known
            ]
            if len(plain) > MAX_PARAMETERS:
                found.add(f"{name} {node.name}")
    return found


def test_functions_have_few_parameters() -> None:
    of_commands = set(commands(app))
    found = long_functions(trees())
    ours = {
        name
        for name in found
        if not name.startswith(LONG_ROOMS) and not (name.startswith("cli/") and name.split()[1] in of_commands)
    }
    assert sorted(ours) == sorted(LONG)


def test_parameters_are_counted_without_records() -> None:
    source = "class R(NamedTuple): ...\nclass S(R): ...\n@triton.jit\ndef kernel(a, b, c, d, e, f, g, h, i): ...\n"
    source += (
        "def many(a, b, c, d, e, f, g, h, *, i): ...\ndef few(self, a, b, c, d, e, f, g, h, r: R, s: 'S | None'): ...\n"
    )
    assert long_functions({"a.py": ast.parse(source.replace("'", ""))}) == {"a.py many"}


def test_files_are_short() -> None:
    sources = [file for file in PACKAGE.rglob("*") if file.suffix in {".py", ".cu", ".cuh", ".js", ".css", ".html"}]
    long = {str(file.relative_to(PACKAGE)) for file in sources if len(file.read_text().splitlines()) > MAX_LINES}
    # all that Numba compiles, because its cache on disk looks at no other file
    assert long == {"kernels/cpu/numba_decode.py"}


def test_two_files_of_one_name_are_told_apart() -> None:
    rooms: dict[str, list[Path]] = defaultdict(list)
    for module in MODULES:
        rooms[module.name].append(module)
    assert {name for name, files in rooms.items() if len(files) > 1} - {"__init__.py"} == set(SAME_NAME)
