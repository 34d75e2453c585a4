"""theta(n) of one target: a short polynomial in the logarithm of the sequence length, per layer and head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vllm_toptheta.errors import ExpectationsMissing
from vllm_toptheta.store.expectations import ExpectationName, Expectations


@dataclass(frozen=True, eq=False)
class ThresholdCurve:
    """The thresholds of one target, as a function of the sequence length.

    Attributes:
        dense_length: Rows of at most this many tokens are dense: k.
        coefficients: [num_layers, num_heads, degree + 1] float32, of ascending powers of ln n.
        min_length: Shortest calibrated row, in tokens.
        max_length: Longest calibrated row, in tokens.
        label: The target, as `TargetSpec.parse` reads it.
        placement: What the thresholds apply to. After the softmax, the polynomial is that of ln theta.
        expectations: What compensations need; None where nothing was measured.
        bucket_edges: [num_buckets + 1] int32, the lengths that `expectations` belong to; None without them.
    """

    dense_length: int
    coefficients: NDArray[np.float32]
    min_length: int
    max_length: int
    label: str = "unnamed"
    placement: Literal["pre_softmax", "post_softmax"] = "pre_softmax"
    expectations: Expectations | None = None
    bucket_edges: NDArray[np.int32] | None = None

    def threshold(self, seq_len: ArrayLike) -> NDArray[np.float32]:
        """Evaluate theta at a sequence length, clamped to the calibrated range.

        Clamping errs less than extrapolating. Rows of at most `dense_length` tokens are the caller's to keep dense.

        Args:
            seq_len: Cached keys including the query's own, in tokens; an integer or an array of them.

        Returns:
            [*seq_len.shape, num_layers, num_heads] float32, in the unit of the store's placement: scaled logits
            before the softmax, probabilities after it.
        """
        value = self.polynomial(seq_len)
        return np.exp(np.minimum(value, 0.0)) if self.placement == "post_softmax" else value

    def polynomial(self, seq_len: ArrayLike) -> NDArray[np.float32]:
        """Evaluate the polynomial behind `threshold`: theta, or after the softmax its logarithm.

        Args:
            seq_len: As for `threshold`.

        Returns:
            [*seq_len.shape, num_layers, num_heads] float32.
        """
        log_length = np.log(np.clip(np.asarray(seq_len, np.float64), self.min_length, self.max_length))
        log_length = log_length[..., np.newaxis, np.newaxis]
        coefficients = self.coefficients.astype(np.float64)
        value: NDArray[Any] = np.zeros(())
        for power in reversed(range(coefficients.shape[-1])):
            value = value * log_length + coefficients[..., power]
        return value.astype(np.float32)

    def expected(self, name: ExpectationName, seq_len: ArrayLike) -> NDArray[np.float32]:
        """Return what was measured of the discarded scores at calibration, at a sequence length.

        Args:
            name: Which attribute of `Expectations`.
            seq_len: Cached keys including the query's own, in tokens; an integer or an array of them.

        Returns:
            [*seq_len.shape, num_layers, num_heads] float32.

        Raises:
            ExpectationsMissing: The store holds thresholds only.
        """
        if self.expectations is None or self.bucket_edges is None:
            raise ExpectationsMissing(
                "these thresholds came without a measurement of what they discard",
                field=name,
                remedy="Calibrate the model again (toptheta calibrate --help)",
            )
        return self.expectations.at(name, seq_len, self.bucket_edges)


def interpolate(lower: ThresholdCurve, upper: ThresholdCurve, target_k: int, weight: float) -> ThresholdCurve:
    """Return the curve between those of two ks, `weight` of the way up, on the lengths that both cover."""
    coefficients = (1 - weight) * lower.coefficients.astype(np.float64) + weight * upper.coefficients
    expectations = None
    if lower.expectations is not None and upper.expectations is not None:
        expectations = lower.expectations.blend(upper.expectations, weight)
    return ThresholdCurve(
        dense_length=target_k,
        coefficients=_read_only(coefficients.astype(np.float32)),
        min_length=max(lower.min_length, upper.min_length),
        max_length=min(lower.max_length, upper.max_length),
        label=f"k:{target_k}",
        placement=lower.placement,
        expectations=expectations,
        bucket_edges=lower.bucket_edges,
    )


def _read_only(array: NDArray[np.float32]) -> NDArray[np.float32]:
    array.flags.writeable = False
    return array
