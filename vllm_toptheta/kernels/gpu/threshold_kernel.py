"""The first Triton kernel of all modes: the thresholds of a step, and nothing else.

A kernel of its own, because whoever scores a sequence's 144 anchors waits for three loads that depend on each other,
about 6 us: each of the programs that share the sequence out would. Here all wait for it once, and the next kernel
starts meanwhile. And all programs of a row get the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_toptheta.kernels.contract import NUM_COEFFICIENTS, DecodeStep
from vllm_toptheta.kernels.gpu.records import Queries, Shape, Tokens, next_power_of_2
from vllm_toptheta.kernels.gpu.schedule import dense_length, new_tokens, room_for
from vllm_toptheta.kernels.gpu.thresholds import HIGHEST, keeps_all, log_length_of, offset_of
from vllm_toptheta.kernels.gpu.tiles import DISCARDED, LOG2_E, MIN_COLUMNS, load_query, score_scale, tile_scores
from vllm_toptheta.kernels.gpu.tuning import launch_options
from vllm_toptheta.limits import NUM_ANCHORS, NUM_FIRST_ANCHORS

NUM_WARPS = 8
_COEFFICIENTS = tl.constexpr(NUM_COEFFICIENTS)
_NUM_ANCHORS = tl.constexpr(NUM_ANCHORS)
_FIRST_ANCHORS = tl.constexpr(NUM_FIRST_ANCHORS)
_TILE = tl.constexpr(next_power_of_2(NUM_ANCHORS))


@triton.jit
def _anchor_lse(tokens, queries, seq, token, seq_len, kv_head, head, mask_g, stride_table_seq, shape):
    """ln of the sum of exp(score) over a sequence's anchors, and of the heads' sinks, [G_PAD] float32.

    For a new token that sees `seq_len` keys.
    """
    anchor = tl.arange(0, _TILE)
    is_anchor = anchor < _NUM_ANCHORS
    position = tl.where(anchor < _FIRST_ANCHORS, anchor, seq_len - _NUM_ANCHORS + anchor)
    block_row = tokens.block_table + seq.to(tl.int64) * stride_table_seq
    block = tl.load(block_row + position // shape.BLOCK_SIZE, mask=is_anchor, other=0).to(tl.int64)
    row = block * tokens.stride_block + position % shape.BLOCK_SIZE * tokens.stride_token
    query = load_query(queries, token, head, mask_g, shape)
    key_base = tokens.kv_cache + kv_head * tokens.stride_head
    scores = tile_scores(query, key_base, row, is_anchor, score_scale(queries), queries.logits_soft_cap, shape)
    scores = tl.where(is_anchor[:, None], scores, DISCARDED)
    maximum = tl.max(scores, axis=0)
    if queries.sinks is not None:
        sink = tl.load(queries.sinks + head, mask=mask_g, other=0.0).to(tl.float32)
        maximum = tl.maximum(maximum, sink)
    total = tl.sum(tl.exp2((scores - maximum[None, :]) * LOG2_E), axis=0)
    if queries.sinks is not None:
        total += tl.exp2((sink - maximum) * LOG2_E)
    return maximum + tl.log(total)


@triton.jit
def _write_thresholds(
    tokens, queries, num_seqs, max_dense_len, min_step_tokens, min_length, max_length, stride_table_seq,
    shape: tl.constexpr, G_PAD: tl.constexpr, SEQ_BLOCK: tl.constexpr,
):  # fmt: skip
    """Those of a kv head's group, of a new token; none where every key is kept."""
    kv_head = tl.program_id(0).to(tl.int64)
    seq = tl.program_id(1) // shape.QUERY_LEN
    token = seq
    seq_len = tl.load(tokens.seq_lens + seq)
    max_dense_len = dense_length(tokens, num_seqs, max_dense_len, min_step_tokens, SEQ_BLOCK)
    if keeps_all(tokens, seq, seq_len, num_seqs, max_dense_len):
        return
    if shape.QUERY_LEN > 1:
        token, seq_len, exists = new_tokens(tokens, seq, seq_len, tl.program_id(1) % shape.QUERY_LEN)
        if not exists:
            return
    heads = shape.GROUP // shape.QUERY_LEN
    offs_g = tl.arange(0, G_PAD)
    mask_g = offs_g < heads
    head = kv_head * heads + offs_g
    coefficients = queries.coefficients + head * _COEFFICIENTS
    log_length = tl.log(seq_len.to(tl.float32)) if shape.RELATIVE else log_length_of(seq_len, min_length, max_length)
    threshold = tl.load(coefficients + 2, mask=mask_g, other=0.0)
    threshold = threshold * log_length + tl.load(coefficients + 1, mask=mask_g, other=0.0)
    threshold = threshold * log_length + tl.load(coefficients, mask=mask_g, other=0.0)
    if shape.RELATIVE:
        slope = tl.load(coefficients + 3, mask=mask_g, other=0.0)
        lse = _anchor_lse(tokens, queries, seq, token, seq_len, kv_head, head, mask_g, stride_table_seq, shape)
        threshold += slope * lse
        if queries.anchor_lse is not None:
            tl.store(queries.anchor_lse + token.to(tl.int64) * queries.num_heads + head, lse, mask=mask_g)
    if tokens.threshold_offset is not None:
        threshold += offset_of(tokens, seq, num_seqs)
    # finite, so that differences of two of them are no NaN, and above what is discarded
    threshold = tl.minimum(tl.maximum(threshold, -HIGHEST), HIGHEST)
    tl.store(queries.thresholds + token.to(tl.int64) * queries.num_heads + head, threshold, mask=mask_g)


