"""theta and r of a sequence, on the device (`kernels.contract` has the formula)."""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_toptheta.kernels.contract import NUM_COEFFICIENTS
from vllm_toptheta.kernels.gpu.tiles import DISCARDED, LOG2_E, tile_scores
from vllm_toptheta.limits import MAX_LOG_SCALE, NUM_ANCHORS, NUM_FIRST_ANCHORS

HIGHEST = tl.constexpr(1.0e30)  # magnitude of a threshold
_MAX_LOG_RATIO = tl.constexpr(MAX_LOG_SCALE)
_COEFFICIENTS = tl.constexpr(NUM_COEFFICIENTS)
_NUM_ANCHORS = tl.constexpr(NUM_ANCHORS)
_FIRST_ANCHORS = tl.constexpr(NUM_FIRST_ANCHORS)
_ANCHOR_TILE = tl.constexpr(64)


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
def _log_length(seq_len, min_length, max_length):
    """ln n, clamped to the calibrated lengths."""
    return tl.log(tl.minimum(tl.maximum(seq_len, min_length), max_length).to(tl.float32))


@triton.jit
def _anchor_lse(query, tokens, key_base, block_row, seq_len, scale, soft_cap, shape):
    """ln of the sum of exp(score) over a sequence's anchors, [G_PAD] float32.

    Whoever computes it gets the same bits: a fixed order, whatever part of the sequence a program has.
    """
    maximum = tl.full((query.shape[1],), DISCARDED, dtype=tl.float32)
    total = tl.zeros((query.shape[1],), dtype=tl.float32)
    for first in tl.range(0, _NUM_ANCHORS, _ANCHOR_TILE, num_stages=1):
        anchor = first + tl.arange(0, _ANCHOR_TILE)
        valid = anchor < _NUM_ANCHORS
        position = tl.where(anchor < _FIRST_ANCHORS, anchor, seq_len - _NUM_ANCHORS + anchor)
        block = tl.load(block_row + position // shape.BLOCK_SIZE, mask=valid, other=0).to(tl.int64)
        row = block * tokens.stride_block + position % shape.BLOCK_SIZE * tokens.stride_token
        scores = tile_scores(query, key_base, row, valid, scale, soft_cap, shape)
        scores = tl.where(valid[:, None], scores, DISCARDED)
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=0))
        exponentials = tl.exp2((scores - new_maximum[None, :]) * LOG2_E)
        total = total * tl.exp2((maximum - new_maximum) * LOG2_E) + tl.sum(exponentials, axis=0)
        maximum = new_maximum
    return maximum + tl.log(total)


@triton.jit
def thresholds_of(
    query, queries, tokens, key_base, block_row, seq, seq_len, head, mask_g, num_seqs, min_length, max_length, scale,
    shape,
):  # fmt: skip
    """Thresholds of a sequence that does not keep every key, [G_PAD] float32; behind the last head nothing is kept.

    Args:
        query: [D_PAD, G_PAD], those of the sequence and the kv head.
        queries, tokens, shape: `Queries`, `Tokens`, `Shape`.
        key_base, block_row: Where the keys of the kv head, and the blocks of the sequence, start.
        seq, seq_len: The sequence and its tokens.
        head, mask_g: [G_PAD], query heads of the kv head, and which of them there are.
        num_seqs: Of the step.
        min_length, max_length: Lengths between which calibrated thresholds follow the sequence's.
        scale: Factor on q . k.
    """
    log_length = tl.log(seq_len.to(tl.float32)) if shape.RELATIVE else _log_length(seq_len, min_length, max_length)
    coefficients = queries.coefficients + head * _COEFFICIENTS
    threshold = tl.load(coefficients + 2, mask=mask_g, other=0.0)
    threshold = threshold * log_length + tl.load(coefficients + 1, mask=mask_g, other=0.0)
    threshold = threshold * log_length + tl.load(coefficients, mask=mask_g, other=0.0)
    if shape.RELATIVE:
        slope = tl.load(coefficients + 3, mask=mask_g, other=0.0)
        soft_cap = queries.logits_soft_cap
        threshold += slope * _anchor_lse(query, tokens, key_base, block_row, seq_len, scale, soft_cap, shape)
    if tokens.threshold_offset is not None:
        threshold += offset_of(tokens, seq, num_seqs)
    # finite, so that differences of two of them are no NaN, and above what is discarded
    threshold = tl.minimum(tl.maximum(threshold, -HIGHEST), HIGHEST)
    return tl.where(mask_g, threshold, HIGHEST)


@triton.jit
def unread_ratios_of(shadow, seq_len, head, mask_g, min_length, max_length):
    """r of a sequence, [G_PAD] float32, from ln r = c_0 + c_1 ln n; 0 behind the group's last head.

    Args:
        shadow: `Shadow`; the others are as for `thresholds_of`.
    """
    terms = shadow.log_unread_ratio + head * 2
    constant = tl.load(terms, mask=mask_g, other=0.0)
    slope = tl.load(terms + 1, mask=mask_g, other=0.0)
    ratio = tl.exp(tl.minimum(constant + slope * _log_length(seq_len, min_length, max_length), _MAX_LOG_RATIO))
    return tl.where(mask_g, ratio, 0.0)
