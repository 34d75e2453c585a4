"""How many channels shadow keys may have; imports nothing, so that a server can be checked in a moment."""

from __future__ import annotations

CHANNELS = (32, 64, 128)


def channels_for(head_size: int) -> tuple[int, ...]:
    """Numbers of channels that there are kernels for."""
    return tuple(number for number in CHANNELS if number <= head_size)
