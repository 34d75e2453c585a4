"""Runs the tests of the Triton kernels in Triton's interpreter, where there is no GPU.

In a process of its own: Triton must be told before it is imported, and whoever imports vLLM imports it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1]
RUNS = {
    "values": (
        "kernels/test_decode.py",
        "kernels/test_value_sums.py",
        "backend/test_gpu.py",
        "benchmarks/test_quality.py",
    ),
    "shadow": ("kernels/test_shadow.py", "backend/test_gpu_shadow.py"),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="they run on the GPU")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the interpreter")
@pytest.mark.parametrize("name", RUNS)
def test_kernels_in_the_interpreter(name: str) -> None:
    pytest.importorskip("triton")
    files = [str(TESTS / file) for file in RUNS[name]]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
