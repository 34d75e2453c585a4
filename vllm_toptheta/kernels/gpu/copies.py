"""Copies of keys and values in the page tails, and the kernel that writes them (`reference.tiers` has the formulas).

A page's copies are written when the page is full, by whichever step fills it, from the keys and values in the page and
the first keys of the sequence, all as they are stored, scales left out: a step repeated writes the same bytes.
`write_copies` does so for steps that fill any number of pages, `tiers.decode` for the page that a decoded token fills.

vLLM shares the pages of a prefix as soon as they are scheduled, so a sequence may stand on pages that another one fills
in the same step. All copies of a step are written before any of them is scanned.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_toptheta.kernels.codec import LARGEST_STEP, LEAST_STEP, NUM_LEVELS, VALUE_LEVELS
from vllm_toptheta.kernels.contract import Layer, LayerCache, TailStep
from vllm_toptheta.kernels.gpu.cuda.tier_copy import launch_tier_copy
from vllm_toptheta.kernels.gpu.cuda.tier_split import TierLoader
from vllm_toptheta.kernels.gpu.filled_pages import filled_pages
from vllm_toptheta.kernels.gpu.records import Copies, Tokens
from vllm_toptheta.limits import NUM_FIRST_ANCHORS

TOKENS_PER_STEP = 32
DEPTH = tl.constexpr(64)  # channels that are multiplied at a time
_FIRST_ANCHORS = tl.constexpr(NUM_FIRST_ANCHORS)
_LEAST_STEP = tl.constexpr(LEAST_STEP)
_LARGEST_STEP = tl.constexpr(LARGEST_STEP)
_KEY_HALF = tl.constexpr(NUM_LEVELS // 2)
_KEY_LAST = tl.constexpr(NUM_LEVELS - 1.0)
_VALUE_HALF = tl.constexpr(VALUE_LEVELS // 2)
_VALUE_LAST = tl.constexpr(VALUE_LEVELS - 1.0)
VALUE_MIDDLE = tl.constexpr((VALUE_LEVELS - 1) / 2)


@triton.jit
def load_centre(tokens, block_row, kv_head, offs_d):
    """Channels `offs_d` of the mean of a sequence's keys 1 to 15, float32."""
    offs_n = tl.arange(0, _FIRST_ANCHORS)
    start = tl.load(block_row).to(tl.int64) * tokens.stride_block + kv_head * tokens.stride_head
    rows = tokens.kv_cache + start + offs_n[:, None] * tokens.stride_token + offs_d[None, :]
    keys = tl.load(rows, mask=(offs_n > 0)[:, None], other=0.0)
    return tl.sum(keys.to(tl.float32), axis=0) / (_FIRST_ANCHORS - 1)


@triton.jit
def _turned(
    tokens, rotation_ptr, block_row, kv_head, row, valid, first_channel, CENTRED: tl.constexpr, WIDTH: tl.constexpr,
    TOKENS: tl.constexpr, HEAD_SIZE: tl.constexpr,
):  # fmt: skip
    """Channels from `first_channel` on of rotated rows, [TOKENS, WIDTH] float32; keys are centred, values are not."""
    offs_c = first_channel + tl.arange(0, WIDTH)
    turned = tl.zeros((TOKENS, WIDTH), dtype=tl.float32)
    for first in range(0, HEAD_SIZE, DEPTH):
        offs_d = first + tl.arange(0, DEPTH)
        rows = tl.load(row[:, None] + offs_d[None, :], mask=valid[:, None], other=0.0).to(tl.float32)
        if CENTRED:
            rows -= load_centre(tokens, block_row, kv_head, offs_d)[None, :]
        part = tl.load(rotation_ptr + offs_c[None, :] * HEAD_SIZE + offs_d[:, None])
        # as exact as float32, on tensor cores
        turned += tl.dot(rows, part, input_precision="tf32x3")
    return turned


@triton.jit
def _largest(values):
    return tl.max(tl.abs(values), axis=1)


@triton.jit
def _as_float16(step):
    return tl.minimum(tl.maximum(step, _LEAST_STEP), _LARGEST_STEP).to(tl.float16)


@triton.jit
def _key_codes(turned, step):
    return tl.minimum(tl.maximum(tl.floor(turned / step[:, None] + _KEY_HALF), 0.0), _KEY_LAST)


@triton.jit
def _value_codes(turned, largest):
    return tl.minimum(tl.maximum(tl.floor(2.0 * turned / largest[:, None] + _VALUE_HALF), 0.0), _VALUE_LAST)


