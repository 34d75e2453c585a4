"""The content of a store: the thresholds of one model for all its targets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vllm_toptheta.errors import ShadowMissing
from vllm_toptheta.store.curve import ThresholdCurve, interpolate
from vllm_toptheta.store.expectations import Expectations
from vllm_toptheta.store.position import locate_k
from vllm_toptheta.store.schema import Manifest
from vllm_toptheta.store.shadow import ShadowKeys
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
            largest score.
        score_std: The same shape, its standard deviation; both are zero in a bucket without rows.
        expectations: What the thresholds keep and lose; None where nothing was measured.
        shadow_keys: What mode `shadow` needs, or None; `shadow` is the same and refuses None.
    """

    folder: Path
    manifest: Manifest
    coefficients: NDArray[np.float32]
    bucket_edges: NDArray[np.int32]
    row_count: NDArray[np.int64]
    score_mean: NDArray[np.float32]
    score_std: NDArray[np.float32]
    expectations: Expectations | None
    shadow_keys: ShadowKeys | None = None

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
                remedy="Calibrate the model again, with --mode shadow (toptheta calibrate --help)",
            )
        return self.shadow_keys

    def curve(self, target_k: int) -> ThresholdCurve:
        """Return theta(n) for a constant k, interpolated between the two calibrated neighbours if need be.

        Raises:
            TargetOutOfRange: `target_k` lies outside the calibrated ks.
        """
        lower, upper, weight = locate_k(self.manifest, target_k, folder=self.folder)
        if lower == upper:
            return self._calibrated_curve(lower)
        return interpolate(self._calibrated_curve(lower), self._calibrated_curve(upper), target_k, weight)

    def curve_of(self, label: str) -> ThresholdCurve:
        """Return theta(n) for a target by its label, such as k:64.

        Raises:
            SettingsError: It is no label.
            TargetOutOfRange: It lies outside the calibrated ks.
        """
        return self.curve(TargetSpec.parse(label).k)

    def _calibrated_curve(self, index: int) -> ThresholdCurve:
        target = self.manifest.targets[index]
        return ThresholdCurve(
            dense_length=target.k,
            coefficients=self.coefficients[:, :, index],
            min_length=target.min_length,
            max_length=target.max_length,
            label=target.label,
            placement=self.manifest.placement,
            expectations=None if self.expectations is None else self.expectations.of_target(index),
            bucket_edges=self.bucket_edges,
        )
