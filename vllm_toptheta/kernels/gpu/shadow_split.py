"""The Triton kernel of mode `shadow` behind `query_kernel`: pieces of sequences by their shadow keys.

Each is scanned and walked (`candidates.py`), unless the sequence is too short for thresholds or its request says so:
then it keeps everything. Where the step reads all keys, there is nothing left to do (`shadow_query.py`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_toptheta.kernels.gpu.candidates import attend_candidates
from vllm_toptheta.kernels.gpu.schedule import (
    dense_length,
    first_of_share,
    load_lengths,
    reads_all_keys,
    store_piece,
    units_of_piece,
    work_of,
    work_of_step,
)
from vllm_toptheta.kernels.gpu.survivors import attend_all
from vllm_toptheta.kernels.gpu.thresholds import keeps_all, load_thresholds, unread_ratios_of
from vllm_toptheta.kernels.gpu.tiles import load_query, score_scale
from vllm_toptheta.limits import NUM_LAST_ANCHORS

_LAST_ANCHORS = tl.constexpr(NUM_LAST_ANCHORS)


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
    shadow,  # Shadow
    lists,  # Lists of candidates
    pieces,  # Pieces
    counts,  # Counts
    num_seqs,
    max_dense_len,
    min_step_tokens,
    min_length,
    max_length,
    stride_table_seq,
    few_tokens,
    short_length,
    shape: tl.constexpr,  # Shape
    schedule: tl.constexpr,  # Schedule
    tiling: tl.constexpr,  # Tiling
    ROW_TOKENS: tl.constexpr,
    COLUMN_HEADS: tl.constexpr,
    EARLY_SPLIT: tl.constexpr,
    EARLY_MERGE: tl.constexpr,
):
    BLOCK_SIZE: tl.constexpr = shape.BLOCK_SIZE
    GROUP: tl.constexpr = shape.GROUP
    kv_head = tl.program_id(0).to(tl.int64)
    program = tl.program_id(1)
    num_kv_heads = tl.num_programs(0)
    max_dense_len = dense_length(tokens, num_seqs, max_dense_len, min_step_tokens, schedule.SEQ_BLOCK)
    work, share, multiple = work_of_step(
        tokens, num_seqs, max_dense_len, tl.num_programs(1), schedule.MIN_WORK, schedule.DENSE_WORK,
        schedule.PIECE_WORK, schedule.UNIT, schedule.SEQ_BLOCK,
    )  # fmt: skip
    seq, work_before, end_of_share = first_of_share(work, share, program)
    if EARLY_SPLIT:
        tl.extra.cuda.gdc_wait()
    if EARLY_MERGE:
        tl.extra.cuda.gdc_launch_dependents()
    # not before the first kernel has ended, because the merge waits for this one only
    if reads_all_keys(load_lengths(tokens.seq_lens, num_seqs, schedule.SEQ_BLOCK), few_tokens, short_length):
        return

    offs_g = tl.arange(0, tiling.G_PAD)
    mask_g = offs_g < GROUP
    head = kv_head * GROUP + offs_g
    scale = score_scale(queries)
    key_base = tokens.kv_cache + kv_head * tokens.stride_head
    list_index = program.to(tl.int64) * num_kv_heads + kv_head
    all_keys_read = tl.zeros((), dtype=tl.int64)
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
            row = seq.to(tl.int64)
            query = load_query(queries, seq, head, mask_g, shape)
            block_row = tokens.block_table + row * stride_table_seq
            if is_dense:
                piece = attend_all(
                    query, tokens, key_base, block_row, start, end, scale, queries.logits_soft_cap, shape, tiling
                )
            else:
                open_start = seq_len
                if shape.VALUE_MEAN:
                    open_start = seq_len // BLOCK_SIZE * BLOCK_SIZE
                threshold = load_thresholds(queries, seq, head, mask_g)
                ratio = unread_ratios_of(shadow, seq_len, head, mask_g, min_length, max_length)
                # the page of the last token has no codes yet, or only since this step
                first_recent = tl.minimum(seq_len - _LAST_ANCHORS, (seq_len - 1) // BLOCK_SIZE * BLOCK_SIZE)
                piece = attend_candidates(
                    query, threshold, ratio, tokens, shadow, row * queries.num_heads + kv_head * GROUP, key_base,
                    shadow.codes + kv_head * shadow.stride_head, block_row, lists, list_index, start, end, first_recent,
                    open_start, scale, queries.logits_soft_cap, shape, tiling, ROW_TOKENS, COLUMN_HEADS,
                )  # fmt: skip
            all_keys_read += piece.keys_read
            all_rows_read += piece.value_rows_read
            store_piece(pieces, (program + seq).to(tl.int64) * num_kv_heads + kv_head, piece, shape, tiling)
        work_before += work_of(seq_len, is_dense, schedule.DENSE_WORK, multiple, schedule.UNIT)
        seq += 1
    if counts.value_rows_read is not None:
        tl.atomic_add(counts.keys_read + kv_head, all_keys_read, sem="relaxed")
        tl.atomic_add(counts.value_rows_read + kv_head, all_rows_read, sem="relaxed")
