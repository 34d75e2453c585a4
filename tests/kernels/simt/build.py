"""Compile a kernel's CUDA source for the CPU, and launch it as `Kernel.launch` would."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from vllm_toptheta.kernels.gpu.cuda.loading import SOURCE_FOLDER

HERE = Path(__file__).parent
HEADERS = (HERE / "device.h", HERE / "fibers.h")
# no contraction: a kernel says itself where it multiplies and adds at once; and a kernel runs for a shorter time than
# it takes to optimise it
FLAGS = (
    *("-std=c++17", "-O0", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing", "-fno-gnu-unique"),
    *("-fPIC", "-shared", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-unused-function", "-Werror=return-type"),
)


class SimtError(RuntimeError):
    """A kernel broke a rule of the emulated device, or does not compile."""


class EmulatedKernel:
    """A kernel on the CPU; tensors that its arguments point to are CPU tensors.

    Attributes:
        is_reversed: Warps and lanes take their turns in descending order, which shows some missing barriers.
    """

    def __init__(self, library: ctypes.CDLL, name: str) -> None:
        self._run = library[f"run_{name}"]
        self._run.restype = ctypes.c_char_p
        self._run.argtypes = [
            *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint),
            *(ctypes.c_int, ctypes.c_int, ctypes.c_int),
        ]
        self.is_reversed = False

    def launch(
        self,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        arguments: ctypes.Structure,
        stream: int = 0,
        is_early: bool = False,
    ) -> None:
        """Run the kernel to its end.

        Args:
            grid: CTAs along x, y and z.
            threads: Threads of a CTA, 1 to 1024.
            shared_bytes: Dynamic shared memory of a CTA.
            arguments: The struct that the kernel takes by value.
            stream: Ignored.
            is_early: Ignored.

        Raises:
            SimtError: Threads diverge at a collective, wait for each other forever, or use memory against the rules.
        """
        error = self._run(
            ctypes.byref(arguments), ctypes.sizeof(arguments), *grid, threads, shared_bytes, self.is_reversed
        )
        if error is not None:
            raise SimtError(error.decode())


def build(source: str | Path, name: str, macros: Mapping[str, str | int] | None = None) -> EmulatedKernel:
    """Compile a kernel for this CPU, once for each source and each set of macros.

    Args:
        source: The text, or the file, of the source without `device.cuh`.
        name: Name of the `extern "C"` kernel, which takes one struct by value.
        macros: What `-D` defines.

    Raises:
        SimtError: It does not compile; the message is the compiler's.
    """
    file, text = (str(source), source.read_text()) if isinstance(source, Path) else ("kernel.cu", source)
    unit = f'#include "device.h"\n#line 1 "{file}"\n{text}\nSIMT_EXPORT({name})\n'
    options = tuple(f"-D{key}={value}" for key, value in sorted((macros or {}).items()))
    headers = (*HEADERS, *sorted(SOURCE_FOLDER.glob("*.cuh")))
    return EmulatedKernel(_library(unit, options, tuple(header.read_bytes() for header in headers)), name)


def compiler() -> str | None:
    """The C++ compiler that is used, or None if there is none."""
    return shutil.which("g++")


@functools.cache
def _library(unit: str, options: tuple[str, ...], headers: tuple[bytes, ...]) -> ctypes.CDLL:
    key = hashlib.sha256(repr((unit, options, headers, FLAGS)).encode()).hexdigest()[:32]
    # the file is loaded as code, so the folder is this user's alone
    folder = Path(tempfile.gettempdir()) / f"vllm-toptheta-simt-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or folder.is_symlink():
        raise SimtError(f"{folder} belongs to somebody else")
    target = folder / f"{key}.so"
    if not target.exists():
        # several test processes may build the same kernel: each writes its own file and renames it
        with tempfile.TemporaryDirectory(dir=folder) as own:
            made = Path(own) / "kernel.so"
            command = [
                compiler() or "g++",
                *FLAGS,
                *options,
                f"-I{HERE}",
                f"-I{SOURCE_FOLDER}",
                "-x",
                "c++",
                "-",
                "-o",
                str(made),
            ]
            result = subprocess.run(command, input=unit, capture_output=True, text=True, check=False)
            if result.returncode != 0:
                raise SimtError(result.stderr[:3000])
            made.replace(target)
    return ctypes.CDLL(str(target))
