"""Model directories that are made here: once, whole or not at all, and made again if damaged.

May import `errors`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from vllm_toptheta.errors import ConversionError

COMPLETE = "complete.json"  # written last: file name -> sha256 of everything else in the directory
FORMAT = 1  # raised when the conversion changes, so that an older directory is made again


def make_folder(folder: Path, make: Callable[[Path], None], *, source: str) -> Path:
    """Make a model directory unless a complete one is there, and return it.

    The directory appears by one rename, so a reader never sees half of it; one that is damaged (a file missing or
    changed, an earlier process killed) is made again.

    Args:
        folder: The directory.
        make: Writes the model's files into the empty directory that it is given.
        source: What they are made of, for the record.

    Raises:
        ConversionError: `folder` holds something else.
    """
    from filelock import FileLock

    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if is_complete(folder):
            return folder
        if folder.exists() and not _replaceable(folder):
            raise ConversionError(
                "the folder exists and was not made by this command",
                file=folder,
                remedy="Name an empty or new folder",
            )
        unfinished = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed, whose children may still write
        unfinished.mkdir(exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=unfinished))
        try:
            make(scratch)
            files = {path.name: sha256(path) for path in sorted(scratch.iterdir())}
            record = {"format": FORMAT, "source": source, "files": files}
            (scratch / COMPLETE).write_text(json.dumps(record, indent=1) + "\n")
            if folder.exists():
                shutil.rmtree(folder)
            scratch.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds every file of a finished conversion, unchanged."""
    try:
        record = json.loads((folder / COMPLETE).read_text())
        files = record["files"]
        return bool(
            record["format"] == FORMAT
            and all(sha256(folder / name) == digest for name, digest in files.items())
            and "config.json" in files
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def sha256(path: Path) -> str:
    """A file's digest, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _replaceable(folder: Path) -> bool:
    """An empty folder, or one whose files all belong to a conversion: never somebody's own data."""
    if not folder.is_dir():
        return False
    ours = {COMPLETE, "config.json", "generation_config.json", "model.safetensors"}
    return all(path.name in ours or path.name.startswith(("tokenizer", "special_tokens", "chat_template"))
               for path in folder.iterdir())  # fmt: skip