# lengths and counts change from batch to batch: one compilation serves them all
@triton.jit(
    do_not_specialize=("num_seqs", "max_dense_len", "min_step_tokens", "min_length", "max_length", "stride_table_seq")
)
def threshold_kernel(
    tokens,  # Tokens
    queries,  # Queries, whose thresholds and sums over anchors are written
    num_seqs,
    max_dense_len,
    min_step_tokens,
    min_length,
    max_length,
    stride_table_seq,
    shape: tl.constexpr,  # Shape
    G_PAD: tl.constexpr,
    SEQ_BLOCK: tl.constexpr,  # sequences that there is room for
    IS_EARLY: tl.constexpr,  # whether whatever ran before may still run, and the next kernel may start
    IS_SECOND: tl.constexpr,  # whether that is the step's own kernel, which has waited for queries and keys
):
    """A program has the heads of a kv head's group, of a new token: a grid [num_kv_heads, num_seqs * QUERY_LEN]."""
    if IS_EARLY:
        # in this order: the next kernel reads queries and keys at once, and waits for this one only
        if not IS_SECOND:
            tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    _write_thresholds(
        tokens, queries, num_seqs, max_dense_len, min_step_tokens, min_length, max_length, stride_table_seq, shape,
        G_PAD, SEQ_BLOCK,
    )  # fmt: skip
    if IS_EARLY and IS_SECOND and (tl.program_id(0) + tl.program_id(1) == 0):
        # whoever waits for this kernel relies on the one before it too; one program that waits is enough
        tl.extra.cuda.gdc_wait()


def launch_thresholds(
    step: DecodeStep, tokens: Tokens, queries: Queries, shape: Shape, *, is_early: bool, is_second: bool = False
) -> None:
    """Write `queries.thresholds`; if `is_early`, the next kernel may start before they are, and waits itself.

    Then it is also launched while whatever was launched before it still runs, and waits for that: at once, or in the
    end if it `is_second`, behind a kernel that has waited for queries and keys before it let this one start.
    """
    num_seqs, heads = len(step.seq_lens), shape.GROUP // shape.QUERY_LEN
    threshold_kernel[(queries.num_heads // heads, num_seqs * shape.QUERY_LEN)](
        tokens,
        queries,
        num_seqs,
        step.max_dense_len,
        step.min_step_tokens,
        *step.length_range,
        step.block_table.stride(0),
        shape,
        G_PAD=max(MIN_COLUMNS, next_power_of_2(heads)),
        SEQ_BLOCK=room_for(num_seqs),
        IS_EARLY=is_early,
        IS_SECOND=is_second,
        **launch_options(NUM_WARPS, is_early=is_early),
    )
