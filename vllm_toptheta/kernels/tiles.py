"""What the loops of the decode kernels do with a tile of tokens: find it in the pages, score its keys, load its values.

Scores are in natural units, exponentials are taken in base 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_toptheta import limits

ROW_ALIGNMENT = tl.constexpr(16)  # elements
LOG2_E = tl.constexpr(1.4426950408889634)
DISCARDED = tl.constexpr(-2.0e30)  # score of a key that a head does not see or keep
HIGHEST = tl.constexpr(1.0e30)  # magnitude of a threshold
MAX_LOG_SCALE = tl.constexpr(limits.MAX_LOG_SCALE)


@triton.jit
def tile_scores(
    query,  # [D_PAD, G_PAD]
    key_base,
    row,  # [TILE] int64, where each token's keys and values start
    valid,  # [TILE]
    scale,
    soft_cap,
    HEAD_SIZE: tl.constexpr,
    D_PAD: tl.constexpr,
    SOFT_CAP: tl.constexpr,
):
    """Scores of a tile of keys, [TILE, G_PAD] float32."""
    offs_d = tl.arange(0, D_PAD)
    mask = valid[:, None]
    if D_PAD != HEAD_SIZE:
        mask = mask & (offs_d < HEAD_SIZE)[None, :]
    key = tl.load(key_base + row[:, None] + offs_d[None, :], mask=mask, other=0.0)
    scores = tl.dot(key.to(query.dtype), query) * scale
    if SOFT_CAP:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1)
        scores = soft_cap * (1.0 - 2.0 / (tl.exp2(scores * (2.0 * LOG2_E / soft_cap)) + 1.0))
    return scores


@triton.jit
def load_blocks(block_row, start, end, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Physical blocks of a tile of tokens: of each of its pages where pages fill the tile, else of each token."""
    if TILE % BLOCK_SIZE == 0:
        page = start // BLOCK_SIZE + tl.arange(0, TILE // BLOCK_SIZE)
        return tl.load(block_row + page, mask=page * BLOCK_SIZE < end, other=0, eviction_policy="evict_last")
    else:
        positions = start + tl.arange(0, TILE)
        return tl.load(block_row + positions // BLOCK_SIZE, mask=positions < end, other=0, eviction_policy="evict_last")


@triton.jit
def tile_rows(blocks, start, stride_kv_block, stride_kv_token, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Where the tokens of a tile start, [TILE] int64, from what `load_blocks` returned."""
    if TILE % BLOCK_SIZE == 0:
        offset = tl.arange(0, BLOCK_SIZE) * stride_kv_token
        rows = tl.reshape((blocks.to(tl.int64) * stride_kv_block)[:, None] + offset[None, :], (TILE,))
        # the reshape hides it, and without it keys would be loaded element by element
        return tl.multiple_of(rows, ROW_ALIGNMENT)
    else:
        offset = (start + tl.arange(0, TILE)) % BLOCK_SIZE * stride_kv_token
        return blocks.to(tl.int64) * stride_kv_block + offset


@triton.jit
def load_values(value_base, row, mask, dtype: tl.constexpr, HEAD_SIZE: tl.constexpr, D_PAD: tl.constexpr):
    """Value rows that start at `row`, [TILE, D_PAD]."""
    offs_d = tl.arange(0, D_PAD)
    mask = mask[:, None]
    if D_PAD != HEAD_SIZE:
        mask = mask & (offs_d < HEAD_SIZE)[None, :]
    return tl.load(value_base + row[:, None] + offs_d[None, :], mask=mask, other=0.0).to(dtype)


@triton.jit
def thresholds_at(
    coefficients_ptr,  # [num_heads, degree + 1] float32
    head,  # [G_PAD]
    head_mask,
    seq_len,
    min_length,
    max_length,
    NUM_COEFFICIENTS: tl.constexpr,
):
    """Thresholds at `seq_len`, [G_PAD] float32; rows behind the group's last head keep nothing."""
    log_length = tl.log(tl.minimum(tl.maximum(seq_len, min_length), max_length).to(tl.float32))
    threshold = tl.zeros_like(head).to(tl.float32)
    for power in tl.static_range(NUM_COEFFICIENTS - 1, -1, -1):
        coefficient = tl.load(coefficients_ptr + head * NUM_COEFFICIENTS + power, mask=head_mask, other=0.0)
        threshold = threshold * log_length + coefficient
    # finite, so that differences of two of them are no NaN, and above what is discarded
    threshold = tl.minimum(tl.maximum(threshold, -HIGHEST), HIGHEST)
    return tl.where(head_mask, threshold, HIGHEST)


@triton.jit
def scales_at(
    log_scale_ptr,  # [num_heads, 2] float32
    head,  # [G_PAD]
    head_mask,
    seq_len,
    min_length,
    max_length,
):
    """r at `seq_len`, [G_PAD] float32, from ln r = c_0 + c_1 ln n; 0 behind the group's last head."""
    log_length = tl.log(tl.minimum(tl.maximum(seq_len, min_length), max_length).to(tl.float32))
    constant = tl.load(log_scale_ptr + head * 2, mask=head_mask, other=0.0)
    slope = tl.load(log_scale_ptr + head * 2 + 1, mask=head_mask, other=0.0)
    scale = tl.exp(tl.minimum(constant + slope * log_length, MAX_LOG_SCALE))
    return tl.where(head_mask, scale, 0.0)


# the constant is the policy `createpolicy.fractional.L2::evict_last` with fraction 1
_STORE_ASM: tl.constexpr = tl.constexpr(
    "{ .reg .pred p; .reg .b64 keep; setp.ne.b32 p, $3, 0; mov.b64 keep, 0x14F0000000000000; "
    "@p st.global.L2::cache_hint.b32 [$1], $2, keep; mov.b32 $0, 0; }"
)


@triton.jit
def store_where(pointer, value, mask, IN_PLACE: tl.constexpr):
    """Store 32-bit elements; `IN_PLACE` lets every thread store what it holds.

    `tl.store` would move the elements to other threads first, for the sake of coalescing, through shared memory and
    several barriers. Few elements pass the mask here, so there is nothing to coalesce. They are asked to stay in the L2
    cache, which keys would flush long before they are read: under a full stream of keys, memory answers late.
    """
    if IN_PLACE:
        tl.inline_asm_elementwise(
            _STORE_ASM,
            "=r,l,r,r",
            [pointer, value, mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.store(pointer, value, mask=mask)
