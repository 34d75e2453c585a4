"""The first of the two Triton kernels behind `decode.decode`: one new token per sequence over the paged KV cache.

For a query head with scores s_j = softmax_scale * q . k_j over the n cached keys, and S = {j : s_j >= theta(n)}:

    m = max_j s_j,  Z = sum_j exp(s_j - m),  lost = sum_{j not in S} exp(s_j - m) / Z
    output = sum_{j in S} exp(s_j - m) / Z * v_j + lost * mean_j(v_j)

`split_kernel` computes pieces of sequences, for one kv head each, by a scan and a gather, or by an ordinary dense loop
where a sequence is too short for thresholds or its rule says so (`survivors.py`). `merge_kernel` joins the pieces.
Source: arXiv 2502.08363.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_toptheta.kernels.gpu.rules import curve_of, dense_length_of
from vllm_toptheta.kernels.gpu.schedule import first_of_share, store_piece, units_of_piece, work_of_step
from vllm_toptheta.kernels.gpu.survivors import attend_all, attend_survivors
from vllm_toptheta.kernels.gpu.tiles import thresholds_at


@triton.jit
def split_step(
    query_ptr,
    kv_cache_ptr,
    block_table_ptr,
    seq_lens_ptr,
    rules_ptr,
    coefficients_ptr,
    q_scale_ptr,
    k_scale_ptr,
    list_ptr,
    order_ptr,
    partial_output_ptr,
    partial_stats_ptr,
    rows_read_ptr,
    stride_query_seq,
    stride_query_head,
    stride_kv_block,
    stride_kv_head,
    stride_kv_token,
    stride_table_seq,
    num_seqs,
    min_sparse_context,
    min_length,
    max_length,
    softmax_scale,
    soft_cap,
    NUM_COEFFICIENTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    D_PAD: tl.constexpr,
    G_PAD: tl.constexpr,
    UNIT: tl.constexpr,
    TILE: tl.constexpr,
    DENSE_TILE: tl.constexpr,
    CHUNK_TILES: tl.constexpr,
    LIST_DEPTH: tl.constexpr,
    MIN_WORK: tl.constexpr,
    SEQ_BLOCK: tl.constexpr,
    DENSE_WORK: tl.constexpr,
    SCAN_STAGES: tl.constexpr,
    DENSE_STAGES: tl.constexpr,
    GATHER_STAGES: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    COMPUTE: tl.constexpr,
    HAS_Q_SCALE: tl.constexpr,
    HAS_K_SCALE: tl.constexpr,
    VALUE_MEAN: tl.constexpr,
    COUNT: tl.constexpr,
    IN_PLACE: tl.constexpr,
):
    """What a program of a grid [num_kv_heads, num_programs] has to do of a step; arguments of `split_kernel`."""
    kv_head = tl.program_id(0).to(tl.int64)
    program = tl.program_id(1)
    num_kv_heads = tl.num_programs(0)
    work, share = work_of_step(
        seq_lens_ptr, rules_ptr, num_seqs, min_sparse_context, tl.num_programs(1), MIN_WORK, DENSE_WORK, UNIT, SEQ_BLOCK
    )
    seq, work_before, end_of_share = first_of_share(work, share, program)

    offs_g = tl.arange(0, G_PAD)
    offs_d = tl.arange(0, D_PAD)
    mask_g = offs_g < GROUP
    mask_d = offs_d < HEAD_SIZE
    head = kv_head * GROUP + offs_g
    scale = softmax_scale
    if HAS_Q_SCALE:
        scale = scale * tl.load(q_scale_ptr)
    if HAS_K_SCALE:
        scale = scale * tl.load(k_scale_ptr)
    key_base = kv_cache_ptr + kv_head * stride_kv_head
    list_index = program.to(tl.int64) * num_kv_heads + kv_head
    program_list = list_ptr + list_index * LIST_DEPTH * TILE * (GROUP + 1)
    program_order = order_ptr + list_index * 2 * LIST_DEPTH * TILE
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
                mask=mask_g[None, :] & mask_d[:, None],
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
            else:
                open_start = seq_len
                if VALUE_MEAN:
                    open_start = seq_len // BLOCK_SIZE * BLOCK_SIZE
                curve_ptr, shortest, longest = curve_of(
                    rules_ptr,
                    seq,
                    coefficients_ptr,
                    num_kv_heads * GROUP * NUM_COEFFICIENTS,
                    min_length,
                    max_length,
                )
                output, maximum, kept_sum, lost_sum, rows_read = attend_survivors(
                    query,
                    thresholds_at(curve_ptr, head, mask_g, seq_len, shortest, longest, NUM_COEFFICIENTS),
                    key_base,
                    block_row,
                    program_list,
                    program_order,
                    start,
                    end,
                    open_start,
                    stride_kv_block,
                    stride_kv_token,
                    scale,
                    soft_cap,
                    BLOCK_SIZE=BLOCK_SIZE,
                    HEAD_SIZE=HEAD_SIZE,
                    GROUP=GROUP,
                    D_PAD=D_PAD,
                    G_PAD=G_PAD,
                    TILE=TILE,
                    CHUNK_TILES=CHUNK_TILES,
                    LIST_DEPTH=LIST_DEPTH,
                    SCAN_STAGES=SCAN_STAGES,
                    GATHER_STAGES=GATHER_STAGES,
                    SOFT_CAP=SOFT_CAP,
                    IN_PLACE=IN_PLACE,
                )
            all_rows_read += rows_read
            piece = (program + seq).to(tl.int64) * num_kv_heads + kv_head
            store_piece(
                partial_output_ptr,
                partial_stats_ptr,
                piece,
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
        tl.atomic_add(rows_read_ptr + kv_head, all_rows_read, sem="relaxed")


# lengths and counts change from batch to batch: one compilation serves them all
@triton.jit(
    do_not_specialize=("stride_table_seq", "num_seqs", "min_sparse_context", "min_length", "max_length"),
)
def split_kernel(
    query_ptr,  # [num_seqs, num_heads, head_size]
    kv_cache_ptr,  # [num_blocks, num_kv_heads, block_size, 2 * head_size]
    block_table_ptr,  # [num_seqs, max_blocks] int32
    seq_lens_ptr,  # [num_seqs] int32
    rules_ptr,  # [num_seqs, RULE_FIELDS] int32, or None
    coefficients_ptr,  # [num_levels, num_heads, degree + 1] float32
    q_scale_ptr,  # [1] float32
    k_scale_ptr,  # [1] float32
    list_ptr,  # [num_programs * num_kv_heads, LIST_DEPTH, TILE, GROUP + 1] int32
    order_ptr,  # [num_programs * num_kv_heads, 2, LIST_DEPTH * TILE] int32
    partial_output_ptr,  # [num_pieces * num_kv_heads, GROUP, head_size] float32
    partial_stats_ptr,  # [num_pieces * num_kv_heads, 3, GROUP] float32: maximum, kept sum, lost sum
    rows_read_ptr,  # [num_kv_heads] int64
    stride_query_seq,
    stride_query_head,
    stride_kv_block,
    stride_kv_head,
    stride_kv_token,
    stride_table_seq,
    num_seqs,
    min_sparse_context,
    min_length,
    max_length,
    softmax_scale,
    soft_cap,
    NUM_COEFFICIENTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    D_PAD: tl.constexpr,
    G_PAD: tl.constexpr,
    UNIT: tl.constexpr,
    TILE: tl.constexpr,
    DENSE_TILE: tl.constexpr,
    CHUNK_TILES: tl.constexpr,
    LIST_DEPTH: tl.constexpr,
    MIN_WORK: tl.constexpr,
    SEQ_BLOCK: tl.constexpr,
    DENSE_WORK: tl.constexpr,
    SCAN_STAGES: tl.constexpr,
    DENSE_STAGES: tl.constexpr,
    GATHER_STAGES: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    COMPUTE: tl.constexpr,
    HAS_Q_SCALE: tl.constexpr,
    HAS_K_SCALE: tl.constexpr,
    VALUE_MEAN: tl.constexpr,
    COUNT: tl.constexpr,
    EARLY_MERGE: tl.constexpr,
    IN_PLACE: tl.constexpr,
):
    if EARLY_MERGE:
        tl.extra.cuda.gdc_launch_dependents()
    split_step(
        query_ptr,
        kv_cache_ptr,
        block_table_ptr,
        seq_lens_ptr,
        rules_ptr,
        coefficients_ptr,
        q_scale_ptr,
        k_scale_ptr,
        list_ptr,
        order_ptr,
        partial_output_ptr,
        partial_stats_ptr,
        rows_read_ptr,
        stride_query_seq,
        stride_query_head,
        stride_kv_block,
        stride_kv_head,
        stride_kv_token,
        stride_table_seq,
        num_seqs,
        min_sparse_context,
        min_length,
        max_length,
        softmax_scale,
        soft_cap,
        NUM_COEFFICIENTS=NUM_COEFFICIENTS,
        BLOCK_SIZE=BLOCK_SIZE,
        HEAD_SIZE=HEAD_SIZE,
        GROUP=GROUP,
        D_PAD=D_PAD,
        G_PAD=G_PAD,
        UNIT=UNIT,
        TILE=TILE,
        DENSE_TILE=DENSE_TILE,
        CHUNK_TILES=CHUNK_TILES,
        LIST_DEPTH=LIST_DEPTH,
        MIN_WORK=MIN_WORK,
        SEQ_BLOCK=SEQ_BLOCK,
        DENSE_WORK=DENSE_WORK,
        SCAN_STAGES=SCAN_STAGES,
        DENSE_STAGES=DENSE_STAGES,
        GATHER_STAGES=GATHER_STAGES,
        SOFT_CAP=SOFT_CAP,
        COMPUTE=COMPUTE,
        HAS_Q_SCALE=HAS_Q_SCALE,
        HAS_K_SCALE=HAS_K_SCALE,
        VALUE_MEAN=VALUE_MEAN,
        COUNT=COUNT,
        IN_PLACE=IN_PLACE,
    )
