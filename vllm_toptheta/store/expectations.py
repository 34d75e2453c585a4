"""What the paper's compensations need to know of discarded scores: measured with the thresholds applied as when served.

`reference.Compensation` takes it: `offline`, and `exp_threshold` with its scale r.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

ExpectationName = Literal["offline_sum", "exp_threshold_scale"]


@dataclass(frozen=True, eq=False)
class Expectations:
    """Statistics over measured rows, by head and length bucket.

    Shapes are those of all targets; without the axis of targets they are those of one.

    Attributes:
        measured_rows: `[num_targets, num_buckets]` int64, rows behind each number; all others are zero without rows.
        offline_sum: `[num_layers, num_heads, num_targets, num_buckets]` float32, mean of sum exp(s - m) over the
            discarded scores s of a row, m its largest score.
        exp_threshold_scale: The same shape, r = mean of exp(s - theta) over discarded scores.
    """

    measured_rows: NDArray[np.int64]
    offline_sum: NDArray[np.float32]
    exp_threshold_scale: NDArray[np.float32]

    def of_target(self, index: int) -> Self:
        """Return those of one target, as views."""
        return self._map(lambda array: array[..., index, :])

    def blend(self, other: Self, weight: float) -> Self:
        """Return (1 - weight) * self + weight * other; a bucket that only one of them measured takes that one's."""
        first, second = self.measured_rows > 0, other.measured_rows > 0
        share = np.where(first & second, weight, np.where(second, 1.0, 0.0))
        names = [field.name for field in fields(self) if field.name != "measured_rows"]
        mixed = {
            name: ((1 - share) * getattr(self, name) + share * getattr(other, name)).astype(np.float32)
            for name in names
        }
        return type(self)(measured_rows=self.measured_rows + other.measured_rows, **mixed)

    def at(self, name: ExpectationName, seq_len: ArrayLike, bucket_edges: NDArray[np.int32]) -> NDArray[np.float32]:
        """Look up one target's statistic by length; a length in no measured bucket takes the nearest one.

        Args:
            name: Which attribute.
            seq_len: Cached keys including the query's own, in tokens; an integer or an array of them.
            bucket_edges: `[num_buckets + 1]`, those of the store.

        Returns:
            `[*seq_len.shape, num_layers, num_heads]` float32.
        """
        measured = np.flatnonzero(self.measured_rows)
        bucket = np.searchsorted(bucket_edges, np.asarray(seq_len), side="right") - 1
        nearest = measured[np.abs(bucket[..., np.newaxis] - measured).argmin(axis=-1)]
        return np.moveaxis(getattr(self, name)[:, :, nearest], (0, 1), (-2, -1))

    def _map(self, function: Callable[[NDArray[Any]], NDArray[Any]]) -> Self:
        return type(self)(**{field.name: function(getattr(self, field.name)) for field in fields(self)})


EXPECTATION_NAMES = tuple(field.name for field in fields(Expectations))
