"""theta(n; k): a short polynomial in the logarithm of the sequence length, per layer and head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, eq=False)
class ThresholdCurve:
    """The thresholds of one target k, as a function of the sequence length.

    Attributes:
        target_k: How many scores should reach the threshold.
        coefficients: [num_layers, num_heads, degree + 1] float32, of ascending powers of ln n.
        min_length: Shortest calibrated row, in tokens.
        max_length: Longest calibrated row, in tokens.
    """

    target_k: int
    coefficients: NDArray[np.float32]
    min_length: int
    max_length: int

    def threshold(self, seq_len: ArrayLike) -> NDArray[np.float32]:
        """Evaluate theta at a sequence length, clamped to the calibrated range.

        Clamping errs less than extrapolating. Rows of at most `target_k` tokens are the caller's to keep dense.

        Args:
            seq_len: Cached keys including the query's own, in tokens; an integer or an array of them.

        Returns:
            [*seq_len.shape, num_layers, num_heads] float32, in the unit of the store's placement: scaled logits
            before the softmax, probabilities after it.
        """
        log_length = np.log(np.clip(np.asarray(seq_len, np.float64), self.min_length, self.max_length))
        log_length = log_length[..., np.newaxis, np.newaxis]
        coefficients = self.coefficients.astype(np.float64)
        value: NDArray[Any] = np.zeros(())
        for power in reversed(range(coefficients.shape[-1])):
            value = value * log_length + coefficients[..., power]
        return value.astype(np.float32)


def interpolate(lower: ThresholdCurve, upper: ThresholdCurve, target_k: int) -> ThresholdCurve:
    """Return the curve between two calibrated ones, linear in ln k, on the lengths that both cover."""
    weight = np.log(target_k / lower.target_k) / np.log(upper.target_k / lower.target_k)
    coefficients = (1 - weight) * lower.coefficients.astype(np.float64) + weight * upper.coefficients
    return ThresholdCurve(
        target_k=target_k,
        coefficients=_read_only(coefficients.astype(np.float32)),
        min_length=max(lower.min_length, upper.min_length),
        max_length=min(lower.max_length, upper.max_length),
    )


def _read_only(array: NDArray[np.float32]) -> NDArray[np.float32]:
    array.flags.writeable = False
    return array
