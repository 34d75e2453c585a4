"""The first of the three Triton kernels behind `shadow.decode_shadow`: what the scan compares codes with, or all work.

With p = decoder @ q for a query head, one step per head turns p into integers of 8 bits, and the comparison of a shadow
key's score with threshold minus margin becomes one of integers:

    step = max |p| / 127,  c = round(p / step)
    softmax_scale * (q . key_mean + step * c . (code - 7.5)) >= threshold - margin     <=>     c . code >= floor

A soft cap only bends the right side, since it keeps the order of scores.

A step of few tokens, or of short sequences, takes longer to scan and walk than all of its keys take to read. When a
CUDA graph is captured, nobody knows which steps those will be, and one more launch would cost most of what is won. So
this kernel does the whole work of mode `values` then (`split.py`), and the second one nothing.

In passing, pages that new tokens fill get their codes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_toptheta.kernels.gpu.codes import DEPTH, encode_tokens
from vllm_toptheta.kernels.gpu.rules import curve_of, dense_length_of, level_of
from vllm_toptheta.kernels.gpu.schedule import load_lengths, reads_all_keys
from vllm_toptheta.kernels.gpu.split import split_step
from vllm_toptheta.kernels.gpu.tiles import thresholds_at

NO_CODES = tl.constexpr(1 << 30)  # a floor above every sum of products of codes
MIDDLE = tl.constexpr(7.5)
QUERY_LEVELS = tl.constexpr(127.0)


@triton.jit
def _project_queries(
    query_ptr,  # [num_heads, head_size], of the sequence
    query_codes_ptr,  # [num_heads, 2 * CODE_BYTES] int8, written
    floors_ptr,  # [num_heads] int32, written
    coefficients_ptr,
    margin_ptr,
    decoder_ptr,
    key_mean_ptr,
    q_scale_ptr,
    rules_ptr,
    seq,
    seq_len,
    kv_head,
    num_seqs,
    num_heads,
    stride_query_head,
    min_length,
    max_length,
    softmax_scale,
    soft_cap,
    NUM_COEFFICIENTS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    D_PAD: tl.constexpr,
    CODE_BYTES: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    HAS_Q_SCALE: tl.constexpr,
):
    """Write the codes and floors of the queries of a sequence and a kv head."""
    offs_g = tl.arange(0, 16)
    offs_c = tl.arange(0, CODE_BYTES)
    mask_g = offs_g < GROUP
    head = kv_head * GROUP + offs_g
    lower = tl.zeros((16, CODE_BYTES), dtype=tl.float32)
    upper = tl.zeros((16, CODE_BYTES), dtype=tl.float32)
    offset = tl.zeros((16,), dtype=tl.float32)
    for first_channel in range(0, D_PAD, DEPTH):
        offs_d = first_channel + tl.arange(0, DEPTH)
        mask_d = offs_d < HEAD_SIZE
        query = tl.load(
            query_ptr + head[:, None] * stride_query_head + offs_d[None, :],
            mask=mask_g[:, None] & mask_d[None, :],
            other=0.0,
        ).to(tl.float32)
        if HAS_Q_SCALE:
            query *= tl.load(q_scale_ptr)
        key_mean = tl.load(key_mean_ptr + kv_head * HEAD_SIZE + offs_d, mask=mask_d, other=0.0)
        offset += tl.sum(query * key_mean[None, :], axis=1)
        decoder = decoder_ptr + (kv_head * 2 * CODE_BYTES + offs_c[None, :]) * HEAD_SIZE + offs_d[:, None]
        lower += tl.dot(query, tl.load(decoder, mask=mask_d[:, None], other=0.0), input_precision="tf32x3")
        decoder += CODE_BYTES * HEAD_SIZE
        upper += tl.dot(query, tl.load(decoder, mask=mask_d[:, None], other=0.0), input_precision="tf32x3")
    step = tl.max(tl.maximum(tl.abs(lower), tl.abs(upper)), axis=1) / QUERY_LEVELS
    step = tl.where(step > 0.0, step, 1.0)
    lower = tl.floor(lower / step[:, None] + 0.5)
    upper = tl.floor(upper / step[:, None] + 0.5)
    target = query_codes_ptr + head[:, None] * 2 * CODE_BYTES + offs_c[None, :]
    # by way of int32: a float that is converted to int8 saturates on some targets only
    tl.store(target, lower.to(tl.int32).to(tl.int8), mask=mask_g[:, None])
    tl.store(target + CODE_BYTES, upper.to(tl.int32).to(tl.int8), mask=mask_g[:, None])

    level = level_of(rules_ptr, seq, num_seqs)
    curve_ptr, shortest, longest = curve_of(
        rules_ptr, seq, coefficients_ptr, num_heads * NUM_COEFFICIENTS, min_length, max_length
    )
    wanted = thresholds_at(curve_ptr, head, mask_g, seq_len, shortest, longest, NUM_COEFFICIENTS)
    wanted -= tl.load(margin_ptr + level * num_heads + head, mask=mask_g, other=0.0)
    if SOFT_CAP:
        ratio = wanted / soft_cap
        inside = tl.minimum(tl.maximum(ratio, -0.9999999), 0.9999999)
        bent = soft_cap * 0.5 * tl.log((1.0 + inside) / (1.0 - inside))
        wanted = tl.where(ratio >= 1.0, 1.0e30, tl.where(ratio <= -1.0, -1.0e30, bent))
    offset -= step * MIDDLE * (tl.sum(lower, axis=1) + tl.sum(upper, axis=1))
    floor = tl.ceil((wanted / softmax_scale - offset) / step)
    # finite, and within what an integer holds
    floor = tl.minimum(tl.maximum(floor, -1.0 * NO_CODES), 1.0 * NO_CODES)
    tl.store(floors_ptr + head, floor.to(tl.int32), mask=mask_g)


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
    )
)
def query_kernel(
    query_ptr,  # [num_seqs, num_heads, head_size]
    kv_cache_ptr,  # [num_blocks, num_kv_heads, block_size, 2 * head_size]
    block_table_ptr,  # [num_seqs, max_blocks] int32
    seq_lens_ptr,  # [num_seqs] int32
    rules_ptr,  # [num_seqs, RULE_FIELDS] int32, or None
    coefficients_ptr,  # [num_levels, num_heads, NUM_COEFFICIENTS] float32
    q_scale_ptr,  # [1] float32
    k_scale_ptr,  # [1] float32
    list_ptr,  # [num_programs * num_kv_heads, LIST_DEPTH, TILE, GROUP + 1] int32
    order_ptr,  # [num_programs * num_kv_heads, 2, LIST_DEPTH * TILE] int32
    partial_output_ptr,  # [num_pieces * num_kv_heads, GROUP, head_size] float32
    partial_stats_ptr,  # [num_pieces * num_kv_heads, 3, GROUP] float32
    rows_read_ptr,  # [num_kv_heads] int64
    query_codes_ptr,  # [num_seqs, num_heads, 2 * CODE_BYTES] int8, written
    floors_ptr,  # [num_seqs, num_heads] int32, written
    margin_ptr,  # [num_levels, num_heads] float32
    decoder_ptr,  # [num_kv_heads, 2 * CODE_BYTES, head_size] float32
    key_mean_ptr,  # [num_kv_heads, head_size] float32
    codes_ptr,  # [num_blocks, num_kv_heads, block_size, CODE_BYTES] uint8
    encoder_ptr,  # [num_kv_heads, head_size, 2 * CODE_BYTES] float32
    code_offset_ptr,  # [num_kv_heads, 2 * CODE_BYTES] float32
    keys_read_ptr,  # [num_kv_heads] int64
    stride_query_seq,
    stride_query_head,
    stride_kv_block,
    stride_kv_head,
    stride_kv_token,
    stride_table_seq,
    stride_code_block,
    stride_code_head,
    num_seqs,
    min_sparse_context,
    few_tokens,
    short_length,
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
    CODE_BYTES: tl.constexpr,
    TOKENS: tl.constexpr,
    EARLY_SPLIT: tl.constexpr,
):
    kv_head = tl.program_id(0).to(tl.int64)
    program = tl.program_id(1)
    num_heads = tl.num_programs(0) * GROUP
    if EARLY_SPLIT:
        tl.extra.cuda.gdc_launch_dependents()
    seq_lens = load_lengths(seq_lens_ptr, num_seqs, SEQ_BLOCK)
    if reads_all_keys(seq_lens, few_tokens, short_length):
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
        if COUNT and program == 0:
            tl.atomic_add(keys_read_ptr + kv_head, tl.sum(seq_lens.to(tl.int64), axis=0), sem="relaxed")
    else:
        seq = program
        while seq < num_seqs:
            seq_len = tl.load(seq_lens_ptr + seq)
            if seq_len > dense_length_of(rules_ptr, seq, num_seqs, min_sparse_context):
                row = seq.to(tl.int64)
                _project_queries(
                    query_ptr + row * stride_query_seq,
                    query_codes_ptr + row * num_heads * 2 * CODE_BYTES,
                    floors_ptr + row * num_heads,
                    coefficients_ptr,
                    margin_ptr,
                    decoder_ptr,
                    key_mean_ptr,
                    q_scale_ptr,
                    rules_ptr,
                    seq,
                    seq_len,
                    kv_head,
                    num_seqs,
                    num_heads,
                    stride_query_head,
                    min_length,
                    max_length,
                    softmax_scale,
                    soft_cap,
                    NUM_COEFFICIENTS=NUM_COEFFICIENTS,
                    HEAD_SIZE=HEAD_SIZE,
                    GROUP=GROUP,
                    D_PAD=D_PAD,
                    CODE_BYTES=CODE_BYTES,
                    SOFT_CAP=SOFT_CAP,
                    HAS_Q_SCALE=HAS_Q_SCALE,
                )
            seq += tl.num_programs(1)
    # from the other end, because the last programs have the least to do
    seq = tl.num_programs(1) - 1 - program
    while seq < num_seqs:
        seq_len = tl.load(seq_lens_ptr + seq)
        if (seq_len > 0) & (seq_len % BLOCK_SIZE == 0):
            for first in range(seq_len - BLOCK_SIZE, seq_len, TOKENS):
                encode_tokens(
                    kv_cache_ptr,
                    codes_ptr,
                    encoder_ptr,
                    code_offset_ptr,
                    block_table_ptr + seq.to(tl.int64) * stride_table_seq,
                    k_scale_ptr,
                    kv_head,
                    first,
                    seq_len,
                    stride_kv_block,
                    stride_kv_head,
                    stride_kv_token,
                    stride_code_block,
                    stride_code_head,
                    BLOCK_SIZE=BLOCK_SIZE,
                    HEAD_SIZE=HEAD_SIZE,
                    D_PAD=D_PAD,
                    CODE_BYTES=CODE_BYTES,
                    TOKENS=TOKENS,
                    HAS_K_SCALE=HAS_K_SCALE,
                )
        seq += tl.num_programs(1)
