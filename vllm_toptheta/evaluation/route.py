"""Sparse attention over a whole text at once, and the count of what its rows read and lost."""

import torch
from torch import Tensor

from vllm_toptheta.calibration.route import DenseRoute, block_bytes_on, row_blocks
from vllm_toptheta.evaluation.sparse import SparseAttention
from vllm_toptheta.reference import AttentionResult

__all__ = ["ReadCounts", "SparseRoute"]


class ReadCounts:
    """What the thresholded rows of the sparse layers read and lost.

    Args:
        max_length: keys of the longest row.
    """

    def __init__(self, max_length: int) -> None:
        self._num_rows = 0
        self._num_thresholded = 0
        self._value_rows_read = 0
        self._value_rows_cached = 0
        self._attention_elements = 0
        self._lost_mass = 0.0
        # how many rows of query heads keep 0, 1, 2... keys
        self._rows_by_survivors = torch.zeros(max_length + 1, dtype=torch.int64)

    def add(self, result: AttentionResult, *, start: int) -> None:
        """Counts the rows of a result.

        Args:
            result: of consecutive rows.
            start: keys that come before the first of them.
        """
        thresholded = result.thresholded
        self._num_rows += len(thresholded)
        rows_read, survivors = result.value_rows_read[thresholded], result.num_survivors[thresholded]
        num_keys = int((start + 1 + thresholded.nonzero()).sum())
        self._num_thresholded += len(survivors)
        self._value_rows_read += int(rows_read.sum())
        self._value_rows_cached += num_keys * rows_read.shape[1]
        self._attention_elements += num_keys * survivors.shape[1]
        self._lost_mass += float(result.lost_mass[thresholded].double().sum())
        self._rows_by_survivors += torch.bincount(survivors.flatten().cpu(), minlength=len(self._rows_by_survivors))

    @property
    def thresholded_share(self) -> float:
        """Thresholded rows over all rows; 0 without rows."""
        return self._num_thresholded / max(self._num_rows, 1)

    @property
    def value_rows_share(self) -> float:
        """Value rows that a kv head reads over those cached, both summed over thresholded rows; 0 without any."""
        return self._value_rows_read / max(self._value_rows_cached, 1)

    @property
    def attention_elements_share(self) -> float:
        """Keys that a query head keeps over those it sees, both summed over thresholded rows; 0 without any."""
        return self._num_survivors / max(self._attention_elements, 1)

    @property
    def mean_lost_mass(self) -> float:
        """Mean lost mass of a thresholded row and query head."""
        return self._lost_mass / self._num_head_rows

    @property
    def mean_survivors(self) -> float:
        """Mean survivors of a thresholded row and query head."""
        return self._num_survivors / self._num_head_rows

    @property
    def p95_survivors(self) -> int:
        """The least number of survivors that 95 % of thresholded rows and query heads do not exceed."""
        cumulative = self._rows_by_survivors.cumsum(0)
        return int((cumulative < 0.95 * cumulative[-1]).sum())

    @property
    def _num_survivors(self) -> int:
        return int((self._rows_by_survivors * torch.arange(len(self._rows_by_survivors))).sum())

    @property
    def _num_head_rows(self) -> int:
        return max(int(self._rows_by_survivors.sum()), 1)


class SparseRoute(DenseRoute):
    """Sparse attention in the sparse layers, dense attention in the others; every row as a decode step would have it.

    Args:
        attention: the variant.
        num_prompt_tokens: tokens of the sequence that are its prompt.
        counts: what is read and lost is added there.
    """

    def __init__(self, attention: SparseAttention, *, num_prompt_tokens: int = 0, counts: ReadCounts) -> None:
        self.attention = attention
        self.num_prompt_tokens = num_prompt_tokens
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
        if layer_idx in self.attention.dense_layers:
            return super().attend(layer_idx, query, key, value, softmax_scale=softmax_scale, soft_cap=soft_cap)
        seq_len, num_heads, _ = query.shape
        outputs = []
        for start, stop in row_blocks(num_heads, seq_len, block_bytes_on(query.device)):
            result = self.attention.attend(
                layer_idx,
                query[start:stop],
                key[:stop],
                value[:stop],
                softmax_scale=softmax_scale,
                soft_cap=soft_cap,
                num_prompt_tokens=self.num_prompt_tokens,
            )
            outputs.append(result.output)
            self.counts.add(result, start=start)
        return torch.cat(outputs)
