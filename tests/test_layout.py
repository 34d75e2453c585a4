"""The import law: what each part of the package may know of, read off the syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import vllm_toptheta

PACKAGE = Path(vllm_toptheta.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# part of the package -> what it must not import, at any depth of its code
FORBIDDEN = {
    "errors": {"torch", "transformers", "vllm", "triton", "numpy", "pydantic"},
    "limits": {"torch", "transformers", "vllm", "triton", "numpy", "pydantic"},
    "settings": {"torch", "transformers", "vllm", "triton"},
    "store": {"torch", "transformers", "vllm", "triton"},
    "reference": {"vllm", "triton", "transformers", "vllm_toptheta.kernels", "vllm_toptheta.backend"},
    "kernels": {"vllm", "transformers", "vllm_toptheta.reference", "vllm_toptheta.backend", "vllm_toptheta.store"},
    "calibration": {"vllm", "triton", "vllm_toptheta.backend", "vllm_toptheta.kernels"},
    "evaluation": {"vllm", "triton", "vllm_toptheta.backend", "vllm_toptheta.kernels"},
    "interchange": {"vllm", "triton", "vllm_toptheta.backend", "vllm_toptheta.kernels", "vllm_toptheta.evaluation"},
    "report": {"vllm", "triton", "vllm_toptheta.backend", "vllm_toptheta.kernels", "vllm_toptheta.evaluation"},
    "telemetry": {"triton", "transformers", "vllm_toptheta.backend", "vllm_toptheta.kernels"},
    "backend": {"transformers", "vllm_toptheta.reference", "vllm_toptheta.calibration", "vllm_toptheta.evaluation"},
    "benchmarks": {"vllm_toptheta.backend"},
    "cli": {"vllm", "triton"},
    "server": {"torch", "transformers", "vllm", "triton", "vllm_toptheta.backend", "vllm_toptheta.telemetry"},
    "soak": {"torch", "transformers", "vllm", "triton", "vllm_toptheta.backend", "vllm_toptheta.telemetry"},
    "selection": {"torch", "transformers", "vllm", "triton"},
    "demo_model": {"vllm", "triton"},
}


# what benchmarks may use of vLLM: its public interface, and the kernels that ours are compared with
PEERS = {
    "vllm",
    "vllm.LLM",
    "vllm.SamplingParams",
    "vllm.vllm_flash_attn",
    "vllm.vllm_flash_attn.flash_attn_varlen_func",
    "vllm.vllm_flash_attn.get_scheduler_metadata",
    "vllm.v1.attention.ops.triton_unified_attention",
    "vllm.v1.attention.ops.triton_unified_attention.unified_attention",
}


def part(module: Path) -> str:
    return module.relative_to(PACKAGE).parts[0].removesuffix(".py")


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


def test_every_part_has_a_law() -> None:
    assert {part(module) for module in MODULES} - {"__init__"} == set(FORBIDDEN)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.relative_to(PACKAGE)))
def test_imports(module: Path) -> None:
    tree = ast.parse(module.read_text())
    names = set(imports(tree))
    broken = {name for name in names for other in FORBIDDEN.get(part(module), set()) if is_within(name, other)}
    assert not broken
    assert not any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(tree)), "absolute imports only"
    if part(module) == "benchmarks":
        assert {name for name in names if is_within(name, "vllm")} <= PEERS


@pytest.mark.parametrize("module", sorted((PACKAGE / "cli").glob("*.py")), ids=lambda module: module.name)
def test_the_command_imports_lazily(module: Path) -> None:
    allowed = {"__future__", "os", "sys", "pathlib", "typing", "typer", "vllm_toptheta.errors", "vllm_toptheta.cli"}
    names = {name for name in imports(ast.parse(module.read_text()), top_level=True)}
    assert {name for name in names if not any(is_within(name, other) for other in allowed)} == set()


def test_shipped_thresholds_are_valid() -> None:
    from vllm_toptheta import store

    folders = store.list_stores(thresholds=PACKAGE.parent / "thresholds")
    assert [folder.name for folder in folders] == ["HuggingFaceTB--SmolLM2-135M-Instruct"]
    for folder in folders:
        loaded = store.load(folder)
        assert store.folder_name(loaded.manifest.model.id) == folder.name
