"""Load stores under observation: `python -m tests.security.observe FOLDER...` prints one JSON record for each.

An audit hook sees what the interpreter does on behalf of the loader: files opened, modules imported, code compiled or
run, processes started, sockets opened, objects unpickled. Hooks cannot be taken back, hence a process of its own.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from vllm_toptheta import store
from vllm_toptheta.errors import StoreError

WATCHED = (
    "open",
    "exec",
    "compile",
    "import",
    "pickle.",
    "subprocess.",
    "os.",
    "socket.",
    "shutil.",
    "ctypes.",
    "code.",
)


def main(folders: list[str]) -> None:
    warm_up(folders[0])
    events: list[str] = []
    recording = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if recording and event.startswith(WATCHED):
            events.append(f"{event} {arguments[0]!r}" if arguments else event)

    sys.addaudithook(hook)
    for folder in folders[1:]:
        events.clear()
        before, started = peak_bytes(), time.perf_counter()
        recording = True
        try:
            loaded = store.load(folder)
            theta = loaded.curve(loaded.manifest.target_ks[0]).threshold([1, 1 << 24])
            outcome = "loaded" if np.isfinite(theta).all() else "not finite"
            message = ""
        except StoreError as error:
            outcome, message = type(error).__name__, str(error)
        recording = False
        seconds, grown = time.perf_counter() - started, peak_bytes() - before
        record = {"outcome": outcome, "message": message, "events": events, "seconds": seconds, "grown": grown}
        sys.stdout.write(json.dumps(record) + "\n")


def warm_up(folder: str) -> None:
    """Load a good store, so that what happens once only is over."""
    assert store.load(Path(folder)).curve(8)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main(sys.argv[1:])
