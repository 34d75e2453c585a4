"""theta and r of a sequence, on the device."""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_toptheta.kernels.gpu.rules import lengths_of, level_of
from vllm_toptheta.limits import MAX_LOG_SCALE

HIGHEST = tl.constexpr(1.0e30)  # magnitude of a threshold
_MAX_LOG_RATIO = tl.constexpr(MAX_LOG_SCALE)


@triton.jit
def _log_length(tokens, seq, seq_len, min_length, max_length):
    """ln n, clamped as the sequence's rule says."""
    shortest, longest = lengths_of(tokens.rules, seq, min_length, max_length)
    return tl.log(tl.minimum(tl.maximum(seq_len, shortest), longest).to(tl.float32))


@triton.jit
def thresholds_of(
    queries, tokens, seq, seq_len, head, mask_g, num_heads, num_seqs, min_length, max_length, NUM_TERMS: tl.constexpr
):
    """Thresholds of a sequence, [G_PAD] float32; rows behind the group's last head keep nothing.

    Args:
        queries, tokens: `Queries`, `Tokens`.
        seq, seq_len: The sequence and its tokens.
        head, mask_g: [G_PAD], query heads of the kv head, and which of them there are.
        num_heads, num_seqs: Of the layer and the step.
        min_length, max_length: Lengths between which thresholds follow the sequence's, without rules.
        NUM_TERMS: Coefficients of a head.
    """
    log_length = _log_length(tokens, seq, seq_len, min_length, max_length)
    level = level_of(tokens.rules, seq, num_seqs)
    coefficients = queries.coefficients + level * (num_heads * NUM_TERMS) + head * NUM_TERMS
    threshold = tl.zeros_like(head).to(tl.float32)
    for power in tl.static_range(NUM_TERMS - 1, -1, -1):
        threshold = threshold * log_length + tl.load(coefficients + power, mask=mask_g, other=0.0)
    # finite, so that differences of two of them are no NaN, and above what is discarded
    threshold = tl.minimum(tl.maximum(threshold, -HIGHEST), HIGHEST)
    return tl.where(mask_g, threshold, HIGHEST)


@triton.jit
def unread_ratios_of(shadow, tokens, seq, seq_len, head, mask_g, num_heads, num_seqs, min_length, max_length):
    """r of a sequence, [G_PAD] float32, from ln r = c_0 + c_1 ln n; 0 behind the group's last head.

    Args:
        shadow: `Shadow`; the others are as for `thresholds_of`.
    """
    log_length = _log_length(tokens, seq, seq_len, min_length, max_length)
    terms = shadow.log_unread_ratio + level_of(tokens.rules, seq, num_seqs) * (num_heads * 2) + head * 2
    constant = tl.load(terms, mask=mask_g, other=0.0)
    slope = tl.load(terms + 1, mask=mask_g, other=0.0)
    ratio = tl.exp(tl.minimum(constant + slope * log_length, _MAX_LOG_RATIO))
    return tl.where(mask_g, ratio, 0.0)
