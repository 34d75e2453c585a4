"""Ports for servers that start next."""

from __future__ import annotations

import secrets
import socket

FIRST, END = 20_000, 32_000  # the system gives out those behind, to whoever asks for any
TRIES = 100


def free_port() -> int:
    """A port that nobody listens on, and that nobody else is given before somebody does."""
    for _ in range(TRIES):
        port = FIRST + secrets.randbelow(END - FIRST)
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise OSError(f"{TRIES} ports were taken")
