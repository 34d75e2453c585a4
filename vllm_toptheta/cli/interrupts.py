"""What an interrupted command says: one line, and what is kept of its work. Imports nothing heavy."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import typer

__all__ = ["Interrupted", "interruptible"]

_KEPT = {
    "calibrate": "the finished passes are kept, and the same command goes on there (--no-resume starts anew)",
    "tune": "the finished sequences are kept, and the same command goes on there (--no-resume starts anew)",
    "eval decode": "the finished sequences are kept where --output was given, and the same command goes on there",
}
_NOTHING_KEPT = "nothing is kept, and the same command starts anew"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(SystemExit):
    """A signal asked the command to end: it ends as by `sys.exit`, with the code that shells expect."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into one line on stderr and the exit codes 130 and 143; a second one ends at once."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number, handler in before.items():
        # `nohup` and shells have a command pass over signals that are none of its business
        if handler is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    try:
        yield
    except Interrupted:
        typer.echo(f"interrupted: {_kept(sys.argv[1:])}", err=True)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    for other in _SIGNALS:
        signal.signal(other, signal.SIG_DFL)
    raise Interrupted(128 + number)


def _kept(arguments: list[str]) -> str:
    names = arguments[:1], arguments[:2]
    return next((_KEPT[name] for name in map(" ".join, names) if name in _KEPT), _NOTHING_KEPT)
