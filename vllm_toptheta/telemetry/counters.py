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
        decode_tokens: Tokens decoded.
        dense_tokens: Those among them whose context was too short for thresholds.
        rows_cached: Value rows in the cache, summed over tokens.
        rows_read: [num_kv_heads] int64, value rows fetched, summed over tokens.
        lost_mass: [num_kv_heads] float64, lost softmax mass summed over tokens and the kv head's query heads.
    """

    layer: int
    kv_heads: list[int]
    num_queries_per_kv: int
    decode_tokens: int = 0
    dense_tokens: int = 0
    rows_cached: int = 0
    rows_read: torch.Tensor = field(init=False)
    lost_mass: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.rows_read = torch.zeros(len(self.kv_heads), dtype=torch.int64)
        self.lost_mass = torch.zeros(len(self.kv_heads), dtype=torch.float64)

    def add(
        self, *, tokens: int, dense_tokens: int, rows_cached: int, rows_read: torch.Tensor, lost_mass: torch.Tensor
    ) -> None:
        """Count one step.

        Args:
            tokens: Decode tokens of the step.
            dense_tokens: Those whose context was too short for thresholds.
            rows_cached: Sum of their context lengths.
            rows_read: [tokens, num_kv_heads] int64.
            lost_mass: [tokens, num_heads] float32.
        """
        self.decode_tokens += tokens
        self.dense_tokens += dense_tokens
        self.rows_cached += rows_cached
        self.rows_read += rows_read.sum(dim=0)
        self.lost_mass += lost_mass.view(tokens, len(self.kv_heads), -1).sum(dim=(0, 2))

    def snapshot(self) -> list[dict[str, Any]]:
        """One plain record per kv head, in the fields of `stats.HeadStats`."""
        return [
            {
                "layer": self.layer,
                "kv_head": kv_head,
                "decode_tokens": self.decode_tokens,
                "dense_tokens": self.dense_tokens,
                "rows_cached": self.rows_cached,
                "rows_read": rows_read,
                "lost_mass_mean": lost_mass / max(1, self.decode_tokens * self.num_queries_per_kv),
            }
            for kv_head, rows_read, lost_mass in zip(
                self.kv_heads, self.rows_read.tolist(), self.lost_mass.tolist(), strict=True
            )
        ]
