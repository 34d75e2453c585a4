"""The Triton kernel of mode `values` that reads keys and values: new tokens of sequences over the paged KV cache.

For a query head with scores s_j = softmax_scale * q . k_j over the n cached keys, and S = {j : s_j >= theta}:

    m = max_j s_j,  Z = sum_j exp(s_j - m),  lost = sum_{j not in S} exp(s_j - m) / Z
    output = sum_{j in S} exp(s_j - m) / Z * v_j + lost * mean_j(v_j)

Of several new tokens of a sequence, each has queries and thresholds of its own, and sees the keys up to its own; they
are read once for all, and so are values that some of them keep.
A sink of the head is one more term of Z, and of the anchors' sum in theta.
`split_kernel` computes pieces of sequences, for one kv head each, by a scan and a gather, or by an ordinary dense loop
where a sequence is too short for thresholds or its request says so (`survivors.py`). `merge_kernel` joins the pieces.
Source: arXiv 2502.08363.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_toptheta.kernels.gpu.schedule import (
    group_of_share,
    load_piece,
    open_page,
    share_of_program,
    store_piece,
    units_of_share,
    work_of,
)
from vllm_toptheta.kernels.gpu.survivors import attend_all, attend_survivors
from vllm_toptheta.kernels.gpu.thresholds import load_thresholds


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
    share, seq, work_before = share_of_program(tokens, num_seqs, max_dense_len, min_step_tokens, schedule)
    group = group_of_share(tokens, queries, share, shape, tiling)
    all_rows_read = tl.zeros((), dtype=tl.int64)

    while (seq < num_seqs) & (work_before < share.end):
        units = units_of_share(tokens, share, seq, work_before, num_seqs, schedule)
        if units.first < units.end:
            query, span = load_piece(tokens, queries, group, units, stride_table_seq, shape, schedule)
            if units.is_dense:
                piece = attend_all(query, tokens, group, span, queries.logits_soft_cap, shape, tiling)
            else:
                open_start = open_page(units.seq_len, shape)
                if shape.QUERY_LEN > 1 and shape.VALUE_MEAN:
                    open_start = open_page(tl.min(span.seen, axis=0), shape)
                if EARLY_SPLIT:
                    tl.extra.cuda.gdc_wait()
                threshold = load_thresholds(queries, span.token, group.head, group.mask)
                piece = attend_survivors(
                    query, threshold, tokens, group, span, lists, open_start, queries.logits_soft_cap, shape, tiling
                )
            all_rows_read += piece.value_rows_read
            store_piece(pieces, share, seq, piece, shape, tiling)
        work_before += work_of(
            units.seq_len, units.is_dense, schedule.DENSE_WORK, share.entry, share.multiple, schedule.UNIT
        )
        seq += 1
    if EARLY_SPLIT:
        # in any case: whoever waits for this kernel relies on the one before it too
        tl.extra.cuda.gdc_wait()
    if counts.value_rows_read is not None:
        tl.atomic_add(counts.value_rows_read + share.kv_head, all_rows_read, sem="relaxed")


@triton.jit
def count_all_keys(counts, kv_head, program, seq_lens):
    """Count every key of a step of sequences of `seq_lens` as read, by one of a kv head's programs."""
    if counts.keys_read is not None and program == 0:
        tl.atomic_add(counts.keys_read + kv_head, tl.sum(seq_lens.to(tl.int64), axis=0), sem="relaxed")


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
