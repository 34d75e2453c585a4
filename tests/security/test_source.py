"""What the code that reads untrusted files never does, read off the syntax trees."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import vllm_toptheta

PACKAGE = Path(vllm_toptheta.__file__).parent
EVERYWHERE = sorted(PACKAGE.rglob("*.py"))
READERS = [*sorted((PACKAGE / "store").rglob("*.py")), PACKAGE / "server/config.py", PACKAGE / "settings.py"]

# formats that run code as they are read
CODE_LOADERS = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle"}
RUNS_CODE = {"eval", "exec", "compile", "__import__"}
# the child process in which HumanEval's solutions run, once somebody has allowed it; nothing else imports it
RUNS_CODE_ON_PURPOSE = {"evaluation/tasks/sandbox_child.py"}
UNSAFE_CALLS = {"torch.load", "np.load", "numpy.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system"}
REACHES_OUT = {"subprocess", "socket", "ssl", "urllib", "http", "httpx", "requests", "importlib", "ctypes", "runpy"}


def imported(tree: ast.AST) -> set[str]:
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    return {name.partition(".")[0] for name in names}


def called(tree: ast.AST) -> set[str]:
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def relative(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


@pytest.mark.parametrize("file", EVERYWHERE, ids=relative)
def test_nothing_that_is_read_can_run(file: Path) -> None:
    tree = ast.parse(file.read_text())
    assert not imported(tree) & CODE_LOADERS
    runs_code = set() if relative(file) in RUNS_CODE_ON_PURPOSE else RUNS_CODE
    assert not called(tree) & (runs_code | UNSAFE_CALLS)
    keywords = {keyword.arg for node in ast.walk(tree) if isinstance(node, ast.Call) for keyword in node.keywords}
    assert "allow_pickle" not in keywords
    # never by us; vLLM has its own flag for those who trust a model's code
    assert "trust_remote_code" not in keywords


@pytest.mark.parametrize("file", READERS, ids=relative)
def test_readers_reach_nothing_but_files(file: Path) -> None:
    assert not imported(ast.parse(file.read_text())) & REACHES_OUT
