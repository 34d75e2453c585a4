"""The config.json of a Hugging Face model directory, and what a name is that is no such directory."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from vllm_toptheta.errors import ModelConfigError
from vllm_toptheta.store.schema import Architecture

MAX_CONFIG_BYTES = 4 << 20
LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # what Git keeps in the place of a large file

_REMEDY = "Name the directory of a Hugging Face model, the one that contains config.json"
_NO_GGUF = "Give the directory of the model in safetensors that it was made of"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def read_architecture(model_folder: Path | str) -> Architecture:
    """Read the fingerprint of the model in a Hugging Face directory.

    Raises:
        ModelConfigError: There is no usable config.json.
    """
    return Architecture.from_hf_config(read_config(model_folder), file=Path(model_folder) / "config.json")


def read_config(model_folder: Path | str) -> dict[str, Any]:
    """Read the config.json of a Hugging Face directory.

    Raises:
        ModelConfigError: There is no such directory, or no config.json in it that is a JSON object.
    """
    folder = Path(model_folder)
    check_folder(folder)
    file = folder / "config.json"
    if file.exists() and not file.is_file():
        # a named pipe would be waited for
        raise ModelConfigError("not a regular file", file=file, remedy=_REMEDY)
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        reason = "a link to what is not there" if _dangles(file) else f"cannot be read: {error.strerror}"
        remedy = _NO_GGUF if any(folder.glob("*.gguf")) else _REMEDY
        raise ModelConfigError(reason, file=file, remedy=remedy) from None
    if len(content) > MAX_CONFIG_BYTES:
        raise ModelConfigError(f"larger than {MAX_CONFIG_BYTES} bytes", file=file, remedy=_REMEDY)
    if content.startswith(LFS_POINTER):
        raise ModelConfigError("a pointer of Git LFS, not the file itself", file=file, remedy="Run `git lfs pull`")
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ModelConfigError(f"not JSON: {error}", file=file, remedy=_REMEDY) from None
    if not isinstance(config, dict):
        raise ModelConfigError("not a JSON object", file=file, remedy=_REMEDY)
    return config


def check_folder(model_folder: Path) -> None:
    """Refuse what is no directory, saying what it is instead.

    Raises:
        ModelConfigError: It is a file, or nothing that is on this machine.
    """
    if model_folder.is_dir():
        return
    name, message, remedy = str(model_folder), "there is no such directory", _REMEDY
    _, colon, quantization = name.rpartition(":")
    if name.lower().endswith(".gguf"):
        message, remedy = "a GGUF file, which is not a model directory", _NO_GGUF
    elif _dangles(model_folder):
        message = "a link to what is not there"
    elif model_folder.exists():
        message = "a file, not a model directory"
    elif colon and "/" not in quantization:
        message, remedy = f"there is no such directory; {quantization!r} names a GGUF file of a repository", _NO_GGUF
    elif _HUB_ID.fullmatch(name):
        remedy = f"A model of the hub has to be downloaded first (hf download {name}), and its directory named"
    raise ModelConfigError(message, file=model_folder, remedy=remedy)


def _dangles(path: Path) -> bool:
    return path.is_symlink() and not path.exists()
