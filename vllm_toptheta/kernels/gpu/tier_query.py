"""The Triton kernel of tiers that makes integers of queries, or does all work.

    s = max |R q| / 127,  c = round(R q / s)
    score of a copy = softmax_scale * (q . mu + s * step * (c . code - 7.5 sum c))

Copies are of what is stored, whatever its scale: that of keys is a factor on q, that of values one on the output.

A step of few tokens, or of short sequences, takes longer to scan and walk than all of its keys take to read: this
kernel does the whole work of mode `values` then, as `shadow_query.query_kernel` does, and the second one nothing.

In passing, pages that new tokens fill get their copies.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_toptheta.kernels.gpu.copies import DEPTH, copy_tokens, load_centre
from vllm_toptheta.kernels.gpu.schedule import dense_length, load_lengths, reads_all_keys
from vllm_toptheta.kernels.gpu.shadow_query import MIDDLE, QUERY_LEVELS
from vllm_toptheta.kernels.gpu.split import split_step
from vllm_toptheta.kernels.gpu.thresholds import keeps_all


@triton.jit
def _turn_queries(tokens, queries, copies, block_row, seq, kv_head, shape):
    """Write the codes and terms of the queries of a sequence and a kv head."""
    HEAD_SIZE: tl.constexpr = shape.HEAD_SIZE
    HALF: tl.constexpr = HEAD_SIZE // 2
    row = seq.to(tl.int64)
    offs_g = tl.arange(0, 16)
    offs_c = tl.arange(0, HALF)
    mask_g = offs_g < shape.GROUP
    head = kv_head * shape.GROUP + offs_g
    lower = tl.zeros((16, HALF), dtype=tl.float32)
    upper = tl.zeros((16, HALF), dtype=tl.float32)
    offset = tl.zeros((16,), dtype=tl.float32)
    for first in range(0, HEAD_SIZE, DEPTH):
        offs_d = first + tl.arange(0, DEPTH)
        query = tl.load(
            queries.query + row * queries.stride_seq + head[:, None] * queries.stride_head + offs_d[None, :],
            mask=mask_g[:, None],
            other=0.0,
        ).to(tl.float32)
        if queries.q_scale is not None:
            query *= tl.load(queries.q_scale)
        if queries.k_scale is not None:
            query *= tl.load(queries.k_scale)
        offset += tl.sum(query * load_centre(tokens, block_row, kv_head, offs_d)[None, :], axis=1)
        part = copies.rotation + offs_c[None, :] * HEAD_SIZE + offs_d[:, None]
        lower += tl.dot(query, tl.load(part), input_precision="tf32x3")
        upper += tl.dot(query, tl.load(part + HALF * HEAD_SIZE), input_precision="tf32x3")
    step = tl.max(tl.maximum(tl.abs(lower), tl.abs(upper)), axis=1) / QUERY_LEVELS
    step = tl.where(step > 0.0, step, 1.0)
    lower = tl.floor(lower / step[:, None] + 0.5)
    upper = tl.floor(upper / step[:, None] + 0.5)
    target = copies.query_codes + (row * queries.num_heads + head[:, None]) * HEAD_SIZE + offs_c[None, :]
    # by way of int32: a float that is converted to int8 saturates on some targets only
    tl.store(target, lower.to(tl.int32).to(tl.int8), mask=mask_g[:, None])
    tl.store(target + HALF, upper.to(tl.int32).to(tl.int8), mask=mask_g[:, None])
    terms = copies.query_terms + (row * queries.num_heads + head) * 3
    tl.store(terms, queries.softmax_scale * step, mask=mask_g)
    tl.store(terms + 1, (tl.sum(lower, axis=1) + tl.sum(upper, axis=1)) * MIDDLE, mask=mask_g)
    tl.store(terms + 2, queries.softmax_scale * offset, mask=mask_g)


# lengths and counts change from batch to batch: one compilation serves them all
@triton.jit(
    do_not_specialize=(
        "num_seqs",
        "max_dense_len",
        "min_step_tokens",
        "stride_table_seq",
        "few_tokens",
        "short_length",
    )
)
def tier_query_kernel(
    tokens,  # Tokens
    queries,  # Queries
    copies,  # Copies, whose codes and terms of queries are written
    lists,  # Lists of survivors
    pieces,  # Pieces
    counts,  # Counts
    num_seqs,
    max_dense_len,
    min_step_tokens,
    stride_table_seq,
    few_tokens,
    short_length,
    shape: tl.constexpr,  # Shape
    schedule: tl.constexpr,  # Schedule of a step of which all keys are read
    tiling: tl.constexpr,  # Tiling of the same
    TOKENS: tl.constexpr,  # that are copied at a time; 0: queries and copies are another kernel's
    EARLY_QUERY: tl.constexpr,
    EARLY_SPLIT: tl.constexpr,
):
    BLOCK_SIZE: tl.constexpr = shape.BLOCK_SIZE
    kv_head = tl.program_id(0).to(tl.int64)
    program = tl.program_id(1)
    if EARLY_SPLIT:
        tl.extra.cuda.gdc_launch_dependents()
    seq_lens = load_lengths(tokens.seq_lens, num_seqs, schedule.SEQ_BLOCK)
    if reads_all_keys(seq_lens, few_tokens, short_length):
        split_step(
            tokens, queries, lists, pieces, counts, num_seqs, max_dense_len, min_step_tokens, stride_table_seq, shape,
            schedule, tiling, EARLY_QUERY,
        )  # fmt: skip
        if counts.keys_read is not None and program == 0:
            tl.atomic_add(counts.keys_read + kv_head, tl.sum(seq_lens.to(tl.int64), axis=0), sem="relaxed")
    elif TOKENS > 0:
        max_dense_len = dense_length(tokens, num_seqs, max_dense_len, min_step_tokens, schedule.SEQ_BLOCK)
        seq = program
        while seq < num_seqs:
            seq_len = tl.load(tokens.seq_lens + seq)
            if keeps_all(tokens, seq, seq_len, num_seqs, max_dense_len) == 0:
                block_row = tokens.block_table + seq.to(tl.int64) * stride_table_seq
                _turn_queries(tokens, queries, copies, block_row, seq, kv_head, shape)
            seq += tl.num_programs(1)
    if TOKENS > 0:
        # from the other end, because the last programs have the least to do
        seq = tl.num_programs(1) - 1 - program
        while seq < num_seqs:
            seq_len = tl.load(tokens.seq_lens + seq)
            if (seq_len > 0) & (seq_len % BLOCK_SIZE == 0):
                block_row = tokens.block_table + seq.to(tl.int64) * stride_table_seq
                for first in range(seq_len - BLOCK_SIZE, seq_len, TOKENS):
                    copy_tokens(
                        tokens, copies, block_row, kv_head, first, seq_len, BLOCK_SIZE, shape.HEAD_SIZE, TOKENS
                    )  # fmt: skip
            seq += tl.num_programs(1)
    if EARLY_QUERY:
        # whoever waits for this kernel relies on the thresholds of the one before it too
        tl.extra.cuda.gdc_wait()
