"""The import law: what each part of the package may know of, read off the syntax trees."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

import vllm_toptheta
from tools.picture import files_imported, imports, is_within, part

PACKAGE = Path(vllm_toptheta.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# parts of the package in the order in which they stand on each other -> the parts that each may import
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "limits": set(),
    "cache_folder": set(),
    "whole_file": set(),
    "rotation": set(),
    "reference": {"limits", "rotation"},
    "settings": {"errors", "limits"},
    "store": {"errors", "limits"},
    "support": {"errors", "limits"},
    "selection": {"errors", "limits", "settings", "store"},
    "kernels": {"limits", "rotation", "cache_folder"},
    "telemetry": {"limits", "settings"},
    "backend": {"errors", "limits", "settings", "store", "support", "selection", "kernels", "telemetry"},
    "server": {"errors", "settings", "store", "support", "selection"},
    "calibration": {"errors", "limits", "whole_file", "reference", "store"},
    "evaluation": {"errors", "limits", "whole_file", "reference", "store", "calibration"},
    "report": {"errors", "limits", "reference", "store", "calibration", "evaluation"},
    "engine": {"errors", "store", "calibration", "evaluation"},
    "soak": {"errors"},
    "benchmarks": {
        *("errors", "limits", "whole_file", "reference", "store", "selection", "kernels", "telemetry"),
        *("calibration", "evaluation"),
    },
    "gguf_model": {"errors"},
    "model_folder": {"errors"},
    "demo_model": {"errors", "cache_folder", "gguf_model", "model_folder"},
    "cli": {
        *("errors", "limits", "store", "kernels", "server", "calibration", "evaluation", "report", "engine"),
        *("soak", "benchmarks", "demo_model", "whole_file"),
    },
}
# what is heavy, or runs in few places only -> the parts that may import it, at any depth of their code
USERS = {
    "triton": {"kernels", "benchmarks"},
    "vllm": {"backend", "telemetry", "engine", "benchmarks"},
    "transformers": {"calibration", "evaluation", "gguf_model"},
    "torch": ALLOWED.keys() - {"errors", "limits", "settings", "store", "support", "selection", "server", "soak"},
    "numpy": ALLOWED.keys() - {"errors", "limits", "settings", "support", "server"},
    "pydantic": ALLOWED.keys() - {"errors", "limits", "support"},
}

# what benchmarks may use of vLLM: its public interface, and the kernels that ours are compared with
PEERS = {
    "vllm",
    "vllm._C",
    "vllm._custom_ops",
    "vllm.EngineArgs",
    "vllm.LLM",
    "vllm.SamplingParams",
    "vllm.vllm_flash_attn",
    "vllm.vllm_flash_attn.flash_attn_varlen_func",
    "vllm.vllm_flash_attn.get_scheduler_metadata",
    "vllm.v1.attention.ops.triton_unified_attention",
    "vllm.v1.attention.ops.triton_unified_attention.unified_attention",
}


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Sets of more than one module that all import each other, directly or through others."""
    reached = {}
    for start in graph:
        waiting, reached[start] = [start], set()
        while waiting:
            new = graph[waiting.pop()] - reached[start]
            reached[start] |= new
            waiting += new
    found: list[set[str]] = []
    for start in graph:
        circle = {name for name in reached[start] if start in reached[name]}
        if len(circle) > 1 and circle not in found:
            found.append(circle)
    return found


def test_every_part_has_a_law_and_stands_on_those_before_it() -> None:
    assert {part(module) for module in MODULES} - {"__init__"} == ALLOWED.keys()
    order = list(ALLOWED)
    for name, allowed in ALLOWED.items():
        assert allowed <= set(order[: order.index(name)]), name


def test_each_part_imports_what_it_is_allowed_and_the_law_allows_no_more() -> None:
    needed: dict[str, set[str]] = {name: set() for name in ALLOWED}
    for module in MODULES:
        names = imports(ast.parse(module.read_text()))
        ours = {name.split(".")[1] for name in names if name.startswith(f"{PACKAGE.name}.")}
        needed.setdefault(part(module), set()).update(ours & ALLOWED.keys() - {part(module)})
    assert needed.pop("__init__") == set()
    assert needed == ALLOWED


@pytest.mark.parametrize("name", ALLOWED)
def test_every_part_says_what_it_is_for_and_what_it_may_import(name: str) -> None:
    home = PACKAGE / name / "__init__.py" if (PACKAGE / name).is_dir() else PACKAGE / f"{name}.py"
    purpose, _, law = (ast.get_docstring(ast.parse(home.read_text())) or "").rpartition("\n\n")
    assert len(purpose.split()) > 3
    assert re.match(r"May import (nothing of the package|`[a-z_]+`(,\s`[a-z_]+`)*)\.$", law)
    assert set(re.findall(r"`(\w+)`", law)) == ALLOWED[name]


@pytest.mark.parametrize("room", sorted(PACKAGE.rglob("__init__.py")), ids=lambda room: room.parent.name)
def test_every_room_says_what_it_is_for(room: Path) -> None:
    assert len((ast.get_docstring(ast.parse(room.read_text())) or "").split()) > 3


def test_triton_stays_with_the_kernels_for_gpus() -> None:
    for module in (PACKAGE / "kernels").rglob("*.py"):
        names = set(imports(ast.parse(module.read_text())))
        assert module.parent.name == "gpu" or not any(is_within(name, "triton") for name in names), module


def test_no_circles() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d", "a"}}) == [{"b", "c"}]
    assert circles(files_imported()) == []


@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.relative_to(PACKAGE)))
def test_imports(module: Path) -> None:
    tree = ast.parse(module.read_text())
    names = set(imports(tree))
    users = {package for name in names for package in USERS if is_within(name, package)}
    assert not {package for package in users if part(module) not in USERS[package]}
    assert not any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(tree)), "absolute imports only"
    if part(module) == "benchmarks":
        assert {name for name in names if is_within(name, "vllm")} <= PEERS


@pytest.mark.parametrize("module", sorted((PACKAGE / "cli").glob("*.py")), ids=lambda module: module.name)
def test_the_command_imports_lazily(module: Path) -> None:
    allowed = {"__future__", "os", "sys", "pathlib", "typing", "typer", "vllm_toptheta.errors", "vllm_toptheta.cli"}
    allowed |= {"collections", "contextlib", "enum", "signal", "types"}
    names = {name for name in imports(ast.parse(module.read_text()), top_level=True)}
    assert {name for name in names if not any(is_within(name, other) for other in allowed)} == set()


def test_nothing_large_is_kept() -> None:
    """Clones are made by every user; a download that was added by mistake stays in all of them."""
    root = PACKAGE.parent
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True).stdout
    large = [name for name in listed.split("\0") if name and (root / name).stat().st_size > 2 << 20]
    assert not large


def test_shipped_thresholds_are_valid() -> None:
    from vllm_toptheta import store

    folders = store.list_stores(thresholds=PACKAGE.parent / "thresholds")
    assert [folder.name for folder in folders] == [
        "HuggingFaceTB--SmolLM2-135M-Instruct",
        "Qwen--Qwen2.5-Coder-0.5B-Instruct",
    ]
    for folder in folders:
        loaded = store.load(folder)
        assert store.folder_name(loaded.manifest.model.id) == folder.name