@triton.jit
def copy_tokens(
    tokens, copies, block_row, kv_head, first, end, BLOCK_SIZE: tl.constexpr, HEAD_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """Write the copies of the tokens from `first` to `end`, at most TOKENS.

    Args:
        tokens, copies: `Tokens`, `Copies`.
        block_row: [max_blocks] int32, of the sequence.
        kv_head: int64.
        first, end: Positions.
    """
    HALF: tl.constexpr = HEAD_SIZE // 2
    QUARTER: tl.constexpr = HEAD_SIZE // 4
    position = first + tl.arange(0, TOKENS)
    valid = position < end
    block = tl.load(block_row + position // BLOCK_SIZE, mask=valid, other=0).to(tl.int64)
    offset = position % BLOCK_SIZE
    row = tokens.kv_cache + block * tokens.stride_block + kv_head * tokens.stride_head + offset * tokens.stride_token
    target = block * copies.stride_block + kv_head * copies.stride_head
    steps = copies.steps + target // 2 + BLOCK_SIZE * (HALF + QUARTER) // 2 + offset

    lower = _turned(
        tokens, copies.rotation, block_row, kv_head, row, valid, 0, True, HALF, TOKENS, HEAD_SIZE
    )  # fmt: skip
    upper = _turned(
        tokens, copies.rotation, block_row, kv_head, row, valid, HALF, True, HALF, TOKENS, HEAD_SIZE
    )  # fmt: skip
    step = _as_float16(tl.maximum(_largest(lower), _largest(upper)) / _KEY_HALF)
    tl.store(steps, step, mask=valid)
    step = step.to(tl.float32)
    packed = _key_codes(lower, step).to(tl.int32) | (_key_codes(upper, step).to(tl.int32) << 4)
    offs_c = tl.arange(0, HALF)
    codes = copies.codes + (target + offset * HALF)[:, None] + offs_c[None, :]
    tl.store(codes, packed.to(tl.uint8), mask=valid[:, None])

    row += HEAD_SIZE
    offs_q = tl.arange(0, QUARTER)
    largest = tl.zeros((TOKENS,), dtype=tl.float32) + _LEAST_STEP
    for quarter in tl.static_range(4):
        turned = _turned(
            tokens, copies.rotation, block_row, kv_head, row, valid, quarter * QUARTER, False, QUARTER, TOKENS,
            HEAD_SIZE,
        )  # fmt: skip
        largest = tl.maximum(largest, _largest(turned))
    square = tl.zeros((TOKENS,), dtype=tl.float32)
    overlap = tl.zeros((TOKENS,), dtype=tl.float32)
    packed = tl.zeros((TOKENS, QUARTER), dtype=tl.int32)
    for quarter in tl.static_range(4):
        # once more: all four would be half of the registers
        turned = _turned(
            tokens, copies.rotation, block_row, kv_head, row, valid, quarter * QUARTER, False, QUARTER, TOKENS,
            HEAD_SIZE,
        )  # fmt: skip
        level = _value_codes(turned, largest)
        square += tl.sum(turned * turned, axis=1)
        overlap += tl.sum(turned * (level - VALUE_MIDDLE), axis=1)
        packed |= level.to(tl.int32) << (2 * quarter)
    tl.store(steps + BLOCK_SIZE, _as_float16(square / tl.maximum(overlap, _LEAST_STEP)), mask=valid)
    codes = copies.codes + (target + BLOCK_SIZE * HALF + offset * QUARTER)[:, None] + offs_q[None, :]
    tl.store(codes, packed.to(tl.uint8), mask=valid[:, None])


@triton.jit(do_not_specialize=("stride_table_seq",))
def _write_copies_kernel(
    tokens,  # Tokens
    copies,  # Copies
    query_start_loc_ptr,  # [num_seqs + 1] int32
    stride_table_seq,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    seq = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    first_page, end_page = filled_pages(tokens, query_start_loc_ptr, seq, BLOCK_SIZE)
    start, end = first_page * BLOCK_SIZE, end_page * BLOCK_SIZE
    for first in range(start + tl.program_id(2) * TOKENS, end, tl.num_programs(2) * TOKENS):
        block_row = tokens.block_table + seq * stride_table_seq
        copy_tokens(tokens, copies, block_row, kv_head, first, end, BLOCK_SIZE, HEAD_SIZE, TOKENS)


def write_copies(step: TailStep, cache: LayerCache, layer: Layer, loader: TierLoader | None = None) -> None:
    """Write the copies of every page that this step's tokens fill; see `tails.write_tails`."""
    if layer.tiers is None or cache.codes is None:
        return
    tokens, copies = Tokens.of(step, cache), Copies.of(layer.tiers, cache.codes)
    if loader is not None:
        tokens = tokens._replace(query_start_loc=step.query_start_loc)
        launch_tier_copy(loader, tokens, copies, max_query_len=step.max_query_len)
        return
    _, num_kv_heads, block_size, content = cache.kv_cache.shape
    num_programs = triton.cdiv(step.max_query_len + block_size - 1, TOKENS_PER_STEP)
    _write_copies_kernel[(len(step.seq_lens), num_kv_heads, num_programs)](
        tokens,
        copies,
        step.query_start_loc,
        step.block_table.stride(0),
        BLOCK_SIZE=block_size,
        HEAD_SIZE=content // 2,
        TOKENS=TOKENS_PER_STEP,
        num_warps=4,
    )
