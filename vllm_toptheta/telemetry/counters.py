"""Counters of one layer on one rank, kept on the device and read only when somebody asks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class LayerCounters:
    """Sums over the decode tokens that a layer has seen since the server started.

    Attributes:
        layer: The layer's index in the model.
        kv_heads: Global indices of this rank's kv heads.
        num_queries_per_kv: Query heads that share one kv head.
        device: Where the buffers live; kernels add to them there.
        totals: [3] int64: tokens decoded, those whose context was too short for thresholds, and value rows cached,
            summed over tokens.
        rows_read: [num_kv_heads] int64, value rows fetched, summed over tokens.
        lost_mass: [num_heads] float64, lost softmax mass summed over tokens.
    """

    layer: int
    kv_heads: list[int]
    num_queries_per_kv: int
    device: torch.device | str = "cpu"
    totals: torch.Tensor = field(init=False)
    rows_read: torch.Tensor = field(init=False)
    lost_mass: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        num_heads = len(self.kv_heads) * self.num_queries_per_kv
        self.totals = torch.zeros(3, dtype=torch.int64, device=self.device)
        self.rows_read = torch.zeros(len(self.kv_heads), dtype=torch.int64, device=self.device)
        self.lost_mass = torch.zeros(num_heads, dtype=torch.float64, device=self.device)

    def add(self, totals: torch.Tensor, *, rows_read: torch.Tensor, lost_mass: torch.Tensor) -> None:
        """Count one step.

        Args:
            totals: [3] int64, the step's contribution to `totals`.
            rows_read: [tokens, num_kv_heads] int64.
            lost_mass: [tokens, num_heads] float32.
        """
        self.totals += totals
        self.rows_read += rows_read.sum(dim=0)
        self.lost_mass += lost_mass.sum(dim=0)

    def zero_(self) -> None:
        """Start counting anew."""
        for buffer in (self.totals, self.rows_read, self.lost_mass):
            buffer.zero_()

    def snapshot(self) -> list[dict[str, Any]]:
        """One plain record per kv head, in the fields of `stats.HeadStats`."""
        decode_tokens, dense_tokens, rows_cached = self.totals.tolist()
        lost_mass = self.lost_mass.view(-1, self.num_queries_per_kv).mean(dim=1) / max(1, decode_tokens)
        return [
            {
                "layer": self.layer,
                "kv_head": kv_head,
                "decode_tokens": decode_tokens,
                "dense_tokens": dense_tokens,
                "rows_cached": rows_cached,
                "rows_read": rows_read,
                "lost_mass_mean": lost_mass_mean,
            }
            for kv_head, rows_read, lost_mass_mean in zip(
                self.kv_heads, self.rows_read.tolist(), lost_mass.tolist(), strict=True
            )
        ]
