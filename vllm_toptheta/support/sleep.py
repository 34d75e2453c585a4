"""Whether sleep mode can be served, which depends on what the installed vLLM gives back."""

from __future__ import annotations

import functools
import importlib.util
from contextlib import suppress
from pathlib import Path

_FILE = Path("device_allocator", "sleep_mode_backend.py")
_POOL = '"runtime"'  # where vLLM makes what builders of attention metadata keep, since there is such a pool


@functools.cache
def wakes_up_whole() -> bool:
    """Whether a vLLM that wakes up has what its attention backend made at the start: thresholds, counters, rotations.

    Told by its file, because `--check` does not import it. vLLM 0.26 makes all that in the pool of the KV cache, whose
    content is thrown away; 0.32 and 0.33 in a pool that is copied to the host and back, at every level of sleep.

    Returns:
        False of a vLLM that is known to lose it; True also where none is installed, which will answer at its start.
    """
    found = importlib.util.find_spec("vllm")
    for folder in (found and found.submodule_search_locations) or ():
        with suppress(FileNotFoundError):
            return _POOL in Path(folder, _FILE).read_text()
        return False
    return True
