"""A piece of a sequence by all of its keys, on the device: those that reach the threshold are kept, or every one is.

The scan streams keys, keeps a running maximum and two sums of exponentials (survivors and others) for every row of its
tile separately, so that the loop has no reduction, and appends survivors to a list of that row: their positions, and
the scores of the group's heads (`DISCARDED` where a head does not keep the key). The gather puts the lists in order,
one behind the other, walks them in dense tiles and weighs the values. Scan and gather alternate.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_toptheta.kernels.gpu.registers import Piece
from vllm_toptheta.kernels.gpu.tiles import (
    DISCARDED,
    LOG2_E,
    ROW_ALIGNMENT,
    load_blocks,
    load_values,
    store_where,
    tile_rows,
    tile_scores,
)

CHUNK_TILES = 16  # tiles scanned between two looks at how long the lists are
LIST_DEPTH = CHUNK_TILES + 6  # survivors that a lane of the tile has room for; less of it full is not worth a gather
ORDERED_AT_ONCE = tl.constexpr(16)  # layers of the lists that are ordered at a time


@triton.jit
def _sees(span, positions, valid, shape):
    """Which keys queries see, [TILE, 1] or [TILE, G_PAD], of positions [TILE] that are in the piece where valid."""
    if shape.QUERY_LEN == 1:
        return valid[:, None]
    else:
        return valid[:, None] & (positions[:, None] < span.seen[None, :])


@triton.jit
def attend_all(query, tokens, group, span, soft_cap, shape, tiling):
    """The `Piece` of the keys of a span, all of which are kept.

    Args:
        query: [D_PAD, G_PAD].
        tokens, group, span: `Tokens`, `Group`, `Span`.
        soft_cap, shape: As for `tile_scores`.
        tiling: `Tiling`.
    """
    TILE: tl.constexpr = tiling.DENSE_TILE
    D_PAD: tl.constexpr = shape.D_PAD
    G_PAD: tl.constexpr = tiling.G_PAD
    block_row, start, end = span.block_row, span.start, span.end
    value_base = group.key_base + shape.HEAD_SIZE
    output = tl.zeros((D_PAD, G_PAD), dtype=tl.float32)
    maximum = tl.full((G_PAD,), DISCARDED, dtype=tl.float32)
    kept_sum = tl.zeros((G_PAD,), dtype=tl.float32)
    lost_sum = tl.zeros((G_PAD,), dtype=tl.float32)
    rows_read = end - start
    blocks = load_blocks(block_row, start, end, shape.BLOCK_SIZE, TILE)
    for tile_start in tl.range(start, end, TILE, num_stages=tiling.DENSE_STAGES):
        positions = tile_start + tl.arange(0, TILE)
        valid = positions < end
        row = tile_rows(blocks, tile_start, tokens.stride_block, tokens.stride_token, shape.BLOCK_SIZE, TILE)
        # a tile ahead, so that the loads of keys wait for nothing
        blocks = load_blocks(block_row, tile_start + TILE, end, shape.BLOCK_SIZE, TILE)
        # behind the end this reads block 0 or the rest of a page: any keys do
        scores = tile_scores(query, group.key_base, row, None, group.scale, soft_cap, shape)
        value = load_values(value_base, row, valid, query.dtype, shape)
        scores = tl.where(_sees(span, positions, valid, shape), scores, DISCARDED)
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=0))
        weights = tl.exp2((scores - new_maximum[None, :]) * LOG2_E)
        rescale = tl.exp2((maximum - new_maximum) * LOG2_E)
        kept_sum = kept_sum * rescale + tl.sum(weights, axis=0)
        output = tl.dot(value, weights.to(query.dtype), acc=output * rescale[None, :])
        maximum = new_maximum
    return Piece(output, maximum, kept_sum, lost_sum, rows_read, rows_read, tl.zeros((), dtype=tl.int32))


@triton.jit
def _order_survivors(
    tokens,
    block_row,
    list_ptr,
    order_ptr,  # [2, LIST_DEPTH * TILE] int64: where entries of the list start, and the rows of their tokens
    list_length,  # [TILE]
    depth,
    BLOCK_SIZE: tl.constexpr,
    ENTRY: tl.constexpr,
    TILE: tl.constexpr,
    LIST_DEPTH: tl.constexpr,
):
    """Number the survivors of all lanes one after the other, and look up where their keys and values start.

    For all of them at once: tile by tile, the gather would wait for each of these loads behind other programs' keys,
    and every thread that loads a part of a row would work out where it is.
    """
    lane = tl.arange(0, TILE)
    first_index = tl.cumsum(list_length, axis=0) - list_length
    for first_depth in range(0, depth, ORDERED_AT_ONCE):
        depths = first_depth + tl.arange(0, ORDERED_AT_ONCE)
        entry = (depths[:, None] * TILE + lane[None, :]) * ENTRY
        listed = depths[:, None] < list_length[None, :]
        position = tl.load(list_ptr + entry + (ENTRY - 1), mask=listed, other=0)
        block = tl.load(block_row + position // BLOCK_SIZE, mask=listed, other=0)
        # in units of what the compiler is to know that it is a multiple of, so that values are loaded in large pieces
        row = block.to(tl.int64) * (tokens.stride_block // ROW_ALIGNMENT)
        row += position % BLOCK_SIZE * (tokens.stride_token // ROW_ALIGNMENT)
        index = first_index[None, :] + depths[:, None]
        tl.store(order_ptr + index, entry.to(tl.int64), mask=listed)
        tl.store(order_ptr + LIST_DEPTH * TILE + index, row, mask=listed)


@triton.jit
def attend_survivors(query, threshold, tokens, group, span, lists, open_start, soft_cap, shape, tiling):
    """Like `attend_all`, but of keys that reach the threshold; rows from `open_start` on count as read.

    Args:
        query, tokens, group, span, soft_cap, shape, tiling: As for `attend_all`.
        threshold: [G_PAD].
        lists: `Lists`, one of which is this program's.
        open_start: As `schedule.open_page` has it.
    """
    TILE: tl.constexpr = tiling.TILE
    D_PAD: tl.constexpr = shape.D_PAD
    G_PAD: tl.constexpr = tiling.G_PAD
    LIST_DEPTH: tl.constexpr = tiling.LIST_DEPTH
    CHUNK: tl.constexpr = tiling.CHUNK_TILES * tiling.TILE
    ENTRY: tl.constexpr = shape.GROUP + 1
    LAYER: tl.constexpr = TILE * ENTRY
    block_row, start, end = span.block_row, span.start, span.end
    list_ptr = lists.entries + group.list_index * LIST_DEPTH * LAYER
    order_ptr = lists.order + group.list_index * 2 * LIST_DEPTH * TILE
    value_base = group.key_base + shape.HEAD_SIZE
    offs_g = tl.arange(0, G_PAD)
    lane = tl.arange(0, TILE)
    list_row = list_ptr + (lane * ENTRY)[:, None] + offs_g[None, :]
    output = tl.zeros((D_PAD, G_PAD), dtype=tl.float32)
    maximum = threshold
    lane_maximum = tl.zeros((TILE, G_PAD), dtype=tl.float32) + threshold[None, :]
    lane_kept = tl.zeros((TILE, G_PAD), dtype=tl.float32)
    lane_lost = tl.zeros((TILE, G_PAD), dtype=tl.float32)  # relative to exp(threshold), so never above 1 a key
    lane_read = tl.zeros((TILE,), dtype=tl.int32)
    list_length = tl.zeros((TILE,), dtype=tl.int32)
    exponent_offset = threshold * -LOG2_E
    blocks = load_blocks(block_row, start, end, shape.BLOCK_SIZE, TILE)
    for chunk_start in range(start, end, CHUNK):
        chunk_end = tl.minimum(chunk_start + CHUNK, end)
        for tile_start in tl.range(chunk_start, chunk_end, TILE, num_stages=tiling.SCAN_STAGES):
            positions = tile_start + lane
            valid = positions < end
            row = tile_rows(blocks, tile_start, tokens.stride_block, tokens.stride_token, shape.BLOCK_SIZE, TILE)
            # a tile ahead, so that the loads of keys wait for nothing
            blocks = load_blocks(block_row, tile_start + TILE, end, shape.BLOCK_SIZE, TILE)
            # behind the end this reads block 0 or the rest of a page: any keys do
            scores = tile_scores(query, group.key_base, row, None, group.scale, soft_cap, shape)
            scores = tl.where(_sees(span, positions, valid, shape), scores, DISCARDED)
            keep = scores >= threshold[None, :]
            lane_lost += tl.where(keep, 0.0, tl.exp2(scores * LOG2_E + exponent_offset[None, :]))
            lane_maximum = tl.maximum(lane_maximum, scores)
            survives = tl.max(keep.to(tl.int32), axis=1)
            bits = tl.where(keep, scores, DISCARDED).to(tl.int32, bitcast=True)
            store_where(
                list_row + (list_length * LAYER)[:, None],
                tl.where(offs_g[None, :] == shape.GROUP, positions[:, None], bits),
                (survives > 0)[:, None] & (offs_g <= shape.GROUP)[None, :],
                tiling.ON_GPU,
            )
            if G_PAD == shape.GROUP:
                # no column is left beside the heads' scores
                store_where(
                    list_ptr + list_length * LAYER + lane * ENTRY + shape.GROUP, positions, survives > 0, tiling.ON_GPU
                )
            list_length += survives
            lane_read += tl.where(valid & (positions >= open_start), 1, survives)

        depth = tl.max(list_length, axis=0)
        if (depth > LIST_DEPTH - tiling.CHUNK_TILES) | (chunk_end >= end):
            # the list was written by other threads
            tl.debug_barrier()
            new_maximum = tl.max(lane_maximum, axis=0)
            rescale = tl.exp2((maximum - new_maximum) * LOG2_E)
            output *= rescale[None, :]
            lane_kept *= rescale[None, :]
            maximum = new_maximum
            _order_survivors(
                tokens, block_row, list_ptr, order_ptr, list_length, depth, shape.BLOCK_SIZE, ENTRY, TILE, LIST_DEPTH
            )
            # so was their order
            tl.debug_barrier()
            num_listed = tl.sum(list_length, axis=0)
            # the last one again behind it: its values are as good as any to be weighed with 0
            last = tl.maximum(num_listed - 1, 0)
            entry = tl.load(order_ptr + tl.minimum(lane, last))
            row = tl.load(order_ptr + LIST_DEPTH * TILE + tl.minimum(lane, last))
            for first in tl.range(0, num_listed, TILE, num_stages=tiling.GATHER_STAGES):
                bits_row = list_ptr + entry
                value_row = row * ROW_ALIGNMENT
                # a tile ahead, so that the loads of values wait for nothing
                ahead = tl.minimum(first + TILE + lane, last)
                entry = tl.load(order_ptr + ahead)
                row = tl.load(order_ptr + LIST_DEPTH * TILE + ahead)
                bits = tl.load(bits_row[:, None] + offs_g[None, :], mask=(offs_g < shape.GROUP)[None, :], other=0)
                value = load_values(value_base, value_row, None, query.dtype, shape)
                listed = first + lane < num_listed
                scores = tl.where(listed[:, None], bits.to(tl.float32, bitcast=True), DISCARDED)
                weights = tl.exp2((scores - maximum[None, :]) * LOG2_E)
                lane_kept += weights
                output = tl.dot(value, weights.to(query.dtype), acc=output)
            list_length = tl.zeros((TILE,), dtype=tl.int32)
            # the next scan writes over what this gather reads
            tl.debug_barrier()
    lost_sum = tl.sum(lane_lost, axis=0) * tl.exp2((threshold - maximum) * LOG2_E)
    rows_read = tl.sum(lane_read, axis=0)
    no_copies = tl.zeros((), dtype=tl.int32)
    return Piece(output, maximum, tl.sum(lane_kept, axis=0), lost_sum, rows_read, end - start, no_copies)
