"""A piece of a sequence by its shadow keys, on the device: scan the codes, then walk the candidates.

The scan streams codes, and nothing else is done to a key than the comparison of a sum of products of integers with the
head's floor (`shadow_query.py`): no exponential, no scale, no list in order. Tokens are the rows of the products, so
codes become operands where they are, after a mask and a shift. Codes of several tokens share a row where one token's
do not fill it, and the group's heads appear once for each of them.

A row's candidates go to a list of that row, so that the loop has no prefix sum. Before a list can be full, the walk
puts the lists in order, one behind the other, and takes dense tiles of candidates: exact scores, comparison with the
threshold, softmax, and the values of survivors. Candidates that are not kept enter the denominator by their scores,
keys that are no candidates by their number,

    unread = r(n) * (number of keys - number of candidates) * exp(threshold - m)

where r is calibrated: about the mean of exp(s - threshold) over the scores of such keys, which falls with the length n.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_toptheta.kernels.gpu.registers import Piece, Walked
from vllm_toptheta.kernels.gpu.shadow_query import NO_CODES
from vllm_toptheta.kernels.gpu.tiles import (
    DISCARDED,
    LOG2_E,
    load_blocks,
    load_values,
    store_where,
    tile_rows,
    tile_scores,
)
from vllm_toptheta.limits import NUM_FIRST_ANCHORS, NUM_LAST_ANCHORS

_FIRST_ANCHORS = tl.constexpr(NUM_FIRST_ANCHORS)
_LAST_ANCHORS = tl.constexpr(NUM_LAST_ANCHORS)
ORDERED_AT_ONCE = tl.constexpr(8)  # layers of the lists that are ordered at a time
_HALVES_ASM: tl.constexpr = tl.constexpr(
    "{ .reg .b32 t; and.b32 $0, $2, 0x0F0F0F0F; shr.u32 t, $2, 4; and.b32 $1, t, 0x0F0F0F0F; }"
)


@triton.jit
def halves(codes, PACKED: tl.constexpr):
    """Lower and upper halves of bytes, int8; `PACKED` takes four at a time where Triton would take them one by one."""
    if PACKED:
        lower, upper = tl.inline_asm_elementwise(
            _HALVES_ASM, "=r,=r,r", [codes], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
        )
    else:
        lower, upper = (codes & 15).to(tl.int8), (codes >> 4).to(tl.int8)
    return lower, upper


@triton.jit
def _load_query(
    query_codes_ptr,  # [num_heads, 2 * CODE_BYTES] int8, from the half's first channel on
    head,  # [COLUMNS]
    token,  # [COLUMNS], which token of a row a column is for
    mask,  # [COLUMNS]
    CODE_BYTES: tl.constexpr,
    ROW_BYTES: tl.constexpr,
):
    """Half of the channels of the group's queries, [ROW_BYTES, COLUMNS], 0 where another token's codes are."""
    byte = tl.arange(0, ROW_BYTES)
    return tl.load(
        query_codes_ptr + head[None, :] * (2 * CODE_BYTES) + (byte % CODE_BYTES)[:, None],
        mask=mask[None, :] & (byte[:, None] // CODE_BYTES == token[None, :]),
        other=0,
    )


@triton.jit
def first_recent_of(seq_len, BLOCK_SIZE: tl.constexpr):
    """Where those keys of a sequence begin that are always read exactly.

    The page of the last token has no codes or copies yet, or only since this step.
    """
    return tl.minimum(seq_len - _LAST_ANCHORS, (seq_len - 1) // BLOCK_SIZE * BLOCK_SIZE)


@triton.jit
def order_lists(
    block_row,
    list_ptr,  # [LIST_DEPTH, TILE, ENTRY] int32, an entry's last number is a position
    order_ptr,  # [LIST_DEPTH * TILE] int32, slots (block * block_size + offset)
    entry_ptr,  # [LIST_DEPTH * TILE] int32, where entries of the list start; None where they are positions alone
    list_length,  # [TILE]
    depth,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    ENTRY: tl.constexpr,
):
    """Number what all lanes have listed one after the other, and look up the slots, all at the same time."""
    lane = tl.arange(0, TILE)
    first_index = tl.cumsum(list_length, axis=0) - list_length
    for first_depth in range(0, depth, ORDERED_AT_ONCE):
        depths = first_depth + tl.arange(0, ORDERED_AT_ONCE)
        listed = depths[:, None] < list_length[None, :]
        entry = (depths[:, None] * TILE + lane[None, :]) * ENTRY
        position = tl.load(list_ptr + entry + (ENTRY - 1), mask=listed, other=0)
        block = tl.load(block_row + position // BLOCK_SIZE, mask=listed, other=0)
        index = first_index[None, :] + depths[:, None]
        tl.store(order_ptr + index, block * BLOCK_SIZE + position % BLOCK_SIZE, mask=listed)
        if entry_ptr is not None:
            tl.store(entry_ptr + index, entry, mask=listed)


@triton.jit
def walk_listed(
    query, threshold, tokens, group, order_ptr, num_listed, open_block, soft_cap, walked, shape, tiling
):  # fmt: skip
    """`Walked` with the keys that `order_lists` put in order: exact scores, and the values of survivors.

    Args:
        query, tokens, group, soft_cap, shape, tiling: As for `survivors.attend_all`.
        threshold: [G_PAD].
        order_ptr: Slots of the keys.
        num_listed: How many there are.
        open_block: The block of the open page, rows of which are counted already.
        walked: `Walked` before them.
    """
    BLOCK_SIZE: tl.constexpr = shape.BLOCK_SIZE
    WALK_TILE: tl.constexpr = tiling.GATHER_TILE
    value_base = group.key_base + shape.HEAD_SIZE
    output, maximum = walked.output, walked.maximum
    lane_kept, lane_lost, lane_read = walked.lane_kept, walked.lane_lost, walked.lane_read
    offs_w = tl.arange(0, WALK_TILE)
    slot = tl.load(order_ptr + offs_w, mask=offs_w < num_listed, other=0)
    for first in tl.range(0, num_listed, WALK_TILE, num_stages=tiling.GATHER_STAGES):
        listed = first + offs_w < num_listed
        block = slot // BLOCK_SIZE
        row = block.to(tl.int64) * tokens.stride_block + slot % BLOCK_SIZE * tokens.stride_token
        # a tile ahead, so that the loads of keys wait for nothing
        ahead = first + WALK_TILE + offs_w
        slot = tl.load(order_ptr + ahead, mask=ahead < num_listed, other=0)
        scores = tile_scores(query, group.key_base, row, listed, group.scale, soft_cap, shape)
        keep = listed[:, None] & (scores >= threshold[None, :])
        survives = tl.max(keep.to(tl.int32), axis=1) > 0
        value = load_values(value_base, row, survives, query.dtype, shape)
        scores = tl.where(listed[:, None], scores, DISCARDED)
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=0))
        exponentials = tl.exp2((scores - new_maximum[None, :]) * LOG2_E)
        weights = tl.where(keep, exponentials, 0.0)
        rescale = tl.exp2((maximum - new_maximum) * LOG2_E)
        lane_kept = lane_kept * rescale[None, :] + weights
        lane_lost = lane_lost * rescale[None, :] + (exponentials - weights)
        lane_read += (survives & (block != open_block)).to(tl.int32)
        output = tl.dot(value, weights.to(query.dtype), acc=output * rescale[None, :])
        maximum = new_maximum
    return Walked(output, maximum, lane_kept, lane_lost, lane_read)


@triton.jit
def attend_candidates(
    query, threshold, ratio, tokens, shadow, group, span, first_head, lists, first_recent, open_start, soft_cap, shape,
    tiling, ROW_TOKENS: tl.constexpr, COLUMN_HEADS: tl.constexpr,
):  # fmt: skip
    """The `Piece` of the keys of a span by their shadows.

    Args:
        query, tokens, group, span, soft_cap, shape, tiling: As for `survivors.attend_all`.
        threshold: [G_PAD].
        ratio: [G_PAD], r.
        shadow: `Shadow`.
        first_head: int64, the group's first head among those of all sequences, which have codes and floors.
        lists: `Lists`, one of which is this program's.
        first_recent: Keys from there on are always candidates.
        open_start: As `schedule.open_page` has it.
        ROW_TOKENS: Tokens whose codes share a row of a product.
        COLUMN_HEADS: Heads that each of them has columns for.
    """
    CODE_BYTES: tl.constexpr = shape.CODE_BYTES
    BLOCK_SIZE: tl.constexpr = shape.BLOCK_SIZE
    TILE: tl.constexpr = tiling.TILE
    D_PAD: tl.constexpr = shape.D_PAD
    G_PAD: tl.constexpr = tiling.G_PAD
    WALK_TILE: tl.constexpr = tiling.GATHER_TILE
    LIST_DEPTH: tl.constexpr = tiling.LIST_DEPTH
    CHUNK: tl.constexpr = tiling.CHUNK_TILES * tiling.TILE
    code_base = shadow.codes + group.kv_head * shadow.stride_head
    query_codes_ptr = shadow.query_codes + first_head * 2 * CODE_BYTES
    block_row, start, end = span.block_row, span.start, span.end
    list_ptr = lists.entries + group.list_index * LIST_DEPTH * TILE
    order_ptr = lists.order + group.list_index * LIST_DEPTH * TILE
    ROWS: tl.constexpr = TILE // ROW_TOKENS
    ROW_BYTES: tl.constexpr = CODE_BYTES * ROW_TOKENS
    ROW_BLOCK: tl.constexpr = BLOCK_SIZE // ROW_TOKENS
    COLUMNS: tl.constexpr = ROW_TOKENS * COLUMN_HEADS
    lane = tl.arange(0, TILE)
    byte = tl.arange(0, ROW_BYTES)
    column = tl.arange(0, COLUMNS)
    column_head = column % COLUMN_HEADS
    token = column // COLUMN_HEADS
    mask_c = column_head < shape.GROUP
    lower_query = _load_query(query_codes_ptr, column_head, token, mask_c, CODE_BYTES, ROW_BYTES)
    upper_query = _load_query(query_codes_ptr + CODE_BYTES, column_head, token, mask_c, CODE_BYTES, ROW_BYTES)
    floor = tl.load(shadow.floors + first_head + column_head, mask=mask_c, other=NO_CODES)

    walked = Walked(
        tl.zeros((D_PAD, G_PAD), dtype=tl.float32),
        threshold,
        tl.zeros((WALK_TILE, G_PAD), dtype=tl.float32),
        tl.zeros((WALK_TILE, G_PAD), dtype=tl.float32),
        tl.zeros((WALK_TILE,), dtype=tl.int32),
    )
    keys_read = tl.zeros((), dtype=tl.int32)
    # what the merge reads of the open page, for the mean
    first_open = tl.maximum(start, open_start)
    rows_read = tl.maximum(end - first_open, 0)
    open_block = tl.load(block_row + open_start // BLOCK_SIZE, mask=first_open < end, other=-1)
    list_length = tl.zeros((TILE,), dtype=tl.int32)
    row_end = tl.cdiv(end, ROW_TOKENS)
    blocks = load_blocks(block_row, start // ROW_TOKENS, row_end, ROW_BLOCK, ROWS)
    for chunk_start in range(start, end, CHUNK):
        chunk_end = tl.minimum(chunk_start + CHUNK, end)
        for tile_start in tl.range(chunk_start, chunk_end, TILE, num_stages=tiling.SCAN_STAGES):
            row = tile_rows(blocks, tile_start // ROW_TOKENS, shadow.stride_block, ROW_BYTES, ROW_BLOCK, ROWS)
            # a tile ahead, so that the loads of codes wait for nothing
            blocks = load_blocks(block_row, (tile_start + TILE) // ROW_TOKENS, row_end, ROW_BLOCK, ROWS)
            # behind the end this reads block 0 or the rest of a page: any bytes do
            codes = tl.load(code_base + row[:, None] + byte[None, :])
            lower, upper = halves(codes, tiling.ON_GPU)
            above = tl.zeros((ROWS, COLUMNS), dtype=tl.int32) - floor[None, :]
            above = tl.dot(lower, lower_query, acc=above, out_dtype=tl.int32)
            above = tl.dot(upper, upper_query, acc=above, out_dtype=tl.int32)
            best = tl.reshape(tl.max(tl.reshape(above, (ROWS, ROW_TOKENS, COLUMN_HEADS)), axis=2), (TILE,))
            positions = tile_start + lane
            # few tiles hold a position that is not judged by its codes
            if (tile_start < _FIRST_ANCHORS) | (tile_start + TILE > tl.minimum(first_recent, end)):
                always = (positions < _FIRST_ANCHORS) | (positions >= first_recent)
                best = tl.where(positions < end, tl.where(always, 0, best), -1)
            is_candidate = (best >= 0).to(tl.int32)
            store_where(list_ptr + list_length * TILE + lane, positions, is_candidate > 0, tiling.ON_GPU)
            list_length += is_candidate

        depth = tl.max(list_length, axis=0)
        if (depth > LIST_DEPTH - tiling.CHUNK_TILES) | (chunk_end >= end):
            # the list was written by other threads
            tl.debug_barrier()
            order_lists(block_row, list_ptr, order_ptr, None, list_length, depth, BLOCK_SIZE, TILE, 1)
            # so was their order
            tl.debug_barrier()
            num_listed = tl.sum(list_length, axis=0)
            keys_read += num_listed
            walked = walk_listed(
                query, threshold, tokens, group, order_ptr, num_listed, open_block, soft_cap, walked, shape, tiling
            )
            list_length = tl.zeros((TILE,), dtype=tl.int32)
            # the next scan writes over what this walk reads
            tl.debug_barrier()
    num_unread = (end - start - keys_read).to(tl.float32)
    lost_sum = tl.sum(walked.lane_lost, axis=0)
    lost_sum += ratio * num_unread * tl.exp2((threshold - walked.maximum) * LOG2_E)
    rows_read += tl.sum(walked.lane_read, axis=0)
    kept_sum, no_copies = tl.sum(walked.lane_kept, axis=0), tl.zeros((), dtype=tl.int32)
    return Piece(walked.output, walked.maximum, kept_sum, lost_sum, rows_read, keys_read, no_copies)
