"""Top-Theta attention over a whole text, every row thresholded as a decode step of its length would be."""

from collections.abc import Collection

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_toptheta.calibration.route import DenseRoute, row_blocks
from vllm_toptheta.reference import AttentionResult, Compensation, Placement, top_theta_attention

__all__ = ["ReadCounts", "TopThetaRoute"]


class ReadCounts:
    """What the thresholded rows (those that see more than k keys) of the sparse layers read and lost.

    Args:
        max_length: keys of the longest row.
    """

    def __init__(self, max_length: int) -> None:
        self._value_rows_read = 0
        self._value_rows_cached = 0
        self._lost_mass = 0.0
        self._rows_by_survivors = torch.zeros(max_length + 1, dtype=torch.int64)

    def add(self, result: AttentionResult, *, start: int, target_k: int) -> None:
        """Counts the thresholded rows of a result.

        Args:
            result: of consecutive rows.
            start: keys that come before the first of them.
            target_k: k; rows that see at most that many keys are not thresholded.
        """
        lengths = torch.arange(start + 1, start + 1 + len(result.output))
        thresholded = slice(int((lengths <= target_k).sum()), None)
        rows_read = result.value_rows_read[thresholded]
        self._value_rows_read += int(rows_read.sum())
        self._value_rows_cached += int(lengths[thresholded].sum()) * rows_read.shape[1]
        self._lost_mass += float(result.lost_mass[thresholded].double().sum())
        survivors = result.num_survivors[thresholded].flatten().cpu()
        self._rows_by_survivors += torch.bincount(survivors, minlength=len(self._rows_by_survivors))

    @property
    def value_rows_share(self) -> float:
        """Value rows read by a kv head over value rows cached, both summed over rows; 0 without rows."""
        return self._value_rows_read / max(self._value_rows_cached, 1)

    @property
    def mean_lost_mass(self) -> float:
        """Mean lost mass of a row and query head."""
        return self._lost_mass / self._num_rows

    @property
    def mean_survivors(self) -> float:
        """Mean survivors of a row and query head."""
        return float((self._rows_by_survivors * torch.arange(len(self._rows_by_survivors))).sum()) / self._num_rows

    @property
    def p95_survivors(self) -> int:
        """The least number of survivors that 95 % of rows and query heads do not exceed."""
        cumulative = self._rows_by_survivors.cumsum(0)
        return int((cumulative < 0.95 * cumulative[-1]).sum())

    @property
    def _num_rows(self) -> int:
        return max(int(self._rows_by_survivors.sum()), 1)


class TopThetaRoute(DenseRoute):
    """Top-Theta attention in the sparse layers, dense attention in the others.

    Args:
        thresholds: `[max_length + 1, num_layers, num_heads]` float32, row n holds theta(n).
        target_k: rows that see at most this many keys are dense.
        dense_layers: layers that are dense.
        placement: what the thresholds apply to.
        compensation: what makes up for the discarded keys.
        counts: what is read and lost is added there.
    """

    def __init__(
        self,
        thresholds: NDArray[np.float32],
        *,
        target_k: int,
        dense_layers: Collection[int],
        placement: Placement,
        compensation: Compensation,
        counts: ReadCounts,
    ) -> None:
        self.thresholds = torch.from_numpy(thresholds)
        self.target_k = target_k
        self.dense_layers = frozenset(dense_layers)
        self.placement = placement
        self.compensation = compensation
        self.counts = counts

    def attend(
        self,
        layer_idx: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        softmax_scale: float,
        soft_cap: float | None,
    ) -> Tensor:
        """See `AttentionRoute.attend`."""
        if layer_idx in self.dense_layers:
            return super().attend(layer_idx, query, key, value, softmax_scale=softmax_scale, soft_cap=soft_cap)
        seq_len, num_heads, _ = query.shape
        outputs = []
        for start, stop in row_blocks(num_heads, seq_len):
            result = top_theta_attention(
                query[start:stop],
                key[:stop],
                value[:stop],
                threshold=self.thresholds[start + 1 : stop + 1, layer_idx].to(query.device),
                target_k=self.target_k,
                softmax_scale=softmax_scale,
                placement=self.placement,
                compensation=self.compensation,
                logits_soft_cap=soft_cap,
            )
            outputs.append(result.output)
            self.counts.add(result, start=start, target_k=self.target_k)
        return torch.cat(outputs)
