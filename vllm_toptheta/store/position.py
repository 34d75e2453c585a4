"""Where a k lies among those of a store: one of them, or between two."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from vllm_toptheta.errors import TargetOutOfRange
from vllm_toptheta.store.schema import Manifest
from vllm_toptheta.store.target import TargetSpec


class Position(NamedTuple):
    """(1 - weight) of target `lower` and weight of target `upper`, which may be one and the same."""

    lower: int
    upper: int
    weight: float


def locate(manifest: Manifest, label: str, *, folder: Path) -> Position:
    """Return where a target lies, by its label.

    Args:
        manifest: Whose targets.
        label: Such as k:64.
        folder: Of the store, for the error message.

    Raises:
        SettingsError: It is no label.
        TargetOutOfRange: It lies outside the calibrated ks.
    """
    return locate_k(manifest, TargetSpec.parse(label).k, folder=folder)


def locate_k(manifest: Manifest, target_k: int, *, folder: Path) -> Position:
    """Return where a k lies, by its logarithm if it lies between two.

    Args:
        manifest: Whose targets.
        target_k: k.
        folder: Of the store, for the error message.

    Raises:
        TargetOutOfRange: It lies outside the calibrated ks.
    """
    ks = manifest.target_ks
    if not ks[0] <= target_k <= ks[-1]:
        raise TargetOutOfRange(
            f"no thresholds for k {target_k}; calibrated are {', '.join(map(str, ks))}",
            file=folder,
            field="target_k",
            remedy=f"Choose a k from {ks[0]} to {ks[-1]}, or calibrate with a wider --k",
        )
    upper = next(index for index, k in enumerate(ks) if k >= target_k)
    if ks[upper] == target_k:
        return Position(upper, upper, 0.0)
    weight = math.log(target_k / ks[upper - 1]) / math.log(ks[upper] / ks[upper - 1])
    return Position(upper - 1, upper, weight)
