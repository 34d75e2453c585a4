"""The Triton kernel of mode `shadow` behind `query_kernel`: pieces of sequences by their shadow keys, or by copies.

Each is scanned and walked (`candidates.py`, `tier_piece.py`), unless the sequence is too short for thresholds or its
request says so: then it keeps everything. Where the step reads all keys, there is nothing left to do
(`shadow_query.py`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_toptheta.kernels.gpu.candidates import attend_candidates, first_recent_of
from vllm_toptheta.kernels.gpu.schedule import (
    group_of_share,
    load_lengths,
    load_piece,
    open_page,
    reads_all_keys,
    share_of_program,
    store_piece,
    units_of_share,
    work_of,
)
from vllm_toptheta.kernels.gpu.survivors import attend_all
from vllm_toptheta.kernels.gpu.thresholds import load_thresholds, unread_ratios_of
from vllm_toptheta.kernels.gpu.tier_piece import attend_by_tiers


# lengths and counts change from batch to batch: one compilation serves them all
@triton.jit(
    do_not_specialize=(
        "num_seqs",
        "max_dense_len",
        "min_step_tokens",
        "min_length",
        "max_length",
        "stride_table_seq",
        "few_tokens",
        "short_length",
    )
)
def shadow_split_kernel(
    tokens,  # Tokens
    queries,  # Queries
    keys,  # Shadow or Copies
    lists,  # Lists of keys that are read exactly: candidates, or heavy keys
    light,  # Lists of keys that are weighed by copies; None by shadow keys
    pieces,  # Pieces
    counts,  # Counts
    num_seqs,
    max_dense_len,
    min_step_tokens,
    min_length,  # None by copies, as max_length
    max_length,
    stride_table_seq,
    few_tokens,
    short_length,
    log_heavy,  # None by shadow keys
    shape: tl.constexpr,  # Shape
    schedule: tl.constexpr,  # Schedule
    tiling: tl.constexpr,  # Tiling
    BY_COPIES: tl.constexpr,  # whether most keys are read as copies, not as shadow keys
    ROW_TOKENS: tl.constexpr,  # whose codes share a row of a product; 1 by copies
    COLUMN_HEADS: tl.constexpr,  # that each of them has columns for
    IS_EARLY: tl.constexpr,  # whether the kernel before may still run, and the one behind may start
):
    share, seq, work_before = share_of_program(tokens, num_seqs, max_dense_len, min_step_tokens, schedule)
    if IS_EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    # not before the first kernel has ended, because the merge waits for this one only
    if reads_all_keys(load_lengths(tokens.seq_lens, num_seqs, schedule.SEQ_BLOCK), few_tokens, short_length):
        return

    group = group_of_share(tokens, queries, share, shape, tiling)
    all_keys_read = tl.zeros((), dtype=tl.int64)
    all_rows_read = tl.zeros((), dtype=tl.int64)
    all_copies_read = tl.zeros((), dtype=tl.int64)

    while (seq < num_seqs) & (work_before < share.end):
        units = units_of_share(tokens, share, seq, work_before, num_seqs, schedule)
        if units.first < units.end:
            query, span = load_piece(tokens, queries, group, units, stride_table_seq, shape, schedule)
            if units.is_dense:
                piece = attend_all(query, tokens, group, span, queries.logits_soft_cap, shape, tiling)
            elif BY_COPIES:
                piece = attend_by_tiers(
                    query, tokens, queries, keys, lists, light, group, span, seq.to(tl.int64), log_heavy,
                    open_page(units.seq_len, shape), shape, tiling, COLUMN_HEADS,
                )  # fmt: skip
            else:
                open_start = open_page(units.seq_len, shape)
                threshold = load_thresholds(queries, seq, group.head, group.mask)
                ratio = unread_ratios_of(keys, units.seq_len, group.head, group.mask, min_length, max_length)
                first_recent = first_recent_of(units.seq_len, shape.BLOCK_SIZE)
                piece = attend_candidates(
                    query, threshold, ratio, tokens, keys, group, span,
                    seq.to(tl.int64) * queries.num_heads + group.kv_head * shape.GROUP, lists, first_recent, open_start,
                    queries.logits_soft_cap, shape, tiling, ROW_TOKENS, COLUMN_HEADS,
                )  # fmt: skip
            all_keys_read += piece.keys_read
            all_rows_read += piece.value_rows_read
            if BY_COPIES:
                all_copies_read += piece.copies_read
            store_piece(pieces, share, seq, piece, shape, tiling)
        work_before += work_of(
            units.seq_len, units.is_dense, schedule.DENSE_WORK, share.entry, share.multiple, schedule.UNIT
        )
        seq += 1
    if counts.value_rows_read is not None:
        tl.atomic_add(counts.keys_read + share.kv_head, all_keys_read, sem="relaxed")
        tl.atomic_add(counts.value_rows_read + share.kv_head, all_rows_read, sem="relaxed")
        if BY_COPIES:
            tl.atomic_add(counts.copies_read + share.kv_head, all_copies_read, sem="relaxed")
