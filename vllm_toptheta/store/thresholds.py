"""The content of a store: calibrated thresholds of one model for all its targets, its shadow keys, or both."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vllm_toptheta.errors import ShadowMissing, TargetOutOfRange
from vllm_toptheta.store.curve import ThresholdCurve, interpolate
from vllm_toptheta.store.expectations import Expectations
from vllm_toptheta.store.schema import Manifest
from vllm_toptheta.store.shadow import ShadowKeys
from vllm_toptheta.store.target import TargetSpec


@dataclass(frozen=True, eq=False)
class CalibratedThresholds:
    """The thresholds of one model. All arrays are read-only.

    Attributes:
        coefficients: [num_layers, num_heads, num_targets, degree + 1] float32, of ascending powers of ln n.
        bucket_edges: [num_buckets + 1] int32, tokens; bucket b holds rows of edges[b] <= n < edges[b + 1].
        row_count: [num_targets, num_buckets] int64, calibration rows.
        score_mean: [num_layers, num_heads, num_targets, num_buckets] float32, mean k-th largest score of a row.
        score_std: The same shape, its standard deviation; both are zero in a bucket without rows.
        expectations: What compensations need; None where nothing was measured.
    """

    coefficients: NDArray[np.float32]
    bucket_edges: NDArray[np.int32]
    row_count: NDArray[np.int64]
    score_mean: NDArray[np.float32]
    score_std: NDArray[np.float32]
    expectations: Expectations | None


@dataclass(frozen=True, eq=False)
class ThresholdStore:
    """What was calibrated for one model, checked.

    Attributes:
        folder: Where it was read from.
        manifest: What it covers and how it was made.
        calibrated: Thresholds; None where there are only shadow keys.
        shadow_keys: What mode `shadow` needs, or None; `shadow` is the same and refuses None.
    """

    folder: Path
    manifest: Manifest
    calibrated: CalibratedThresholds | None
    shadow_keys: ShadowKeys | None

    @property
    def shadow(self) -> ShadowKeys:
        """What the store holds of shadow keys, for mode `shadow`.

        Raises:
            ShadowMissing: It was calibrated without them.
        """
        if self.shadow_keys is None:
            raise ShadowMissing(
                "these thresholds came without shadow keys",
                file=self.folder,
                field="shadow",
                remedy="Calibrate the model again, with --mode shadow, or switch shadow_values on, which needs none",
            )
        return self.shadow_keys

    @property
    def expectations(self) -> Expectations | None:
        """What compensations need; None where nothing was measured."""
        return None if self.calibrated is None else self.calibrated.expectations

    def curve(self, target_k: int) -> ThresholdCurve:
        """Return theta(n) for a k, interpolated by its logarithm between the two calibrated neighbours if need be.

        Raises:
            TargetOutOfRange: `target_k` lies outside the calibrated ks.
        """
        ks = self.manifest.target_ks
        if not ks or not ks[0] <= target_k <= ks[-1]:
            raise TargetOutOfRange(
                f"no thresholds for k {target_k}; calibrated are {', '.join(map(str, ks)) or 'none'}",
                file=self.folder,
                field="target_k",
                remedy=f"Choose a k from {ks[0]} to {ks[-1]}, or calibrate with a wider --k"
                if ks
                else f"Calibrate with --k {target_k}",
            )
        upper = next(index for index, k in enumerate(ks) if k >= target_k)
        if ks[upper] == target_k:
            return self._calibrated_curve(upper)
        weight = math.log(target_k / ks[upper - 1]) / math.log(ks[upper] / ks[upper - 1])
        return interpolate(self._calibrated_curve(upper - 1), self._calibrated_curve(upper), target_k, weight)

    def curve_of(self, label: str) -> ThresholdCurve:
        """Return theta(n) for a target by its label, such as k:64.

        Raises:
            SettingsError: It is no label.
            TargetOutOfRange: It lies outside the calibrated ks.
        """
        return self.curve(TargetSpec.parse(label).k)

    def _calibrated_curve(self, index: int) -> ThresholdCurve:
        target, found = self.manifest.targets[index], self.calibrated
        assert found is not None  # noqa: S101 - there are targets
        return ThresholdCurve(
            dense_length=target.k,
            coefficients=found.coefficients[:, :, index],
            min_length=target.min_length,
            max_length=target.max_length,
            label=target.label,
            placement=self.manifest.placement,
            expectations=None if found.expectations is None else found.expectations.of_target(index),
            bucket_edges=found.bucket_edges,
        )
