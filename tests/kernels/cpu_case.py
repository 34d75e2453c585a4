"""Decode steps of the CPU kernels, and what each of their sequences read and lost."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from tests.kernels.paged import PagedSequences
from vllm_toptheta.kernels.contract import (
    Counters,
    DecodeStep,
    Layer,
    LayerCache,
    LayerCall,
    LayerThresholds,
    ShadowLayer,
    TierLayer,
)
from vllm_toptheta.kernels.cpu import decode_step, values
from vllm_toptheta.kernels.cpu.batch import prepare_decode
from vllm_toptheta.kernels.cpu.scratch import Counted, CpuScratch


class Decoded(NamedTuple):
    """What a step computed.

    Attributes:
        output: [num_seqs, num_heads, head_size] float32.
        value_rows_read, keys_read, copies_read: [num_seqs, num_kv_heads] int64.
        lost_mass: [num_seqs, num_heads] float32.
    """

    output: torch.Tensor
    value_rows_read: torch.Tensor
    lost_mass: torch.Tensor
    keys_read: torch.Tensor
    copies_read: torch.Tensor | None


class _Recording(CpuScratch):
    """Keeps what a step counts, sequence by sequence."""

    def add(self, counters: Counters | None, counted: Counted) -> None:
        self.counted = counted


def decode(
    query: torch.Tensor,
    paged: PagedSequences,
    threshold: torch.Tensor | None,
    *,
    slope: float = 0.0,
    log_slope: float = 0.0,
    max_dense_len: int = 0,
    threshold_offset: torch.Tensor | None = None,
    codes: torch.Tensor | None = None,
    shadow_layer: ShadowLayer | None = None,
    tier_layer: TierLayer | None = None,
    value_mean: bool = True,
    **layer: Any,
) -> Decoded:
    """One new token per sequence.

    Args:
        query: [num_seqs, num_heads, head_size].
        paged: The sequences.
        threshold: [num_heads] float32, or None for a dense layer.
        slope, log_slope: Of the thresholds over the anchors' log-sum-exp and ln n.
        max_dense_len: Up to which length every key is kept.
        codes, shadow_layer, tier_layer: In mode `shadow`.
        value_mean: Whether the lost mass is given to the mean value.
        layer: Further fields of `Layer`.
    """
    step = DecodeStep(
        paged.block_table, paged.seq_lens.int(), max_dense_len=max_dense_len, threshold_offset=threshold_offset
    )
    thresholds = None
    if threshold is not None:
        zero = torch.zeros_like(threshold)
        coefficients = torch.stack([threshold, zero + log_slope, zero, zero + slope], dim=1)
        thresholds = LayerThresholds(coefficients, is_relative=slope != 0)
    described = Layer(
        **{"softmax_scale": query.shape[-1] ** -0.5, "value_mean_compensation": value_mean, **layer},
        thresholds=thresholds,
        shadow=shadow_layer,
        tiers=tier_layer,
    )
    cache = LayerCache(paged.kv_cache, paged.value_sum if value_mean and threshold is not None else None, codes)
    call = LayerCall(query, torch.full(query.shape, torch.nan), cache, described)
    scratch = _Recording()
    prepared = prepare_decode(step, paged.kv_cache.shape[2])
    decode_step.decode(prepared, call, scratch)
    if scratch.bound is not None:  # compiled code counts by itself
        rows_read, lost_mass = torch.tensor(scratch.bound.value_rows_read), torch.tensor(scratch.bound.lost_mass)
        keys_seen = values.keys_seen(prepared.prepared, described)
        return Decoded(call.output, rows_read, lost_mass, keys_seen[:, None].expand_as(rows_read), None)
    counted = scratch.counted
    return Decoded(call.output, counted.value_rows_read, counted.lost_mass, counted.keys_read, counted.copies_read)
