"""How many channels shadow keys may have: what kernels exist for, and calibration aims at. Imports nothing."""

from __future__ import annotations

CHANNELS = (32, 64, 128)


def channels_for(head_size: int) -> tuple[int, ...]:
    """Numbers of channels that there are kernels for."""
    return tuple(number for number in CHANNELS if number <= head_size)
