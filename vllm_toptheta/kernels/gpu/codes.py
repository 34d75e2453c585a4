"""The format of shadow keys in the page tails, and the kernel that writes it.

A shadow key is 4 bits of each of `num_channels` projections of a key, in steps:

    code = clamp(floor(code_offset + key @ encoder), 0, 15)

Byte j of a key's codes holds channel j in its lower half and channel j + num_channels // 2 in its upper half, so that a
mask and a shift take whole words apart. A page's codes are written when the page is full, by whichever step fills it,
from the keys in the page and nothing else: a step repeated writes the same bytes. `write_codes` does so for steps that
fill any number of pages, `shadow.decode` for the page that a decoded token fills.

vLLM shares the pages of a prefix as soon as they are scheduled, so a sequence may stand on pages that another one fills
in the same step. Codes depend on no other page, and all of a step are written before any of them is scanned.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_toptheta.kernels.codec import NUM_LEVELS
from vllm_toptheta.kernels.contract import Layer, LayerCache, TailStep
from vllm_toptheta.kernels.gpu.filled_pages import filled_pages
from vllm_toptheta.kernels.gpu.records import Shadow, Tokens, next_power_of_2

_LAST_LEVEL = tl.constexpr(NUM_LEVELS - 1.0)
TOKENS_PER_STEP = 64
DEPTH = tl.constexpr(64)  # channels of a key or query that are multiplied at a time


@triton.jit
def _codes_of(steps):
    """Codes of steps, int32."""
    return tl.minimum(tl.maximum(tl.floor(steps), 0.0), _LAST_LEVEL).to(tl.int32)


@triton.jit
def encode_tokens(
    tokens, shadow, k_scale_ptr, block_row, kv_head, first, end, BLOCK_SIZE: tl.constexpr, HEAD_SIZE: tl.constexpr,
    D_PAD: tl.constexpr, CODE_BYTES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Write the codes of the tokens from `first` to `end`, at most TOKENS.

    Args:
        tokens, shadow: `Tokens`, `Shadow`.
        k_scale_ptr: [1] float32, or None.
        block_row: [max_blocks] int32, of the sequence.
        kv_head: int64.
        first, end: Positions.
    """
    offs_c = tl.arange(0, CODE_BYTES)
    position = first + tl.arange(0, TOKENS)
    valid = position < end
    block = tl.load(block_row + position // BLOCK_SIZE, mask=valid, other=0).to(tl.int64)
    row = block * tokens.stride_block + kv_head * tokens.stride_head + position % BLOCK_SIZE * tokens.stride_token
    offset = shadow.code_offset + kv_head * 2 * CODE_BYTES + offs_c
    lower = tl.zeros((TOKENS, CODE_BYTES), dtype=tl.float32) + tl.load(offset)[None, :]
    upper = tl.zeros((TOKENS, CODE_BYTES), dtype=tl.float32) + tl.load(offset + CODE_BYTES)[None, :]
    for first_channel in range(0, D_PAD, DEPTH):
        offs_d = first_channel + tl.arange(0, DEPTH)
        mask_d = offs_d < HEAD_SIZE
        key = tl.load(
            tokens.kv_cache + row[:, None] + offs_d[None, :], mask=valid[:, None] & mask_d[None, :], other=0.0
        ).to(tl.float32)
        if k_scale_ptr is not None:
            key *= tl.load(k_scale_ptr)
        encoder = shadow.encoder + (kv_head * HEAD_SIZE + offs_d[:, None]) * (2 * CODE_BYTES) + offs_c[None, :]
        # as exact as float32, on tensor cores
        lower += tl.dot(key, tl.load(encoder, mask=mask_d[:, None], other=0.0), input_precision="tf32x3")
        upper += tl.dot(key, tl.load(encoder + CODE_BYTES, mask=mask_d[:, None], other=0.0), input_precision="tf32x3")
    target = block * shadow.stride_block + kv_head * shadow.stride_head + position % BLOCK_SIZE * CODE_BYTES
    tl.store(
        shadow.codes + target[:, None] + offs_c[None, :],
        (_codes_of(lower) | (_codes_of(upper) << 4)).to(tl.uint8),
        mask=valid[:, None],
    )


@triton.jit(do_not_specialize=("stride_table_seq",))
def _write_codes_kernel(
    tokens,  # Tokens
    shadow,  # Shadow
    query_start_loc_ptr,  # [num_seqs + 1] int32
    k_scale_ptr,  # [1] float32, or None
    stride_table_seq,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    D_PAD: tl.constexpr,
    CODE_BYTES: tl.constexpr,
    TOKENS: tl.constexpr,
):
    seq = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    first_page, end_page = filled_pages(tokens, query_start_loc_ptr, seq, BLOCK_SIZE)
    start, end = first_page * BLOCK_SIZE, end_page * BLOCK_SIZE
    for first in range(start + tl.program_id(2) * TOKENS, end, tl.num_programs(2) * TOKENS):
        block_row = tokens.block_table + seq * stride_table_seq
        encode_tokens(
            tokens, shadow, k_scale_ptr, block_row, kv_head, first, end, BLOCK_SIZE, HEAD_SIZE, D_PAD, CODE_BYTES,
            TOKENS,
        )  # fmt: skip


def write_codes(step: TailStep, cache: LayerCache, layer: Layer) -> None:
    """Write the shadow keys of every page that this step's tokens fill; see `tails.write_tails`."""
    if layer.shadow is None or cache.codes is None:
        return
    _, num_kv_heads, block_size, content = cache.kv_cache.shape
    num_programs = triton.cdiv(step.max_query_len + block_size - 1, TOKENS_PER_STEP)
    _write_codes_kernel[(len(step.seq_lens), num_kv_heads, num_programs)](
        Tokens.of(step, cache),
        Shadow.of(layer.shadow, cache.codes),
        step.query_start_loc,
        cache.k_scale,
        step.block_table.stride(0),
        BLOCK_SIZE=block_size,
        HEAD_SIZE=content // 2,
        D_PAD=next_power_of_2(content // 2),
        CODE_BYTES=layer.shadow.codec.code_bytes,
        TOKENS=TOKENS_PER_STEP,
        num_warps=4,
    )
