"""Counters of one layer on one rank, kept on the device and read only when somebody asks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_toptheta.limits import LOST_MASS_EDGES, NUM_LOST_MASS_BUCKETS

# what `bucketize` compares with: the last bucket has no upper edge of its own, since no mass exceeds 1
_INNER_EDGES = torch.tensor(LOST_MASS_EDGES[:-1])
MAX_PENDING = 64  # steps on the CPU that are counted at once


@dataclass
class LayerCounters:
    """Sums over the decode tokens that a layer has seen since the server started.

    vLLM makes them in inference mode, where alone they may be written, but warms up and asks for them outside of it.

    Attributes:
        layer: The layer's index in the model.
        kv_heads: Global indices of this rank's kv heads.
        num_queries_per_kv: Query heads that share one kv head.
        device: Where the buffers live; kernels add to them there.
        counts_keys: Whether keys are skipped, so that those read are counted.
        totals: [5] int64: tokens decoded, those whose context was too short for thresholds, value rows cached, summed
            over tokens, steps that decoded, and tokens decoded as their request asked for; the latter are not among
            those with a short context.
        rows_read: [num_kv_heads] int64, value rows fetched, summed over tokens.
        keys_read: [num_kv_heads] int64, keys fetched, summed over tokens; None where all of them are.
        lost_mass: [num_heads] float64, lost softmax mass summed over tokens whose request asked for nothing.
        lost_mass_histogram: [num_heads, num_buckets] int64, those of them to which thresholds applied, by their lost
            mass; bucket i holds what is at most `LOST_MASS_EDGES[i]` and above the edge before.
    """

    layer: int
    kv_heads: list[int]
    num_queries_per_kv: int
    device: torch.device | str = "cpu"
    counts_keys: bool = False
    totals: torch.Tensor = field(init=False)
    rows_read: torch.Tensor = field(init=False)
    keys_read: torch.Tensor | None = field(init=False, default=None)
    lost_mass: torch.Tensor = field(init=False)
    lost_mass_histogram: torch.Tensor = field(init=False)
    _pending: list[tuple[torch.Tensor, ...]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        num_heads = len(self.kv_heads) * self.num_queries_per_kv
        self.totals = torch.zeros(5, dtype=torch.int64, device=self.device)
        self.rows_read = torch.zeros(len(self.kv_heads), dtype=torch.int64, device=self.device)
        if self.counts_keys:
            self.keys_read = torch.zeros_like(self.rows_read)
        self.lost_mass = torch.zeros(num_heads, dtype=torch.float64, device=self.device)
        self.lost_mass_histogram = torch.zeros(num_heads, NUM_LOST_MASS_BUCKETS, dtype=torch.int64, device=self.device)

    def add(
        self,
        totals: torch.Tensor,
        *,
        is_counted: torch.Tensor,
        rows_read: torch.Tensor,
        lost_mass: torch.Tensor,
        keys_read: torch.Tensor | None = None,
    ) -> None:
        """Remember one step on the CPU, to be counted by `settle`; on GPUs the kernels count.

        Args:
            totals: [5] int64, the step's contribution to `totals`.
            is_counted: [tokens, 1] int64, 1 for a token to which the server's own thresholds applied, else 0.
            rows_read: [tokens, num_kv_heads] int64.
            lost_mass: [tokens, num_heads] float32.
            keys_read: [tokens, num_kv_heads] int64 where keys are counted, else None.
        """
        self._pending.append((totals, is_counted, rows_read, lost_mass, *(() if keys_read is None else (keys_read,))))
        if len(self._pending) == MAX_PENDING:
            self.settle()

    @torch.inference_mode()
    def settle(self) -> None:
        """Count the steps that `add` remembered: many at once cost hardly more than one."""
        if not self._pending:
            return
        totals, counted, rows_read, lost_mass, *keys_read = zip(*self._pending, strict=True)
        self._pending.clear()
        self.totals += torch.stack(totals).sum(dim=0)
        self.rows_read += torch.cat(rows_read).sum(dim=0)
        if self.keys_read is not None:
            self.keys_read += torch.cat(keys_read[0]).sum(dim=0)
        masses, is_counted = torch.cat(lost_mass), torch.cat(counted)
        self.lost_mass += (masses * is_counted).sum(dim=0, dtype=torch.float64)
        buckets = torch.bucketize(masses, _INNER_EDGES)
        self.lost_mass_histogram.scatter_add_(1, buckets.T, is_counted.expand_as(buckets).T)

    @torch.inference_mode()
    def zero_(self) -> None:
        """Start counting anew."""
        self._pending.clear()
        for buffer in (self.totals, self.rows_read, self.keys_read, self.lost_mass, self.lost_mass_histogram):
            if buffer is not None:
                buffer.zero_()

    def heads(self) -> list[dict[str, Any]]:
        """One plain record per kv head, in the fields of `stats.HeadStats`."""
        self.settle()
        decode_tokens, dense_tokens, rows_cached, _, asked_tokens = self.totals.tolist()
        sums = self.lost_mass.view(-1, self.num_queries_per_kv).mean(dim=1)
        keys_read = [None] * len(self.kv_heads) if self.keys_read is None else self.keys_read.tolist()
        lost_mass = (sums / max(1, decode_tokens - dense_tokens - asked_tokens)).tolist()
        return [
            {
                "layer": self.layer,
                "kv_head": kv_head,
                "decode_tokens": decode_tokens,
                "dense_tokens": dense_tokens,
                "asked_tokens": asked_tokens,
                "rows_cached": rows_cached,
                "rows_read": rows_read,
                "keys_read": keys,
                "lost_mass_mean": lost_mass_mean,
            }
            for kv_head, rows_read, keys, lost_mass_mean in zip(
                self.kv_heads, self.rows_read.tolist(), keys_read, lost_mass, strict=True
            )
        ]

    def histogram(self) -> dict[str, Any]:
        """A plain record of the layer's lost mass, in the fields of `stats.LostMass`."""
        self.settle()
        return {
            "layer": self.layer,
            "counts": self.lost_mass_histogram.sum(dim=0).tolist(),
            "sum": float(self.lost_mass.sum()),
        }
