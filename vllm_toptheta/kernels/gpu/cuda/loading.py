"""A kernel of this folder, ready on a device: compiled at its first use on the machine, loaded once per process."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import torch

from vllm_toptheta.kernels.gpu.cuda.cubins import Cubins
from vllm_toptheta.kernels.gpu.cuda.driver import Driver, DriverError, Kernel, find_driver
from vllm_toptheta.kernels.gpu.cuda.nvrtc import find_nvrtc

SOURCE_FOLDER = Path(__file__).parent


@functools.cache
def kernel_for(device: torch.device, file: str, name: str, macros: tuple[str, ...], max_shared_bytes: int) -> Kernel:
    """A kernel on a device.

    The first call compiles and loads it, so it comes before CUDA graphs are captured.

    Args:
        device: A CUDA device, with its index.
        file: Name of the source beside this module; `device.cuh` is put in front of it.
        name: Of the `extern "C"` kernel in it.
        macros: What `-D` defines, such as `HEAD_SIZE=128`.
        max_shared_bytes: Dynamic shared memory of a CTA that launches may ask for.

    Raises:
        CompileError: There is no NVRTC, or it refuses the source.
        DriverError: The device has less shared memory, or cannot run the kernel.
    """
    major, minor = torch.cuda.get_device_capability(device)
    with torch.cuda.device(device):
        # torch makes a device's context at its first use there; the driver loads into the current one
        torch.empty(1, device=device)
        return load(
            *(_cubins(), find_driver(), source_text(SOURCE_FOLDER / file), f"sm_{major}{minor}"),
            *(name, macros, max_shared_bytes),
        )


def source_text(file: Path) -> str:
    """A kernel's whole source: `device.cuh` in front, and what it includes; errors name the file that they are in."""
    return "".join(f'#line 1 "{part.name}"\n{_included(part)}\n' for part in (SOURCE_FOLDER / "device.cuh", file))


def _included(file: Path) -> str:
    """A source with the files of this folder that it includes; NVRTC reads none."""

    def text_of(match: re.Match[str]) -> str:
        line = file.read_text().count("\n", 0, match.start()) + 2
        included = (SOURCE_FOLDER / match[1]).read_text()
        return f'#line 1 "{match[1]}"\n{included}\n#line {line} "{file.name}"'

    return re.sub(r'^#include "(.+)"$', text_of, file.read_text(), flags=re.MULTILINE)


def load(
    cubins: Cubins,
    driver: Driver,
    source: str,
    architecture: str,
    name: str,
    macros: tuple[str, ...],
    max_shared_bytes: int,
) -> Kernel:
    """Compile a source, or take its cubin from disk, and load it into the current context.

    A cubin that the driver refuses is compiled again, once: the file may be older than the driver's taste.
    """
    try:
        return driver.load(cubins.get(source, architecture, macros), name, max_shared_bytes)
    except DriverError:
        return driver.load(cubins.get(source, architecture, macros, is_fresh=True), name, max_shared_bytes)


@functools.cache
def _cubins() -> Cubins:
    return Cubins(find_nvrtc())
