"""What the loops of the decode kernels do with a tile of tokens: find it in the pages, score its keys, load its values.

Scores are in natural units, exponentials are taken in base 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

ROW_ALIGNMENT = tl.constexpr(16)  # elements
MIN_COLUMNS = 8  # of a product on tensor cores
LOG2_E = tl.constexpr(1.4426950408889634)
DISCARDED = tl.constexpr(-2.0e30)  # score of a key that a head does not see or keep


@triton.jit
def tile_scores(query, key_base, row, valid, scale, soft_cap, shape):
    """Scores of a tile of keys, [TILE, G_PAD] float32.

    Args:
        query: [D_PAD, G_PAD].
        key_base: Where the keys of the kv head start.
        row: [TILE] int64, where each token's keys and values start.
        valid: [TILE], or None: what the others score is thrown away then, and their rows only have to be there.
        scale: Factor on q . k.
        soft_cap: Of the scores, or None.
        shape: `Shape`.
    """
    offs_d = tl.arange(0, shape.D_PAD)
    key = _load_rows(key_base + row[:, None] + offs_d[None, :], valid, offs_d < shape.HEAD_SIZE, 0, shape)
    scores = tl.dot(key.to(query.dtype), query) * scale
    if soft_cap is not None:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1)
        scores = soft_cap * (1.0 - 2.0 / (tl.exp2(scores * (2.0 * LOG2_E / soft_cap)) + 1.0))
    return scores


@triton.jit
def load_query(queries, token, head, mask_g, shape):
    """The queries of new tokens, a scalar or [G_PAD], in a group's heads: [D_PAD, G_PAD], in the dtype of products."""
    offs_d = tl.arange(0, shape.D_PAD)
    row = token.to(tl.int64) * queries.stride_seq + head * queries.stride_head
    query = tl.load(
        queries.query + row[None, :] + offs_d[:, None],
        mask=mask_g[None, :] & (offs_d < shape.HEAD_SIZE)[:, None],
        other=0.0,
    )
    return query.to(tl.float16 if shape.FLOAT16 else tl.bfloat16)


@triton.jit
def score_scale(queries):
    """Factor on products of stored queries and keys."""
    scale = queries.softmax_scale
    if queries.q_scale is not None:
        scale = scale * tl.load(queries.q_scale)
    if queries.k_scale is not None:
        scale = scale * tl.load(queries.k_scale)
    return scale


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
def load_values(value_base, row, mask, dtype: tl.constexpr, shape):
    """Value rows that start at `row`, as columns, [D_PAD, TILE]; `mask` may be None.

    As the product takes them: rows that are turned between the load and the product are not copied to shared memory
    while others are worked on, but wait in registers, a tile of which is 32 of a thread's.
    """
    offs_d = tl.arange(0, shape.D_PAD)
    value = _load_rows(value_base + row[None, :] + offs_d[:, None], mask, offs_d < shape.HEAD_SIZE, 1, shape)
    return value.to(dtype)


@triton.jit
def _load_rows(pointer, row_mask, channel_mask, ROW_AXIS: tl.constexpr, shape):
    """Load a tile's keys or values, 0 where there is no such row, of a mask that may be None, or no such channel."""
    if row_mask is not None:
        mask = tl.expand_dims(row_mask, 1 - ROW_AXIS)
        if shape.D_PAD != shape.HEAD_SIZE:
            mask = mask & tl.expand_dims(channel_mask, ROW_AXIS)
        return tl.load(pointer, mask=mask, other=0.0)
    elif shape.D_PAD != shape.HEAD_SIZE:
        return tl.load(pointer, mask=tl.expand_dims(channel_mask, ROW_AXIS), other=0.0)
    else:
        return tl.load(pointer)


# the constant is the policy `createpolicy.fractional.L2::evict_last` with fraction 1
_STORE_ASM: tl.constexpr = tl.constexpr(
    "{ .reg .pred p; .reg .b64 keep; setp.ne.b32 p, $3, 0; mov.b64 keep, 0x14F0000000000000; "
    "@p st.global.L2::cache_hint.b32 [$1], $2, keep; mov.b32 $0, 0; }"
)


@triton.jit
def store_where(pointer, value, mask, ON_GPU: tl.constexpr):
    """Store 32-bit elements; on a GPU every thread stores what it holds.

    `tl.store` would move the elements to other threads first, for the sake of coalescing, through shared memory and
    several barriers. Few elements pass the mask here, so there is nothing to coalesce. They are asked to stay in the L2
    cache, which keys would flush long before they are read: under a full stream of keys, memory answers late.
    """
    if ON_GPU:
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
