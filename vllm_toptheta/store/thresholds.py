"""The content of a store: the thresholds of one model for all its targets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vllm_toptheta.errors import TargetOutOfRange
from vllm_toptheta.store.curve import ThresholdCurve, interpolate
from vllm_toptheta.store.expectations import Expectations
from vllm_toptheta.store.schema import Manifest
from vllm_toptheta.store.target import TargetSpec


@dataclass(frozen=True, eq=False)
class ThresholdStore:
    """The thresholds of one model, checked. All arrays are read-only.

    Attributes:
        folder: Where it was read from.
        manifest: What it covers and how it was made.
        coefficients: [num_layers, num_heads, num_targets, degree + 1] float32, of ascending powers of ln n.
        bucket_edges: [num_buckets + 1] int32, tokens; bucket b holds rows of edges[b] <= n < edges[b + 1].
        row_count: [num_targets, num_buckets] int64, calibration rows.
        score_mean: [num_layers, num_heads, num_targets, num_buckets] float32, mean threshold of a row: its k-th
            largest score, or what a target of another kind takes in its place.
        score_std: The same shape, its standard deviation; both are zero in a bucket without rows.
        expectations: What the thresholds keep and lose; None where nothing was measured.
    """

    folder: Path
    manifest: Manifest
    coefficients: NDArray[np.float32]
    bucket_edges: NDArray[np.int32]
    row_count: NDArray[np.int64]
    score_mean: NDArray[np.float32]
    score_std: NDArray[np.float32]
    expectations: Expectations | None

    def curve(self, target_k: int) -> ThresholdCurve:
        """Return theta(n) for a constant k, interpolated between the two calibrated neighbours if need be.

        Raises:
            TargetOutOfRange: `target_k` lies outside the calibrated ks.
        """
        ks = self.manifest.target_ks
        if not ks or not ks[0] <= target_k <= ks[-1]:
            raise TargetOutOfRange(
                f"no thresholds for k {target_k}; calibrated are {', '.join(map(str, ks or self.manifest.labels))}",
                file=self.folder,
                field="target_k",
                remedy=f"Choose a k from {ks[0]} to {ks[-1]}, or calibrate with a wider --k"
                if ks
                else "Name one of them as the target, or calibrate with --k",
            )
        upper = next(index for index, k in enumerate(ks) if k >= target_k)
        if ks[upper] == target_k:
            return self._calibrated_curve(upper)
        return interpolate(self._calibrated_curve(upper - 1), self._calibrated_curve(upper), target_k)

    def curve_of(self, label: str) -> ThresholdCurve:
        """Return theta(n) for a target by its label, such as k:64 or mass:0.98.

        Raises:
            SettingsError: It is no label.
            TargetOutOfRange: It was not calibrated.
        """
        spec = TargetSpec.parse(label)
        if spec.constant_k is not None:
            return self.curve(spec.constant_k)
        if spec.label not in self.manifest.labels:
            raise TargetOutOfRange(
                f"no thresholds for {spec.label}; calibrated are {', '.join(self.manifest.labels)}",
                file=self.folder,
                field="target",
                remedy=f"Choose one of them, or calibrate with --target {spec.label}",
            )
        return self._calibrated_curve(self.manifest.labels.index(spec.label))

    def _calibrated_curve(self, index: int) -> ThresholdCurve:
        target = self.manifest.targets[index]
        return ThresholdCurve(
            dense_length=target.dense_length,
            coefficients=self.coefficients[:, :, index],
            min_length=target.min_length,
            max_length=target.max_length,
            label=target.label,
            placement=self.manifest.placement,
            expectations=None if self.expectations is None else self.expectations.of_target(index),
            bucket_edges=self.bucket_edges,
        )
