"""Counters of one layer on one rank, kept on the device and read only when somebody asks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_toptheta.kernels.contract import Counters
from vllm_toptheta.kernels.cpu.scratch import CpuScratch


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
        counts_copies: Whether there are copies of values, so that those read are counted.
        buffers: The sums; on CPUs without the steps in `scratch`.
        scratch: Steps on the CPU that are not counted yet.
    """

    layer: int
    kv_heads: list[int]
    num_queries_per_kv: int
    device: torch.device | str = "cpu"
    counts_keys: bool = False
    counts_copies: bool = False
    buffers: Counters = field(init=False)
    scratch: CpuScratch = field(init=False, default_factory=CpuScratch)

    def __post_init__(self) -> None:
        num_kv_heads = len(self.kv_heads)
        num_heads = num_kv_heads * self.num_queries_per_kv
        self.buffers = Counters.allocate(
            num_heads,
            num_kv_heads,
            self.device,
            counts_keys=self.counts_keys,
            counts_copies=self.counts_copies,
        )

    @torch.inference_mode()
    def settled(self) -> Counters:
        """The sums, all steps counted."""
        self.scratch.settle(self.buffers)
        return self.buffers

    @torch.inference_mode()
    def zero_(self) -> None:
        """Start counting anew."""
        self.scratch.forget()
        self.buffers.zero_()

    def heads(self) -> list[dict[str, Any]]:
        """One plain record per kv head, in the fields of `stats.HeadStats`."""
        counted = self.settled()
        decode_tokens, dense_tokens, rows_cached, _, asked_tokens = counted.totals.tolist()
        sums = counted.lost_mass.view(-1, self.num_queries_per_kv).mean(dim=1)
        keys_read, copies_read = (
            [None] * len(self.kv_heads) if counter is None else counter.tolist()
            for counter in (counted.keys_read, counted.copies_read)
        )
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
                "copies_read": copies,
                "lost_mass_mean": lost_mass_mean,
            }
            for kv_head, rows_read, keys, copies, lost_mass_mean in zip(
                self.kv_heads, counted.value_rows_read.tolist(), keys_read, copies_read, lost_mass, strict=True
            )
        ]

    def histogram(self) -> dict[str, Any]:
        """A plain record of the layer's lost mass, in the fields of `stats.LostMass`."""
        counted = self.settled()
        return {
            "layer": self.layer,
            "counts": counted.lost_mass_histogram.sum(dim=0).tolist(),
            "sum": float(counted.lost_mass.sum()),
        }
