"""Integers of queries, as the scan of copies multiplies them with codes, on the device.

    s = max |R q| / 127,  c = round(R q / s)
    score of a copy = softmax_scale * (q . mu + s * step * (c . code - 7.5 sum c))

Copies are of what is stored, whatever its scale: that of keys is a factor on q, that of values one on the output.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_toptheta.kernels.gpu.copies import DEPTH, load_centre
from vllm_toptheta.kernels.gpu.query_codes import MIDDLE, quantized, store_query_codes


@triton.jit
def turn_queries(tokens, queries, copies, block_row, seq, kv_head, shape):
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
    step, lower, upper = quantized(lower, upper)
    target = copies.query_codes + (row * queries.num_heads + head[:, None]) * HEAD_SIZE + offs_c[None, :]
    store_query_codes(target, lower, upper, mask_g, HALF)
    terms = copies.query_terms + (row * queries.num_heads + head) * 3
    tl.store(terms, queries.softmax_scale * step, mask=mask_g)
    tl.store(terms + 1, (tl.sum(lower, axis=1) + tl.sum(upper, axis=1)) * MIDDLE, mask=mask_g)
    tl.store(terms + 2, queries.softmax_scale * offset, mask=mask_g)
