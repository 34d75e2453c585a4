"""NVIDIA's run-time compiler: from CUDA C++ to a cubin, without headers, nvcc or a host compiler."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

LOG_CHARACTERS = 3000  # of the compiler's log, in an error; the first error is what matters
_COMPILATION_FAILED = 6  # NVRTC_ERROR_COMPILATION


class CompileError(RuntimeError):
    """A kernel cannot be compiled: there is no NVRTC, or it refuses the source."""


class Nvrtc:
    """The compiler's library.

    Args:
        library: What has NVRTC's functions: a `ctypes.CDLL`, or a double of it.
    """

    def __init__(self, library: Any) -> None:
        self._library = library
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "nvrtcVersion")
        self.version = (major.value, minor.value)

    def compile(self, source: str, options: Sequence[str]) -> bytes:
        """The cubin of a source text.

        Args:
            source: The whole text; nothing is included.
            options: NVRTC's, with a real architecture such as `--gpu-architecture=sm_90`.

        Raises:
            CompileError: The message holds the start of NVRTC's log.
        """
        program = ctypes.c_void_p()
        created = self._library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
        self._check(created, "nvrtcCreateProgram")
        try:
            texts = [option.encode() for option in options]
            result = self._library.nvrtcCompileProgram(program, len(texts), (ctypes.c_char_p * len(texts))(*texts))
            if result == _COMPILATION_FAILED:
                raise CompileError(self._log(program)[:LOG_CHARACTERS])
            self._check(result, "nvrtcCompileProgram", program)
            return self._read(program, "nvrtcGetCUBINSize", "nvrtcGetCUBIN")
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _read(self, program: ctypes.c_void_p, size_of: str, content_of: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._library, size_of)(program, ctypes.byref(size)), size_of)
        content = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._library, content_of)(program, content), content_of)
        return content.raw

    def _log(self, program: ctypes.c_void_p) -> str:
        log = self._read(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog")
        return log.rstrip(b"\0").decode(errors="replace")

    def _check(self, result: int, function: str, program: ctypes.c_void_p | None = None) -> None:
        if result != 0:
            # e.g. NVRTC without its builtins library says why in the log only
            log = self._log(program) if program is not None else ""
            raise CompileError(f"{function} of NVRTC returned {result}. {log[:LOG_CHARACTERS]}".rstrip())


@functools.cache
def find_nvrtc() -> Nvrtc:
    """The NVRTC that torch's CUDA wheels carry, or the system's.

    Raises:
        CompileError: There is none.
    """
    names = [f"libnvrtc.so.{_torch_major()}", "libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12"]
    for file in [*_files_of_wheels(), *map(Path, names)]:
        try:
            # NVRTC asks the loader for its builtins by name alone, which finds them if they are loaded
            for builtins in sorted(file.parent.glob("libnvrtc-builtins.so.*")) if file.is_absolute() else []:
                ctypes.CDLL(str(builtins))
            return Nvrtc(ctypes.CDLL(str(file)))
        except OSError:
            continue
    raise CompileError(
        "no libnvrtc was found, neither beside torch nor by the system's loader. Install the package "
        f"nvidia-cuda-nvrtc of torch's CUDA version ({_torch_major() or 'none: this torch has no CUDA'})."
    )


def _torch_major() -> str:
    import torch

    return (torch.version.cuda or "").partition(".")[0]


def _files_of_wheels() -> Iterator[Path]:
    spec = importlib.util.find_spec("nvidia")  # a namespace package of all of NVIDIA's wheels
    major = _torch_major() or "[0-9]*"  # a torch for CPUs compiles for any GPU that is named
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        for library_folder in (f"cu{major}", "cuda_nvrtc"):
            yield from sorted(Path(folder).glob(f"{library_folder}/lib/libnvrtc.so.{major}"))
