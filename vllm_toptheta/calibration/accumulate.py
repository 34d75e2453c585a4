"""Mean and standard deviation of k-th largest scores, by layer, head, target k and length of the row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_toptheta.calibration.sampling import bucket_of

__all__ = ["KthScoreStatistics", "Moments"]


@dataclass(frozen=True)
class Moments:
    """What is known of the k-th largest scores, once all rows are in.

    Attributes:
        row_count: `[num_targets, num_buckets]` int64, rows seen by each head of each observed layer.
        log_length: `[num_targets, num_buckets]` float64, mean of ln n over those rows; 0 without rows.
        mean: `[num_layers, num_heads, num_targets, num_buckets]` float64, in the unit of the placement; 0 without rows.
        std: like `mean`; over the rows themselves (division by their number).
        observed_layers: layers that reported rows.
    """

    row_count: NDArray[np.int64]
    log_length: NDArray[np.float64]
    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    observed_layers: tuple[int, ...]


class KthScoreStatistics:
    """Merges rows into counts, means and sums of squared deviations, in float64.

    The merge is the pairwise one of Chan, Golub and LeVeque (Updating Formulae and a Pairwise Algorithm for Computing
    Sample Variances, 1979), which does not cancel as sums of squares do.

    Args:
        num_layers: layers of the model.
        num_heads: query heads of a layer.
        target_ks: the k observed, as `add` counts them.
        bucket_edges: `[num_buckets + 1]`, as `length_buckets` returns them.
    """

    def __init__(
        self, *, num_layers: int, num_heads: int, target_ks: Sequence[int], bucket_edges: NDArray[np.int32]
    ) -> None:
        num_targets, num_buckets = len(target_ks), len(bucket_edges) - 1
        self._target_ks = tuple(target_ks)
        self._edges = bucket_edges
        self._count = np.zeros((num_layers, num_targets, num_buckets), np.int64)
        self._log_length_sum = np.zeros((num_layers, num_targets, num_buckets))
        self._mean = np.zeros((num_layers, num_heads, num_targets, num_buckets))
        self._squares = np.zeros_like(self._mean)

    @property
    def state(self) -> Mapping[str, NDArray[np.float64] | NDArray[np.int64]]:
        """The arrays that hold everything, by name; writing into them restores an earlier state."""
        return {
            "count": self._count,
            "log_length_sum": self._log_length_sum,
            "mean": self._mean,
            "squares": self._squares,
        }

    def add(
        self, layer_idx: int, target_index: int, kth_scores: NDArray[np.float32], lengths: NDArray[np.int64]
    ) -> None:
        """Merges rows of one sequence; rows that see at most k keys are not rows of the target and are left out.

        Args:
            layer_idx: the layer.
            target_index: which of the target ks.
            kth_scores: `[num_heads, num_rows]`, scaled logits.
            lengths: `[num_rows]` ascending, the keys that the rows see; those outside the buckets are left out.
        """
        shortest = max(self._target_ks[target_index] + 1, int(self._edges[0]))
        first, end = np.searchsorted(lengths, [shortest, int(self._edges[-1])])
        lengths, scores = lengths[first:end], kth_scores[:, first:end].astype(np.float64)
        bucket = bucket_of(lengths, self._edges)
        membership = np.zeros((len(lengths), len(self._edges) - 1))
        membership[np.arange(len(lengths)), bucket] = 1.0

        added = membership.sum(axis=0)
        added_mean = scores @ membership / np.maximum(added, 1)
        added_squares = (scores - added_mean[:, bucket]) ** 2 @ membership

        place = (layer_idx, slice(None), target_index)
        before = self._count[layer_idx, target_index]
        share = added / np.maximum(before + added, 1)
        difference = added_mean - self._mean[place]
        self._mean[place] += difference * share
        self._squares[place] += added_squares + difference**2 * before * share
        self._count[layer_idx, target_index] += added.astype(np.int64)
        self._log_length_sum[layer_idx, target_index] += np.log(lengths) @ membership

    @property
    def observed_layers(self) -> tuple[int, ...]:
        """Layers that have rows, ascending."""
        return tuple(int(layer) for layer in np.flatnonzero(self._count.any(axis=(1, 2))))

    def moments(self) -> Moments:
        """Returns the statistics of all rows added so far.

        Raises:
            ValueError: no rows were added, or not the same ones to every layer that has any.
        """
        observed = self.observed_layers
        if not observed or (self._count[list(observed)] != self._count[observed[0]]).any():
            raise ValueError("every observed layer must see the same rows, and one at least")
        row_count = self._count[observed[0]]
        per_row = np.maximum(row_count, 1)
        return Moments(
            row_count=row_count,
            log_length=self._log_length_sum[observed[0]] / per_row,
            mean=self._mean.copy(),
            std=np.sqrt(self._squares / per_row),
            observed_layers=observed,
        )
