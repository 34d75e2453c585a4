"""What Triton compiles for an H100 of the steps that a server launches, without a GPU, for `tools.digest`.

Triton is told of a card that is not there, and launches are stopped once they are compiled. Registers and stack
frames, which hold what is spilled, are in bytes and as ptxas assigns them. It minds labels of debug information, of
which there are others where other functions are inlined: of the same PTX, a frame may be a few bytes larger or smaller.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from tests.kernels import test_shadow, test_value_sums
from tests.kernels.decode_case import Shape, make_case
from tests.kernels.shadow_case import make_shadow_case
from tests.kernels.tier_case import make_tier_case
from tests.kernels.verified_case import Verified
from vllm_toptheta.limits import NUM_ANCHORS, gpus_lack

# head sizes, groups, pages and dtypes that differ in what is compiled
SHAPES = {
    "8B": Shape((40,), num_heads=4, num_kv_heads=1, head_size=128, dtype=torch.bfloat16, num_channels=64),
    "8B, relative": Shape(
        (40,), num_heads=4, num_kv_heads=1, head_size=128, dtype=torch.bfloat16, num_channels=64, slope=1.0,
        max_dense_len=NUM_ANCHORS,
    ),
    "8B, pages of 32": Shape(
        (40,), num_heads=4, num_kv_heads=1, head_size=128, block_size=32, dtype=torch.bfloat16, num_channels=64
    ),
    "SmolLM2": Shape((40,), num_heads=3, num_kv_heads=1, dtype=torch.bfloat16, num_channels=32),
    "group of 16, head size 80": Shape(
        (40,), num_heads=16, num_kv_heads=1, head_size=80, block_size=128, num_channels=64, degree=2
    ),
    "head size 256, soft cap": Shape(
        (40,), num_heads=2, num_kv_heads=1, head_size=256, soft_cap=30.0, dtype=torch.bfloat16, num_channels=128
    ),
    "float8": Shape(
        (40,), num_heads=4, num_kv_heads=1, head_size=128, dtype=torch.bfloat16, kv_dtype=torch.float8_e4m3fn,
        query_dtype=torch.float8_e4m3fn, num_channels=64,
    ),
    "sinks": Shape(
        (40,), num_heads=8, num_kv_heads=1, dtype=torch.bfloat16, num_channels=32, slope=1.0, max_dense_len=NUM_ANCHORS,
        has_sinks=True,
    ),
    "no compensation": Shape(
        (40,), num_heads=4, num_kv_heads=1, head_size=128, exact=False, value_mean=False, num_channels=64
    ),
}  # fmt: skip


def compiled(match: str = "") -> dict[str, Any]:
    """By shape, step and kernel: a hash of the PTX without its line numbers and names, registers, stack frame.

    Of those steps that have `match` in their names.
    """
    found: dict[str, Any] = {}
    with _no_card() as kernels:
        for name, shape in SHAPES.items():
            for part, launch in _steps(shape).items():
                if match not in f"{name}: {part}":
                    continue
                kernels.clear()
                launch()
                # a step takes minutes where Triton has nothing cached
                sys.stderr.write(f"{name}: {part}: {len(kernels)} kernels\n")
                for kernel in kernels:
                    found[f"{name}: {part}: {kernel.name.strip('_')}"] = _summary(kernel)
    return found


def _steps(shape: Shape) -> dict[str, Any]:
    case, shadow = make_case(shape), make_shadow_case(shape, threshold=0.0)
    offset = {"threshold_offset": torch.zeros(1)}
    steps = {
        "values": case.run,
        "values, offsets": lambda: case.run(**offset),
        "values, drafts": Verified.make(shape, (4,)).run,
        "shadow": shadow.run,
        "shadow, offsets": lambda: shadow.run(**offset),
        "value sums": lambda: test_value_sums.step(case, [0], [40]),
        "codes": lambda: test_shadow.step(shadow, [0], [40]),
    }
    if not gpus_lack(shape.head_size, shape.num_heads, shape.num_kv_heads, has_copies=True):
        tiers = make_tier_case(shape)
        steps |= {
            "tiers": tiers.run,
            "tiers, offsets": lambda: tiers.run(**offset),
            "copies": lambda: tiers.write_tails([0], [40]),
        }
    return steps


@contextmanager
def _no_card() -> Iterator[list[Any]]:
    """Compile instead of launching; the list fills with what was compiled."""
    kernels: list[Any] = []
    run = JITFunction.run

    def compile_only(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernels.append(run(kernel, *args, grid=grid, warmup=True, **options))

    card = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device=None: 0,
        get_device_properties=lambda device=None: {"max_shared_mem": 232448, "multiprocessor_count": 132},
        get_active_torch_device=lambda: torch.device("cpu"),
    )
    driver.set_active(card)
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(torch.Tensor, "is_cuda", True),
    ):
        patches = [mock.patch.object(module, "has_dependent_launch", return_value=True) for module in _launchers()]
        for patch in patches:
            patch.start()
        yield kernels
        for patch in patches:
            patch.stop()


def _launchers() -> list[Any]:
    """The modules that ask whether a kernel can start before its predecessor has ended, as it can on an H100."""
    ours = [module for name, module in sys.modules.items() if name.startswith("vllm_toptheta.kernels.")]
    return [module for module in ours if hasattr(module, "has_dependent_launch")]


def _summary(kernel: Any) -> dict[str, Any]:
    ptx = re.sub(r"^\s*(\.loc|\.file|//).*$", "", kernel.asm["ptx"], flags=re.MULTILINE)
    ptx = ptx.split(".section")[0]
    # labels that only debug information refers to stand wherever a function was inlined
    ptx = re.sub(r"//.*$|\$L__tmp\d+:|\$L__func\w+:", "", ptx, flags=re.MULTILINE)
    ptx = "\n".join(line for line in ptx.splitlines() if line.strip())
    return {"ptx": hashlib.sha256(ptx.encode()).hexdigest()[:16], "lines": len(ptx.splitlines()), **_resources(kernel)}


def _resources(kernel: Any) -> dict[str, int]:
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as scratch:
        binary = Path(scratch, "kernel.cubin")
        binary.write_bytes(kernel.asm["cubin"])
        command = [str(cuobjdump), "--dump-resource-usage", str(binary)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603
    return {name.lower(): int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
