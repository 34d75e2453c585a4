"""Which weights a model has: a fingerprint that takes milliseconds, of whatever size the model is."""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path

_SUFFIXES = {".safetensors", ".bin", ".gguf"}
_HEAD_BYTES = 1 << 20  # of a file: the names, types and shapes of its tensors, in most
_NUM_SAMPLES = 64
_SAMPLE_BYTES = 4096


@functools.cache
def weights_sha256(folder: Path) -> str | None:
    """Return a fingerprint of the weights in a model directory.

    It is the sha256 of the names and sizes of the files with weights, of their first MiB, and of 64 samples of 4 KiB
    evenly spread over each. Training changes nearly every number, so that weights of another training differ in the
    samples; two that differ in a few numbers may not. Other files of the same weights have another fingerprint.

    Args:
        folder: A Hugging Face model directory.

    Returns:
        64 hexadecimal digits; None where there are no files of weights, or one cannot be read.
    """
    digest = hashlib.sha256()
    try:
        files = sorted(file for file in folder.iterdir() if file.suffix in _SUFFIXES)
        for file in files:
            with file.open("rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                digest.update(f"{file.name}\0{size}\0".encode())
                digest.update(stream.read(_HEAD_BYTES))
                for index in range(_NUM_SAMPLES):
                    stream.seek(index * max(0, size - _SAMPLE_BYTES) // (_NUM_SAMPLES - 1))
                    digest.update(stream.read(_SAMPLE_BYTES))
    except OSError:
        return None
    return digest.hexdigest() if files else None


def local_folder(model: str, revision: str | None = None) -> Path | None:
    """Return where a model lies on this machine: its directory, or that of the hub's cache. No network.

    Args:
        model: A hub id or a directory.
        revision: Of the hub's repository; None for its main branch.

    Returns:
        The folder; None where it is not here.

    Raises:
        HFValidationError: The name is neither a directory nor a hub id; a ValueError.
    """
    if os.path.isdir(model):
        return Path(model)
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(model, "config.json", revision=revision)
    return Path(cached).parent if isinstance(cached, str) else None
