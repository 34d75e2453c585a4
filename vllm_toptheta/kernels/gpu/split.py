"""The Triton kernel of mode `values` that reads keys and values: one new token per sequence over the paged KV cache.

For a query head with scores s_j = softmax_scale * q . k_j over the n cached keys, and S = {j : s_j >= theta}:

    m = max_j s_j,  Z = sum_j exp(s_j - m),  lost = sum_{j not in S} exp(s_j - m) / Z
    output = sum_{j in S} exp(s_j - m) / Z * v_j + lost * mean_j(v_j)

A sink of the head is one more term of Z, and of the anchors' sum in theta.
`split_kernel` computes pieces of sequences, for one kv head each, by a scan and a gather, or by an ordinary dense loop
where a sequence is too short for thresholds or its request says so (`survivors.py`). `merge_kernel` joins the pieces.
Source: arXiv 2502.08363.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_toptheta.kernels.gpu.schedule import (
    dense_length,
    first_of_share,
    store_piece,
    units_of_piece,
    work_of,
    work_of_step,
)
from vllm_toptheta.kernels.gpu.survivors import attend_all, attend_survivors
from vllm_toptheta.kernels.gpu.thresholds import keeps_all, load_thresholds
from vllm_toptheta.kernels.gpu.tiles import load_query, score_scale


@triton.jit
def split_step(
    tokens,  # Tokens
    queries,  # Queries
    lists,  # Lists
    pieces,  # Pieces
    counts,  # Counts
    num_seqs,
    max_dense_len,
    min_step_tokens,
    stride_table_seq,
    shape: tl.constexpr,  # Shape
    schedule: tl.constexpr,  # Schedule
    tiling: tl.constexpr,  # Tiling
    EARLY_SPLIT: tl.constexpr,  # whether the kernel before, of which only thresholds are needed, may still run
):
    """What a program of a grid [num_kv_heads, num_programs] has to do of a step that reads all keys."""
    kv_head = tl.program_id(0).to(tl.int64)
    program = tl.program_id(1)
    num_kv_heads = tl.num_programs(0)
    max_dense_len = dense_length(tokens, num_seqs, max_dense_len, min_step_tokens, schedule.SEQ_BLOCK)
    work, share, multiple = work_of_step(
        tokens, num_seqs, max_dense_len, tl.num_programs(1), schedule.MIN_WORK, schedule.DENSE_WORK,
        schedule.PIECE_WORK, schedule.UNIT, schedule.SEQ_BLOCK,
    )  # fmt: skip
    seq, work_before, end_of_share = first_of_share(work, share, program)
    offs_g = tl.arange(0, tiling.G_PAD)
    mask_g = offs_g < shape.GROUP
    head = kv_head * shape.GROUP + offs_g
    scale = score_scale(queries)
    key_base = tokens.kv_cache + kv_head * tokens.stride_head
    list_index = program.to(tl.int64) * num_kv_heads + kv_head
    all_rows_read = tl.zeros((), dtype=tl.int64)

    while (seq < num_seqs) & (work_before < end_of_share):
        seq_len = tl.load(tokens.seq_lens + seq)
        is_dense = keeps_all(tokens, seq, seq_len, num_seqs, max_dense_len)
        first_unit, last_unit = units_of_piece(
            program, share, work_before, seq_len, is_dense, schedule.DENSE_WORK, schedule.UNIT
        )
        if first_unit < last_unit:
            start = first_unit * schedule.UNIT
            end = tl.minimum(last_unit * schedule.UNIT, seq_len)
            query = load_query(queries, seq, head, mask_g, shape)
            block_row = tokens.block_table + seq.to(tl.int64) * stride_table_seq
            if is_dense:
                piece = attend_all(
                    query, tokens, key_base, block_row, start, end, scale, queries.logits_soft_cap, shape, tiling
                )
            else:
                open_start = seq_len
                if shape.VALUE_MEAN:
                    open_start = seq_len // shape.BLOCK_SIZE * shape.BLOCK_SIZE
                if EARLY_SPLIT:
                    tl.extra.cuda.gdc_wait()
                threshold = load_thresholds(queries, seq, head, mask_g)
                piece = attend_survivors(
                    query, threshold, tokens, key_base, block_row, lists, list_index, start, end, open_start, scale,
                    queries.logits_soft_cap, shape, tiling,
                )  # fmt: skip
            all_rows_read += piece.value_rows_read
            store_piece(pieces, (program + seq).to(tl.int64) * num_kv_heads + kv_head, piece, shape, tiling)
        work_before += work_of(seq_len, is_dense, schedule.DENSE_WORK, multiple, schedule.UNIT)
        seq += 1
    if EARLY_SPLIT:
        # in any case: whoever waits for this kernel relies on the one before it too
        tl.extra.cuda.gdc_wait()
    if counts.value_rows_read is not None:
        tl.atomic_add(counts.value_rows_read + kv_head, all_rows_read, sem="relaxed")


# lengths and counts change from batch to batch: one compilation serves them all
@triton.jit(do_not_specialize=("num_seqs", "max_dense_len", "min_step_tokens", "stride_table_seq"))
def split_kernel(
    tokens,
    queries,
    lists,
    pieces,
    counts,
    num_seqs,
    max_dense_len,
    min_step_tokens,
    stride_table_seq,
    shape: tl.constexpr,
    schedule: tl.constexpr,
    tiling: tl.constexpr,
    EARLY_SPLIT: tl.constexpr,
    EARLY_MERGE: tl.constexpr,
):
    if EARLY_MERGE:
        tl.extra.cuda.gdc_launch_dependents()
    split_step(
        tokens, queries, lists, pieces, counts, num_seqs, max_dense_len, min_step_tokens, stride_table_seq, shape,
        schedule, tiling, EARLY_SPLIT,
    )  # fmt: skip
