"""Where this package keeps what it can make again.

May import nothing of the package.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The user's cache folder for this package (`XDG_CACHE_HOME` is honoured)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-toptheta"
