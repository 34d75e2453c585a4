"""A th.txt as the paper's code would leave it behind for a tiny model."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

Theta = Callable[[int, int, int, int], float]


def smooth_theta(layer: int, head: int, length: int, k: int) -> float:
    """A threshold that a quadratic in ln n meets exactly."""
    x = np.log(length)
    return float(0.5 * layer - 0.25 * head + 0.3 * x - 0.02 * x**2 - 0.4 * np.log(k))


def th_lines(
    *,
    layers: Sequence[int] = range(3),
    heads: Sequence[int] = range(4),
    ks: Sequence[int] = (8,),
    lengths: Sequence[int] = tuple(range(40, 400, 7)),
    samples: int = 3,
    theta: Theta = smooth_theta,
) -> list[str]:
    """Lines in the order in which the paper's code appends them: layer, head, length."""
    return [
        f"L{layer}_H{head}:{length} {theta(layer, head, length, k)!r} {samples} {k}"
        for layer in layers
        for k in ks
        for head in heads
        for length in lengths
    ]


def write_lines(file: Path, lines: Sequence[str]) -> Path:
    file.write_text("".join(f"{line}\n" for line in lines), encoding="ascii")
    return file
