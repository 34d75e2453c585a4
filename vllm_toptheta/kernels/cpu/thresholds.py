"""theta and r of sequences, evaluated on the host."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm_toptheta.kernels.contract import LayerThresholds, ShadowLayer
from vllm_toptheta.kernels.cpu.batch import Batch
from vllm_toptheta.limits import MAX_LOG_SCALE


def thresholds_at(
    thresholds: LayerThresholds,
    batch: Batch,
    anchor_scores: Callable[[torch.Tensor], torch.Tensor],
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """theta(n) of every head, [num_seqs, num_heads] float32, scaled logits; minus infinity where every key is kept.

    Args:
        thresholds: Of the layer.
        batch: The sequences.
        anchor_scores: Of positions [num_seqs, NUM_ANCHORS], the scores [num_seqs, num_heads, NUM_ANCHORS]; asked only
            where thresholds are relative. What it says of sequences that keep every key means nothing.
        sinks: As of `Layer`.
    """
    *terms, slope = thresholds.coefficients.unbind(dim=-1)
    log_lengths = batch.seq_lens.float().log() if thresholds.is_relative else batch.log_lengths
    powers = log_lengths[:, None] ** torch.arange(len(terms))
    theta = powers @ torch.stack(terms)
    if thresholds.is_relative:
        theta = theta + slope * anchor_lse(anchor_scores(batch.anchors), sinks)
    theta = theta + batch.offsets[:, None]
    return theta.masked_fill(batch.is_dense, -torch.inf)


def anchor_lse(anchor_scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """ln of the sum of exp(score) over anchors, and the head's sink, [num_seqs, num_heads] float32.

    Args:
        anchor_scores: [num_seqs, num_heads, NUM_ANCHORS] float32.
        sinks: As of `Layer`.
    """
    lse = anchor_scores.logsumexp(dim=-1)
    return lse if sinks is None else torch.logaddexp(lse, sinks.float())


def unread_ratios_at(shadow: ShadowLayer, log_lengths: torch.Tensor) -> torch.Tensor:
    """r(n) of every head, [num_seqs, num_heads] float32, at `log_lengths` [num_seqs]."""
    constant, slope = shadow.log_unread_ratio.unbind(dim=-1)
    return (constant + slope * log_lengths[:, None]).clamp(max=MAX_LOG_SCALE).exp()
