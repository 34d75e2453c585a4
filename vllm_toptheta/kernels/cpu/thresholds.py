"""theta and r of sequences and of a prompt's tokens, evaluated on the host."""

from __future__ import annotations

import torch

from vllm_toptheta.kernels.contract import LayerThresholds, ShadowLayer
from vllm_toptheta.limits import MAX_LOG_SCALE


def thresholds_at(
    thresholds: LayerThresholds, log_lengths: torch.Tensor, levels: torch.Tensor | int, is_dense: torch.Tensor
) -> torch.Tensor:
    """theta(n) of every head, [num_rows, num_heads] float32, scaled logits; minus infinity in rows that keep every key.

    Args:
        thresholds: Of the layer.
        log_lengths: [num_rows] float32, ln n, clamped to the calibrated lengths.
        levels: [num_rows] int64, or the one of all rows.
        is_dense: [num_rows, 1] bool.
    """
    coefficients = thresholds.coefficients
    powers = log_lengths[:, None] ** torch.arange(coefficients.shape[-1])
    if isinstance(levels, int):
        theta = powers @ coefficients[levels].T
    else:
        theta = torch.bmm(coefficients[levels], powers[:, :, None])[:, :, 0]
    return theta.masked_fill(is_dense, -torch.inf)


def unread_ratios_at(shadow: ShadowLayer, log_lengths: torch.Tensor, levels: torch.Tensor | int) -> torch.Tensor:
    """r(n) of every head, [num_rows, num_heads] float32; the arguments are those of `thresholds_at`."""
    constant, slope = shadow.log_unread_ratio[levels].unbind(dim=-1)
    return (constant + slope * log_lengths[:, None]).clamp(max=MAX_LOG_SCALE).exp()
