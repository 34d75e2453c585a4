"""The second of the three Triton kernels behind `shadow.decode_shadow`: pieces of sequences by their shadow keys.

Each is scanned and walked (`candidates.py`), unless the sequence is too short for thresholds or its rule says so: then
it keeps everything. Where the step reads all keys, there is nothing left to do (`shadow_query.py`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_toptheta.kernels.gpu.candidates import attend_candidates
from vllm_toptheta.kernels.gpu.rules import curve_of, dense_length_of, level_of
from vllm_toptheta.kernels.gpu.schedule import (
    first_of_share,
    load_lengths,
    reads_all_keys,
    store_piece,
    units_of_piece,
    work_of_step,
)
from vllm_toptheta.kernels.gpu.survivors import attend_all
from vllm_toptheta.kernels.gpu.tiles import scales_at, thresholds_at


# lengths and counts change from batch to batch: one compilation serves them all
@triton.jit(
    do_not_specialize=(
        "stride_table_seq",
        "num_seqs",
        "min_sparse_context",
        "few_tokens",
        "short_length",
        "min_length",
        "max_length",
        "num_sink",
        "num_recent",
    )
)
def shadow_split_kernel(
    query_ptr,  # [num_seqs, num_heads, head_size]
    query_codes_ptr,  # [num_seqs, num_heads, 2 * CODE_BYTES] int8
    floors_ptr,  # [num_seqs, num_heads] int32
    kv_cache_ptr,  # [num_blocks, num_kv_heads, block_size, 2 * head_size]
    codes_ptr,  # [num_blocks, num_kv_heads, block_size, CODE_BYTES] uint8
    block_table_ptr,  # [num_seqs, max_blocks] int32
    seq_lens_ptr,  # [num_seqs] int32
    rules_ptr,  # [num_seqs, RULE_FIELDS] int32, or None
    coefficients_ptr,  # [num_levels, num_heads, NUM_COEFFICIENTS] float32
    log_scale_ptr,  # [num_levels, num_heads, 2] float32
    q_scale_ptr,  # [1] float32
    k_scale_ptr,  # [1] float32
    list_ptr,  # [num_programs * num_kv_heads, LIST_DEPTH, TILE] int32
    order_ptr,  # [num_programs * num_kv_heads, LIST_DEPTH * TILE] int32
    partial_output_ptr,  # [num_pieces * num_kv_heads, GROUP, head_size] float32
    partial_stats_ptr,  # [num_pieces * num_kv_heads, 3, GROUP] float32
    keys_read_ptr,  # [num_kv_heads] int64
    rows_read_ptr,  # [num_kv_heads] int64
    stride_query_seq,
    stride_query_head,
    stride_kv_block,
    stride_kv_head,
    stride_kv_token,
    stride_code_block,
    stride_code_head,
    stride_table_seq,
    num_seqs,
    min_sparse_context,
    few_tokens,
    short_length,
    min_length,
    max_length,
    num_sink,
    num_recent,
    softmax_scale,
    soft_cap,
    NUM_COEFFICIENTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    D_PAD: tl.constexpr,
    G_PAD: tl.constexpr,
    CODE_BYTES: tl.constexpr,
    ROW_TOKENS: tl.constexpr,
    COLUMN_HEADS: tl.constexpr,
    UNIT: tl.constexpr,
    TILE: tl.constexpr,
    DENSE_TILE: tl.constexpr,
    CHUNK_TILES: tl.constexpr,
    LIST_DEPTH: tl.constexpr,
    WALK_TILE: tl.constexpr,
    MIN_WORK: tl.constexpr,
    SEQ_BLOCK: tl.constexpr,
    DENSE_WORK: tl.constexpr,
    SCAN_STAGES: tl.constexpr,
    WALK_STAGES: tl.constexpr,
    DENSE_STAGES: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    COMPUTE: tl.constexpr,
    HAS_Q_SCALE: tl.constexpr,
    HAS_K_SCALE: tl.constexpr,
    VALUE_MEAN: tl.constexpr,
    COUNT: tl.constexpr,
    EARLY_SPLIT: tl.constexpr,
    EARLY_MERGE: tl.constexpr,
    ON_GPU: tl.constexpr,
):
    kv_head = tl.program_id(0).to(tl.int64)
    program = tl.program_id(1)
    num_kv_heads = tl.num_programs(0)
    work, share = work_of_step(
        seq_lens_ptr, rules_ptr, num_seqs, min_sparse_context, tl.num_programs(1), MIN_WORK, DENSE_WORK, UNIT, SEQ_BLOCK
    )
    seq, work_before, end_of_share = first_of_share(work, share, program)
    if EARLY_SPLIT:
        tl.extra.cuda.gdc_wait()
    if EARLY_MERGE:
        tl.extra.cuda.gdc_launch_dependents()
    # not before the first kernel has ended, because the merge waits for this one only
    if reads_all_keys(load_lengths(seq_lens_ptr, num_seqs, SEQ_BLOCK), few_tokens, short_length):
        return

    offs_g = tl.arange(0, G_PAD)
    offs_d = tl.arange(0, D_PAD)
    mask_g = offs_g < GROUP
    head = kv_head * GROUP + offs_g
    scale = softmax_scale
    if HAS_Q_SCALE:
        scale = scale * tl.load(q_scale_ptr)
    if HAS_K_SCALE:
        scale = scale * tl.load(k_scale_ptr)
    key_base = kv_cache_ptr + kv_head * stride_kv_head
    list_index = program.to(tl.int64) * num_kv_heads + kv_head
    all_keys_read = tl.zeros((), dtype=tl.int64)
    all_rows_read = tl.zeros((), dtype=tl.int64)

    while (seq < num_seqs) & (work_before < end_of_share):
        seq_len = tl.load(seq_lens_ptr + seq)
        is_dense = seq_len <= dense_length_of(rules_ptr, seq, num_seqs, min_sparse_context)
        first_unit, last_unit = units_of_piece(program, share, work_before, seq_len, is_dense, DENSE_WORK, UNIT)
        if first_unit < last_unit:
            start = first_unit * UNIT
            end = tl.minimum(last_unit * UNIT, seq_len)
            row = seq.to(tl.int64)
            query = tl.load(
                query_ptr + row * stride_query_seq + head[None, :] * stride_query_head + offs_d[:, None],
                mask=mask_g[None, :] & (offs_d < HEAD_SIZE)[:, None],
                other=0.0,
            ).to(COMPUTE)
            block_row = block_table_ptr + row * stride_table_seq
            if is_dense:
                output, maximum, kept_sum, lost_sum, rows_read = attend_all(
                    query,
                    key_base,
                    block_row,
                    start,
                    end,
                    stride_kv_block,
                    stride_kv_token,
                    scale,
                    soft_cap,
                    BLOCK_SIZE=BLOCK_SIZE,
                    HEAD_SIZE=HEAD_SIZE,
                    D_PAD=D_PAD,
                    G_PAD=G_PAD,
                    TILE=DENSE_TILE,
                    STAGES=DENSE_STAGES,
                    SOFT_CAP=SOFT_CAP,
                )
                keys_read = end - start
            else:
                open_start = seq_len
                if VALUE_MEAN:
                    open_start = seq_len // BLOCK_SIZE * BLOCK_SIZE
                num_heads = num_kv_heads * GROUP
                first_head = row * num_heads + kv_head * GROUP
                curve_ptr, shortest, longest = curve_of(
                    rules_ptr, seq, coefficients_ptr, num_heads * NUM_COEFFICIENTS, min_length, max_length
                )
                scale_ptr = log_scale_ptr + level_of(rules_ptr, seq, num_seqs) * num_heads * 2
                output, maximum, kept_sum, lost_sum, keys_read, rows_read = attend_candidates(
                    query,
                    thresholds_at(curve_ptr, head, mask_g, seq_len, shortest, longest, NUM_COEFFICIENTS),
                    scales_at(scale_ptr, head, mask_g, seq_len, shortest, longest),
                    query_codes_ptr + first_head * 2 * CODE_BYTES,
                    floors_ptr + first_head,
                    key_base,
                    codes_ptr + kv_head * stride_code_head,
                    block_row,
                    list_ptr + list_index * LIST_DEPTH * TILE,
                    order_ptr + list_index * LIST_DEPTH * TILE,
                    start,
                    end,
                    num_sink,
                    # the page of the last token has no codes yet, or only since this step
                    tl.minimum(seq_len - num_recent, (seq_len - 1) // BLOCK_SIZE * BLOCK_SIZE),
                    open_start,
                    stride_kv_block,
                    stride_kv_token,
                    stride_code_block,
                    scale,
                    soft_cap,
                    BLOCK_SIZE=BLOCK_SIZE,
                    HEAD_SIZE=HEAD_SIZE,
                    GROUP=GROUP,
                    D_PAD=D_PAD,
                    G_PAD=G_PAD,
                    CODE_BYTES=CODE_BYTES,
                    ROW_TOKENS=ROW_TOKENS,
                    COLUMN_HEADS=COLUMN_HEADS,
                    TILE=TILE,
                    CHUNK_TILES=CHUNK_TILES,
                    LIST_DEPTH=LIST_DEPTH,
                    WALK_TILE=WALK_TILE,
                    SCAN_STAGES=SCAN_STAGES,
                    WALK_STAGES=WALK_STAGES,
                    SOFT_CAP=SOFT_CAP,
                    ON_GPU=ON_GPU,
                )
            all_keys_read += keys_read
            all_rows_read += rows_read
            store_piece(
                partial_output_ptr,
                partial_stats_ptr,
                (program + seq).to(tl.int64) * num_kv_heads + kv_head,
                output,
                maximum,
                kept_sum,
                lost_sum,
                GROUP=GROUP,
                HEAD_SIZE=HEAD_SIZE,
                D_PAD=D_PAD,
                G_PAD=G_PAD,
            )
        work_before += tl.cdiv(seq_len, UNIT) * tl.where(is_dense, DENSE_WORK, 1)
        seq += 1
    if COUNT:
        tl.atomic_add(keys_read_ptr + kv_head, all_keys_read, sem="relaxed")
        tl.atomic_add(rows_read_ptr + kv_head, all_rows_read, sem="relaxed")
