"""Steps of a layer that are not counted yet: counting many at once costs hardly more than counting one."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from vllm_toptheta.kernels.contract import Counters
from vllm_toptheta.limits import LOST_MASS_EDGES

MAX_PENDING = 64  # steps that are counted at once
# what `bucketize` compares with: the last bucket has no upper edge of its own, since no mass exceeds 1
_INNER_EDGES = torch.tensor(LOST_MASS_EDGES[:-1])


class Counted(NamedTuple):
    """What one step adds to a layer's counters.

    Attributes:
        totals: [5] int64.
        is_counted: [num_seqs, 1] int64, 1 for a token to which the server's own thresholds applied, else 0.
        value_rows_read: [num_seqs, num_kv_heads] int64.
        lost_mass: [num_seqs, num_heads] float32.
        keys_read: [num_seqs, num_kv_heads] int64; all that are cached in mode `values`.
        copies_read: [num_seqs, num_kv_heads] int64, or None where there are none.
    """

    totals: torch.Tensor
    is_counted: torch.Tensor
    value_rows_read: torch.Tensor
    lost_mass: torch.Tensor
    keys_read: torch.Tensor
    copies_read: torch.Tensor | None = None


class CpuScratch:
    """Of one layer.

    Attributes:
        bound: What compiled code needs of the layer in all steps (`compiled.BoundLayer`); None before the first.
    """

    def __init__(self) -> None:
        self._pending: list[Counted] = []
        self.bound: Any = None

    def add(self, counters: Counters | None, counted: Counted) -> None:
        """Remember a step, to be counted by `settle`; without counters, nothing is."""
        if counters is None:
            return
        self._pending.append(counted)
        if len(self._pending) == MAX_PENDING:
            self.settle(counters)

    def settle(self, counters: Counters) -> None:
        """Count the steps that `add` remembered."""
        if not self._pending:
            return
        totals, is_counted, value_rows_read, lost_mass, keys_read, copies_read = zip(*self._pending, strict=True)
        self.forget()
        counters.totals.add_(torch.stack(totals).sum(dim=0))
        counters.value_rows_read.add_(torch.cat(value_rows_read).sum(dim=0))
        if counters.keys_read is not None:
            counters.keys_read.add_(torch.cat(keys_read).sum(dim=0))
        if counters.copies_read is not None and (found := [read for read in copies_read if read is not None]):
            counters.copies_read.add_(torch.cat(found).sum(dim=0))
        masses, tokens = torch.cat(lost_mass), torch.cat(is_counted)
        counters.lost_mass.add_((masses * tokens).sum(dim=0, dtype=torch.float64))
        buckets = torch.bucketize(masses, _INNER_EDGES)
        counters.lost_mass_histogram.scatter_add_(1, buckets.T, tokens.expand_as(buckets).T)

    def forget(self) -> None:
        """Count none of them."""
        self._pending.clear()
