"""theta and r of a sequence, on the device (`kernels.contract` has the formula)."""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_toptheta.limits import MAX_LOG_SCALE

HIGHEST = tl.constexpr(1.0e30)  # magnitude of a threshold
_MAX_LOG_RATIO = tl.constexpr(MAX_LOG_SCALE)


@triton.jit
def offset_of(tokens, seq, num_seqs):
    """What is added to the thresholds of sequences, a scalar or a tensor like `seq`; 0 behind the last one."""
    if tokens.threshold_offset is None:
        return tl.zeros_like(seq).to(tl.float32)
    else:
        return tl.load(tokens.threshold_offset + seq, mask=seq < num_seqs, other=0.0)


@triton.jit
def keeps_all(tokens, seq, seq_len, num_seqs, max_dense_len):
    """Whether sequences keep every key, a scalar or a tensor like `seq`."""
    is_dense = seq_len <= max_dense_len
    if tokens.threshold_offset is not None:
        is_dense = is_dense | (offset_of(tokens, seq, num_seqs) == float("-inf"))
    return is_dense


@triton.jit
def log_length_of(seq_len, min_length, max_length):
    """ln n, clamped to the calibrated lengths."""
    return tl.log(tl.minimum(tl.maximum(seq_len, min_length), max_length).to(tl.float32))


@triton.jit
def load_thresholds(queries, token, head, mask_g):
    """Thresholds of new tokens as `threshold_kernel` left them, [G_PAD] float32; none reach those behind the last head.

    Args:
        queries: `Queries`.
        token: The token of the step, a scalar or [G_PAD].
        head, mask_g: [G_PAD], query heads of a kv head, and which of them there are.
    """
    return tl.load(queries.thresholds + token.to(tl.int64) * queries.num_heads + head, mask=mask_g, other=HIGHEST)


@triton.jit
def unread_ratios_of(shadow, seq_len, head, mask_g, min_length, max_length):
    """r of a sequence, [G_PAD] float32, from ln r = c_0 + c_1 ln n; 0 behind the group's last head.

    Args:
        shadow: `Shadow`.
        seq_len: Tokens of the sequence.
        head, mask_g: As for `load_thresholds`.
        min_length, max_length: Lengths between which calibrated curves follow the sequence's.
    """
    terms = shadow.log_unread_ratio + head * 2
    constant = tl.load(terms, mask=mask_g, other=0.0)
    slope = tl.load(terms + 1, mask=mask_g, other=0.0)
    ratio = tl.exp(tl.minimum(constant + slope * log_length_of(seq_len, min_length, max_length), _MAX_LOG_RATIO))
    return tl.where(mask_g, ratio, 0.0)
