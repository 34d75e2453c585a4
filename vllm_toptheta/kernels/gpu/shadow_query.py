"""The Triton kernel of mode `shadow` that makes what the scan compares codes with, or does all work.

Where keys and values have copies, `tier_query.py` says what that is. By shadow keys, with p = decoder @ q for a query
head, one step per head turns p into integers of 8 bits, and the comparison of a shadow key's score with threshold minus
margin becomes one of integers:

    step = max |p| / 127,  c = round(p / step)
    softmax_scale * (q . key_mean + step * c . (code - 7.5)) >= threshold - margin     <=>     c . code >= floor

A soft cap only bends the right side, since it keeps the order of scores.

A step of few tokens, or of short sequences, takes longer to scan and walk than all of its keys take to read. When a
CUDA graph is captured, nobody knows which steps those will be, and one more launch would cost most of what is won. So
this kernel does the whole work of mode `values` then (`split.py`), and the second one nothing.

In passing, pages that new tokens fill get their codes, or their copies.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_toptheta.kernels.gpu.codes import DEPTH, encode_tokens
from vllm_toptheta.kernels.gpu.copies import copy_tokens
from vllm_toptheta.kernels.gpu.query_codes import MIDDLE, quantized, store_query_codes
from vllm_toptheta.kernels.gpu.schedule import dense_length, load_lengths, reads_all_keys
from vllm_toptheta.kernels.gpu.split import count_all_keys, split_step
from vllm_toptheta.kernels.gpu.thresholds import keeps_all, load_thresholds
from vllm_toptheta.kernels.gpu.tier_query import turn_queries

NO_CODES = tl.constexpr(1 << 30)  # a floor above every sum of products of codes


@triton.jit
def _project_queries(queries, shadow, seq, kv_head, shape, EARLY_QUERY: tl.constexpr):
    """Write the codes and floors of the queries of a sequence and a kv head."""
    HEAD_SIZE: tl.constexpr = shape.HEAD_SIZE
    CODE_BYTES: tl.constexpr = shape.CODE_BYTES
    row = seq.to(tl.int64)
    query_ptr = queries.query + row * queries.stride_seq
    query_codes_ptr = shadow.query_codes + row * queries.num_heads * 2 * CODE_BYTES
    floors_ptr = shadow.floors + row * queries.num_heads
    offs_g = tl.arange(0, 16)
    offs_c = tl.arange(0, CODE_BYTES)
    mask_g = offs_g < shape.GROUP
    head = kv_head * shape.GROUP + offs_g
    lower = tl.zeros((16, CODE_BYTES), dtype=tl.float32)
    upper = tl.zeros((16, CODE_BYTES), dtype=tl.float32)
    offset = tl.zeros((16,), dtype=tl.float32)
    for first_channel in range(0, shape.D_PAD, DEPTH):
        offs_d = first_channel + tl.arange(0, DEPTH)
        mask_d = offs_d < HEAD_SIZE
        query = tl.load(
            query_ptr + head[:, None] * queries.stride_head + offs_d[None, :],
            mask=mask_g[:, None] & mask_d[None, :],
            other=0.0,
        ).to(tl.float32)
        if queries.q_scale is not None:
            query *= tl.load(queries.q_scale)
        key_mean = tl.load(shadow.key_mean + kv_head * HEAD_SIZE + offs_d, mask=mask_d, other=0.0)
        offset += tl.sum(query * key_mean[None, :], axis=1)
        decoder = shadow.decoder + (kv_head * 2 * CODE_BYTES + offs_c[None, :]) * HEAD_SIZE + offs_d[:, None]
        lower += tl.dot(query, tl.load(decoder, mask=mask_d[:, None], other=0.0), input_precision="tf32x3")
        decoder += CODE_BYTES * HEAD_SIZE
        upper += tl.dot(query, tl.load(decoder, mask=mask_d[:, None], other=0.0), input_precision="tf32x3")
    step, lower, upper = quantized(lower, upper)
    target = query_codes_ptr + head[:, None] * 2 * CODE_BYTES + offs_c[None, :]
    store_query_codes(target, lower, upper, mask_g, CODE_BYTES)

    if EARLY_QUERY:
        tl.extra.cuda.gdc_wait()
    threshold = load_thresholds(queries, seq, head, mask_g)
    wanted = threshold - tl.load(shadow.margin + head, mask=mask_g, other=0.0)
    if queries.logits_soft_cap is not None:
        soft_cap = queries.logits_soft_cap
        ratio = wanted / soft_cap
        inside = tl.minimum(tl.maximum(ratio, -0.9999999), 0.9999999)
        bent = soft_cap * 0.5 * tl.log((1.0 + inside) / (1.0 - inside))
        wanted = tl.where(ratio >= 1.0, 1.0e30, tl.where(ratio <= -1.0, -1.0e30, bent))
    offset -= step * MIDDLE * (tl.sum(lower, axis=1) + tl.sum(upper, axis=1))
    floor = tl.ceil((wanted / queries.softmax_scale - offset) / step)
    # finite, and within what an integer holds
    floor = tl.minimum(tl.maximum(floor, -1.0 * NO_CODES), 1.0 * NO_CODES)
    tl.store(floors_ptr + head, floor.to(tl.int32), mask=mask_g)


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
def query_kernel(
    tokens,  # Tokens
    queries,  # Queries
    keys,  # Shadow or Copies, of which what is compared with codes is written
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
    BY_COPIES: tl.constexpr,  # whether most keys are read as copies, not as shadow keys
    TOKENS: tl.constexpr,  # that are encoded or copied at a time; 0: queries and copies are another kernel's
    EARLY_QUERY: tl.constexpr,
    EARLY_SPLIT: tl.constexpr,
):
    kv_head, program = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if EARLY_SPLIT:
        tl.extra.cuda.gdc_launch_dependents()
    seq_lens = load_lengths(tokens.seq_lens, num_seqs, schedule.SEQ_BLOCK)
    if reads_all_keys(seq_lens, few_tokens, short_length):
        split_step(
            tokens, queries, lists, pieces, counts, num_seqs, max_dense_len, min_step_tokens, stride_table_seq, shape,
            schedule, tiling, EARLY_QUERY,
        )  # fmt: skip
        count_all_keys(counts, kv_head, program, seq_lens)
    elif TOKENS > 0:
        max_dense_len = dense_length(tokens, num_seqs, max_dense_len, min_step_tokens, schedule.SEQ_BLOCK)
        seq = program
        while seq < num_seqs:
            seq_len = tl.load(tokens.seq_lens + seq)
            if keeps_all(tokens, seq, seq_len, num_seqs, max_dense_len) == 0:
                if BY_COPIES:
                    block_row = tokens.block_table + seq.to(tl.int64) * stride_table_seq
                    turn_queries(tokens, queries, keys, block_row, seq, kv_head, shape)
                else:
                    _project_queries(queries, keys, seq, kv_head, shape, EARLY_QUERY)
            seq += tl.num_programs(1)
    if TOKENS > 0:
        # from the other end, because the last programs have the least to do
        seq = tl.num_programs(1) - 1 - program
        while seq < num_seqs:
            seq_len = tl.load(tokens.seq_lens + seq)
            if (seq_len > 0) & (seq_len % shape.BLOCK_SIZE == 0):
                block_row = tokens.block_table + seq.to(tl.int64) * stride_table_seq
                for first in range(seq_len - shape.BLOCK_SIZE, seq_len, TOKENS):
                    if BY_COPIES:
                        copy_tokens(
                            tokens, keys, block_row, kv_head, first, seq_len, shape.BLOCK_SIZE, shape.HEAD_SIZE, TOKENS
                        )  # fmt: skip
                    else:
                        encode_tokens(
                            tokens, keys, queries.k_scale, block_row, kv_head, first, seq_len, shape.BLOCK_SIZE,
                            shape.HEAD_SIZE, shape.D_PAD, shape.CODE_BYTES, TOKENS,
                        )  # fmt: skip
            seq += tl.num_programs(1)
    if BY_COPIES and EARLY_QUERY and (kv_head + program == 0):
        # whoever waits for this kernel relies on the one before it too; one program that waits is enough
        tl.extra.cuda.gdc_wait()
