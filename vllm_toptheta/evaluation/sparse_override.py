"""Sparse attention over a whole text at once, and the count of what its rows read and lost."""

from typing import Protocol

import torch
from torch import Tensor

from vllm_toptheta.calibration.override import AttentionCall, DenseOverride
from vllm_toptheta.evaluation.sparse import SparseAttention
from vllm_toptheta.reference import AttentionResult

__all__ = ["ReadCounts", "RowCounts", "SparseOverride"]


class RowCounts(Protocol):
    """What takes in the rows of sparse layers."""

    def add(self, layer_idx: int, result: AttentionResult, *, start: int) -> None:
        """Counts the thresholded rows of a result.

        Args:
            layer_idx: their layer.
            result: of consecutive rows, with its survivors.
            start: keys that come before the first of them.
        """


class ReadCounts:
    """What the thresholded rows of the sparse layers read and lost.

    Args:
        max_length: keys of the longest row.
        device: of the results.
    """

    def __init__(self, max_length: int, *, device: torch.device | str = "cpu") -> None:
        # rows; of these thresholded: rows, value rows read, keys read, rows cached, attention elements
        self._totals = torch.zeros(6, dtype=torch.int64, device=device)
        # lost mass as the denominator has it, as it is, and the distance between the two
        self._lost_masses = torch.zeros(3, dtype=torch.float64, device=device)
        # how many thresholded rows of query heads keep 0, 1, 2... keys; behind them, those that are not thresholded
        self._rows_by_survivors = torch.zeros(max_length + 2, dtype=torch.int64, device=device)

    def add(self, layer_idx: int, result: AttentionResult, *, start: int) -> None:
        """See `RowCounts.add`; all layers are one, and the result is not waited for."""
        thresholded, survivors = result.thresholded, result.num_survivors
        row_lengths = torch.arange(start + 1, start + 1 + len(thresholded), device=thresholded.device)
        num_keys = torch.where(thresholded, row_lengths, 0).sum()
        is_thresholded = thresholded[:, None]
        self._totals += torch.stack(
            [
                torch.ones_like(row_lengths).sum(),
                thresholded.sum(),
                torch.where(is_thresholded, result.value_rows_read, 0).sum(),
                torch.where(is_thresholded, result.keys_read, 0).sum(),
                num_keys * result.value_rows_read.shape[1],
                num_keys * survivors.shape[1],
            ]
        )
        known, true = (
            torch.where(is_thresholded, mass, 0.0).double() for mass in (result.lost_mass, result.true_lost_mass)
        )
        self._lost_masses += torch.stack([known.sum(), true.sum(), (known - true).abs().sum()])
        bins = torch.where(is_thresholded, survivors, len(self._rows_by_survivors) - 1).flatten()
        self._rows_by_survivors.index_add_(0, bins, torch.ones_like(bins))

    @property
    def thresholded_share(self) -> float:
        """Thresholded rows over all rows; 0 without rows."""
        return int(self._totals[1]) / max(int(self._totals[0]), 1)

    @property
    def value_rows_share(self) -> float:
        """Value rows that a kv head reads over those cached, both summed over thresholded rows; 0 without any."""
        return int(self._totals[2]) / max(int(self._totals[4]), 1)

    @property
    def keys_share(self) -> float:
        """Keys that a kv head reads exactly over those cached, both summed over thresholded rows; 0 without any."""
        return int(self._totals[3]) / max(int(self._totals[4]), 1)

    @property
    def attention_elements_share(self) -> float:
        """Keys that a query head keeps over those it sees, both summed over thresholded rows; 0 without any."""
        return self._num_survivors / max(int(self._totals[5]), 1)

    @property
    def mean_lost_mass(self) -> float:
        """Mean lost mass of a thresholded row and query head, as its softmax denominator has it."""
        return float(self._lost_masses[0]) / self._num_head_rows

    @property
    def mean_true_lost_mass(self) -> float:
        """Mean share of the dense softmax that does not survive, of a thresholded row and query head."""
        return float(self._lost_masses[1]) / self._num_head_rows

    @property
    def mean_lost_mass_error(self) -> float:
        """Mean distance between the two, of a thresholded row and query head."""
        return float(self._lost_masses[2]) / self._num_head_rows

    @property
    def mean_survivors(self) -> float:
        """Mean survivors of a thresholded row and query head."""
        return self._num_survivors / self._num_head_rows

    @property
    def p95_survivors(self) -> int:
        """The least number of survivors that 95 % of thresholded rows and query heads do not exceed."""
        cumulative = self._thresholded_by_survivors.cumsum(0)
        return int((cumulative < 0.95 * cumulative[-1]).sum())

    @property
    def _thresholded_by_survivors(self) -> Tensor:
        return self._rows_by_survivors[:-1].cpu()

    @property
    def _num_survivors(self) -> int:
        rows = self._thresholded_by_survivors
        return int((rows * torch.arange(len(rows))).sum())

    @property
    def _num_head_rows(self) -> int:
        return max(int(self._thresholded_by_survivors.sum()), 1)


class SparseOverride(DenseOverride):
    """Sparse attention in the sparse layers, dense attention in the others; every row as a decode step would have it.

    Args:
        attention: the variant.
        num_prompt_tokens: tokens of the sequence that are its prompt.
        counts: what takes in the results.
    """

    def __init__(self, attention: SparseAttention, *, num_prompt_tokens: int = 0, counts: RowCounts) -> None:
        self.attention = attention
        self.num_prompt_tokens = num_prompt_tokens
        self.counts = counts

    def attend(self, call: AttentionCall) -> Tensor:
        """See `AttentionOverride.attend`."""
        if call.layer_idx in self.attention.dense_layers:
            return super().attend(call)
        encoded = self.attention.encode(call)
        outputs = []
        for block in call.blocks():
            result = self.attention.attend(block, num_prompt_tokens=self.num_prompt_tokens, encoded=encoded)
            outputs.append(result.output)
            self.counts.add(block.layer_idx, result, start=block.num_before)
        return torch.cat(outputs)
