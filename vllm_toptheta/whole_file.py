"""Files that are there whole or not at all, whatever happens while they are written.

May import nothing of the package.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

__all__ = ["unfinished", "write_whole"]


def unfinished(file: Path) -> Path:
    """Return where a file lies until it is whole; a process that was killed may have left it."""
    return file.with_name(f"{file.name}.new")


def write_whole(file: Path, content: bytes) -> None:
    """Write a file beside its place and rename it there; its folder is made if need be.

    Args:
        file: Where to; what is there stays until the new one is on the disk.
        content: All of it.

    Raises:
        OSError: It cannot be written; nothing is left of it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    new = unfinished(file)
    try:
        with new.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        new.replace(file)
    except BaseException:  # also an interrupt
        with contextlib.suppress(OSError):
            new.unlink()
        raise
