"""Compiled kernels on disk, so that only the first start on a machine compiles them."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from vllm_toptheta.cache_folder import cache_folder
from vllm_toptheta.kernels.gpu.cuda.nvrtc import Nvrtc

OPTIONS = ("--std=c++17", "-default-device")
_CHECKSUM_BYTES = hashlib.sha256().digest_size

logger = logging.getLogger("vllm.toptheta")  # below vLLM's own, so that its format and level apply


class Cubins:
    """Compiles sources, and keeps the cubins in files.

    A file holds the sha256 of the cubin and the cubin; one that is damaged counts as absent. Where files cannot be
    written, every start compiles.

    Args:
        compiler: The compiler, whose version is part of a file's name.
        folder: Where the files lie; `cubins` in the user's cache folder if None.
    """

    def __init__(self, compiler: Nvrtc, folder: Path | None = None) -> None:
        self._compiler = compiler
        self._folder = cache_folder() / "cubins" if folder is None else folder
        self._has_warned = False

    def get(self, source: str, architecture: str, macros: Sequence[str] = (), *, is_fresh: bool = False) -> bytes:
        """The cubin of a source, compiled if there is no file of it.

        Args:
            source: The whole text.
            architecture: Of the GPU, such as `sm_90`.
            macros: What `-D` defines, such as `HEAD_SIZE=128`.
            is_fresh: Compile in any case, and replace the file.

        Raises:
            CompileError: The compiler refuses the source.
        """
        options = [*OPTIONS, f"--gpu-architecture={architecture}", *(f"-D{macro}" for macro in macros)]
        key = hashlib.sha256(repr((source, options, self._compiler.version)).encode()).hexdigest()
        file = self._folder / f"{key}.cubin"
        if not is_fresh and (kept := _read(file)) is not None:
            return kept
        cubin = self._compiler.compile(source, options)
        self._write(file, cubin)
        return cubin

    def _write(self, file: Path, cubin: bytes) -> None:
        """Replace a file by one rename, so that no process reads half of it."""
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            descriptor, written = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
            try:
                with open(descriptor, "wb") as stream:
                    stream.write(hashlib.sha256(cubin).digest() + cubin)
                os.replace(written, file)
            except OSError:
                os.unlink(written)
                raise
        except OSError as error:
            if not self._has_warned:
                logger.warning("Compiled kernels cannot be kept, so each start compiles them: %s", error)
                self._has_warned = True


def _read(file: Path) -> bytes | None:
    try:
        content = file.read_bytes()
    except OSError:
        return None
    checksum, cubin = content[:_CHECKSUM_BYTES], content[_CHECKSUM_BYTES:]
    return cubin if hashlib.sha256(cubin).digest() == checksum else None
