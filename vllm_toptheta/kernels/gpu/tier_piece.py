"""A piece of a sequence by tiers, on the device: scan copies of keys, walk heavy keys, weigh copies of light values.

The scan streams codes and steps, and knows a score of every key: sums of products of integers, times the step of the
key and the scale of the head. Keys that are heavy for some head go to one list of their row of the tile, light ones
with their scores to another, and what no head weighs is added up as lost. Tokens are the rows of the products, as in
`candidates.py`. Before a list can be full, both are put in order and emptied: heavy keys are read and scored exactly
and the values of survivors weighed; the codes of light values are weighed as they are, in rotated channels, and turned
back once, in the end of the piece.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_toptheta.kernels.gpu.candidates import first_recent_of, halves, order_lists, walk_listed
from vllm_toptheta.kernels.gpu.copies import VALUE_MIDDLE
from vllm_toptheta.kernels.gpu.registers import Piece, Walked
from vllm_toptheta.kernels.gpu.thresholds import HIGHEST
from vllm_toptheta.kernels.gpu.tiles import (
    DISCARDED,
    LOG2_E,
    load_blocks,
    store_where,
    tile_rows,
)
from vllm_toptheta.limits import NUM_FIRST_ANCHORS

_FIRST_ANCHORS = tl.constexpr(NUM_FIRST_ANCHORS)
# light weights times a step: far from the least number of float16, and from the largest
_SCALE_UP = tl.constexpr(256.0)


@triton.jit
def _step_rows(blocks, start, stride_block, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Where the steps of a tile's tokens stand, [TILE] int64 elements of float16, from what `load_blocks` returned."""
    if TILE % BLOCK_SIZE == 0:
        offset = tl.arange(0, BLOCK_SIZE)
        return tl.reshape((blocks.to(tl.int64) * (stride_block // 2))[:, None] + offset[None, :], (TILE,))
    else:
        return blocks.to(tl.int64) * (stride_block // 2) + (start + tl.arange(0, TILE)) % BLOCK_SIZE


@triton.jit
def _load_light(
    light_ptr, code_base, step_base, slot, entry, copies, shape, G_PAD: tl.constexpr, QUARTER: tl.constexpr
):  # fmt: skip
    """Bits of the scores of light keys [WALK_TILE, G_PAD], steps [WALK_TILE] and codes [QUARTER, WALK_TILE] of values.

    Args:
        light_ptr: The list of light keys.
        code_base, step_base: Where the codes of the kv head, and the steps of its first page's keys, start.
        slot, entry: [WALK_TILE], where copies and entries of the list stand.
        copies, shape: `Copies`, `Shape`.
    """
    BLOCK_SIZE: tl.constexpr = shape.BLOCK_SIZE
    offs_g = tl.arange(0, G_PAD)
    bits = tl.load(light_ptr + entry[:, None] + offs_g[None, :], mask=(offs_g < shape.GROUP)[None, :], other=0)
    page = (slot // BLOCK_SIZE).to(tl.int64) * copies.stride_block
    offset = slot % BLOCK_SIZE
    step = tl.load(step_base + (page // 2 + BLOCK_SIZE + offset))
    row = tl.multiple_of(page + (BLOCK_SIZE * shape.HEAD_SIZE // 2 + offset * QUARTER), 16)
    return bits, step, tl.load(code_base + row[None, :] + tl.arange(0, QUARTER)[:, None])


@triton.jit
def _quarter(codes, weights, acc, SHIFT: tl.constexpr):
    """Weigh a quarter of the channels of light values, as 1 + code / 4.

    The code becomes the upper bits of a mantissa: no conversion, of which a GPU does few at a time. Beside a larger
    number than 1, a GPU's sums of products, which it cuts off, would lose what the codes say.
    """
    code = ((codes >> SHIFT) & 3).to(tl.int16)
    if weights.dtype == tl.float16:
        level = (code << 8 | 0x3C00).to(tl.float16, bitcast=True)
    else:
        level = (code << 5 | 0x3F80).to(tl.bfloat16, bitcast=True)
    return tl.dot(level, weights, acc=acc)


@triton.jit
def _turn_back(rotation_ptr, acc, offset, first_channel, output, HEAD_SIZE: tl.constexpr, QUARTER: tl.constexpr):
    """Add R^T 4 (acc - offset) to the output, of the rotated channels from `first_channel` on."""
    offs_d = tl.arange(0, HEAD_SIZE)
    offs_c = first_channel + tl.arange(0, QUARTER)
    part = tl.load(rotation_ptr + offs_c[None, :] * HEAD_SIZE + offs_d[:, None])
    return tl.dot(part, (acc - offset[None, :]) * (4.0 / _SCALE_UP), acc=output, input_precision="tf32x3")


@triton.jit
def attend_by_tiers(
    query, tokens, queries, copies, heavy, light, group, span, seq, log_heavy, open_start, shape, tiling,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """The `Piece` of the keys of a span by their copies.

    Args:
        query: [D_PAD, G_PAD].
        tokens, queries, copies: `Tokens`, `Queries`, `Copies`.
        heavy, light: `Lists`, one of each of which is this program's.
        group, span: `Group`, `Span`.
        seq: int64, the sequence.
        log_heavy: As of `TierLayer`.
        open_start: As `schedule.open_page` has it; rows from there on count as read.
        shape: As for `tile_scores`.
        tiling: `Tiling`.
        COLUMNS: Of the products with codes.
    """
    HEAD_SIZE: tl.constexpr = shape.HEAD_SIZE
    HALF: tl.constexpr = HEAD_SIZE // 2
    QUARTER: tl.constexpr = HEAD_SIZE // 4
    BLOCK_SIZE: tl.constexpr = shape.BLOCK_SIZE
    GROUP: tl.constexpr = shape.GROUP
    TILE: tl.constexpr = tiling.TILE
    G_PAD: tl.constexpr = tiling.G_PAD
    WALK_TILE: tl.constexpr = tiling.GATHER_TILE
    ROOM: tl.constexpr = tiling.LIST_DEPTH * TILE
    CHUNK: tl.constexpr = tiling.CHUNK_TILES * TILE
    ENTRY: tl.constexpr = GROUP + 1
    block_row, start, end = span.block_row, span.start, span.end
    heavy_ptr = heavy.entries + group.list_index * ROOM
    heavy_order_ptr = heavy.order + group.list_index * ROOM
    light_ptr = light.entries + group.list_index * ROOM * ENTRY
    light_order_ptr = light.order + group.list_index * 2 * ROOM
    code_base = copies.codes + group.kv_head * copies.stride_head
    step_base = copies.steps + group.kv_head * (copies.stride_head // 2) + BLOCK_SIZE * (HALF + QUARTER) // 2
    soft_cap = queries.logits_soft_cap
    first_recent = first_recent_of(tl.load(tokens.seq_lens + seq), BLOCK_SIZE)

    lane = tl.arange(0, TILE)
    byte = tl.arange(0, HALF)
    column = tl.arange(0, COLUMNS)
    mask_c = column < GROUP
    first_head = seq * queries.num_heads + group.kv_head * GROUP
    query_row = copies.query_codes + (first_head + column[None, :]) * HEAD_SIZE + byte[:, None]
    lower_query = tl.load(query_row, mask=mask_c[None, :], other=0)
    upper_query = tl.load(query_row + HALF, mask=mask_c[None, :], other=0)
    terms = copies.query_terms + (first_head + column) * 3
    query_scale = tl.load(terms, mask=mask_c, other=0.0)
    middle = tl.load(terms + 1, mask=mask_c, other=0.0)
    offset = tl.load(terms + 2, mask=mask_c, other=DISCARDED)
    light_limit = tl.load(queries.thresholds + first_head + column, mask=mask_c, other=HIGHEST)
    anchor_lse = tl.load(queries.anchor_lse + first_head + column, mask=mask_c, other=HIGHEST)
    heavy_limit = tl.where(mask_c, anchor_lse + log_heavy, HIGHEST)
    light_row = light_ptr + (lane * ENTRY)[:, None] + column[None, :]
    offs_g = tl.arange(0, G_PAD)
    mask_g = offs_g < GROUP
    threshold = tl.load(queries.thresholds + first_head + offs_g, mask=mask_g, other=HIGHEST)

    output = tl.zeros((HEAD_SIZE, G_PAD), dtype=tl.float32)
    first_quarter = tl.zeros((QUARTER, G_PAD), dtype=tl.float32)
    second_quarter = tl.zeros((QUARTER, G_PAD), dtype=tl.float32)
    third_quarter = tl.zeros((QUARTER, G_PAD), dtype=tl.float32)
    fourth_quarter = tl.zeros((QUARTER, G_PAD), dtype=tl.float32)
    # no light key scores more than this, and what is lost is added up relative to it
    maximum = tl.load(queries.anchor_lse + first_head + offs_g, mask=mask_g, other=0.0)
    # added up by lane, so that loops reduce nothing but the maximum
    scan_lost = tl.zeros((TILE, COLUMNS), dtype=tl.float32)
    lane_kept = tl.zeros((WALK_TILE, G_PAD), dtype=tl.float32)
    lane_weights = tl.zeros((WALK_TILE, G_PAD), dtype=tl.float32)  # of copies, times their steps
    lane_lost = tl.zeros((WALK_TILE, G_PAD), dtype=tl.float32)
    lane_read = tl.zeros((WALK_TILE,), dtype=tl.int32)
    keys_read = tl.zeros((), dtype=tl.int32)
    copies_read = tl.zeros((), dtype=tl.int32)
    # what the merge reads of the open page, for the mean
    first_open = tl.maximum(start, open_start)
    rows_read = tl.maximum(end - first_open, 0)
    open_block = tl.load(block_row + open_start // BLOCK_SIZE, mask=first_open < end, other=-1)
    heavy_length = tl.zeros((TILE,), dtype=tl.int32)
    light_length = tl.zeros((TILE,), dtype=tl.int32)
    blocks = load_blocks(block_row, start, end, BLOCK_SIZE, TILE)
    next_blocks = load_blocks(block_row, start + TILE, end, BLOCK_SIZE, TILE)
    step = tl.load(step_base + _step_rows(blocks, start, copies.stride_block, BLOCK_SIZE, TILE))
    for chunk_start in range(start, end, CHUNK):
        chunk_end = tl.minimum(chunk_start + CHUNK, end)
        for tile_start in tl.range(chunk_start, chunk_end, TILE, num_stages=tiling.SCAN_STAGES):
            row = tile_rows(blocks, tile_start, copies.stride_block, HALF, BLOCK_SIZE, TILE)
            # a tile and two ahead, so that no load waits for another: Triton copies ahead what products take, and steps
            # are not that
            next_step = tl.load(
                step_base + _step_rows(next_blocks, tile_start + TILE, copies.stride_block, BLOCK_SIZE, TILE)
            )
            blocks = next_blocks
            next_blocks = load_blocks(block_row, tile_start + 2 * TILE, end, BLOCK_SIZE, TILE)
            # behind the end this reads block 0 or the rest of a page: any bytes do
            lower, upper = halves(tl.load(code_base + row[:, None] + byte[None, :]), tiling.ON_GPU)
            products = tl.dot(lower, lower_query, out_dtype=tl.int32)
            products = tl.dot(upper, upper_query, acc=products, out_dtype=tl.int32)
            scores = (products.to(tl.float32) - middle[None, :]) * (step.to(tl.float32)[:, None] * query_scale[None, :])
            step = next_step
            scores += offset[None, :]
            if soft_cap is not None:
                # tanh(x) = 1 - 2 / (exp(2 x) + 1)
                scores = soft_cap * (1.0 - 2.0 / (tl.exp2(scores * (2.0 * LOG2_E / soft_cap)) + 1.0))
                scores = tl.where(mask_c[None, :], scores, DISCARDED)
            positions = tile_start + lane
            # few tiles hold a position without a copy, whose score may be anything
            if (tile_start < _FIRST_ANCHORS) | (tile_start + TILE > tl.minimum(first_recent, end)):
                always = (positions < _FIRST_ANCHORS) | (positions >= first_recent)
                scores = tl.where((always | (positions >= end))[:, None], DISCARDED, scores)
                tier = tl.where(scores >= heavy_limit[None, :], 2, (scores >= light_limit[None, :]).to(tl.int32))
                tier = tl.where(positions < end, tl.where(always, 2, tl.max(tier, axis=1)), 0)
            else:
                tier = tl.where(scores >= heavy_limit[None, :], 2, (scores >= light_limit[None, :]).to(tl.int32))
                tier = tl.max(tier, axis=1)
            is_heavy = tier == 2
            is_light = tier == 1
            keep = scores >= light_limit[None, :]
            exponents = (scores - anchor_lse[None, :]) * LOG2_E
            # of heavy keys too, whose exponent may be any: they are scored exactly
            scan_lost += tl.where(keep | is_heavy[:, None], 0.0, tl.exp2(exponents))
            store_where(heavy_ptr + heavy_length * TILE + lane, positions, is_heavy, tiling.ON_GPU)
            bits = tl.where(keep, scores, DISCARDED).to(tl.int32, bitcast=True)
            store_where(
                light_row + (light_length * TILE * ENTRY)[:, None],
                tl.where(column[None, :] == GROUP, positions[:, None], bits),
                is_light[:, None] & (column <= GROUP)[None, :],
                tiling.ON_GPU,
            )
            if COLUMNS == GROUP:
                # no column is left beside the heads' scores
                store_where(
                    light_ptr + (light_length * TILE + lane) * ENTRY + GROUP, positions, is_light, tiling.ON_GPU
                )
            heavy_length += is_heavy.to(tl.int32)
            light_length += is_light.to(tl.int32)

        depth = tl.maximum(tl.max(heavy_length, axis=0), tl.max(light_length, axis=0))
        if (depth > tiling.LIST_DEPTH - tiling.CHUNK_TILES) | (chunk_end >= end):
            # the lists were written by other threads
            tl.debug_barrier()
            order_lists(
                block_row, heavy_ptr, heavy_order_ptr, None, heavy_length, tl.max(heavy_length, axis=0), BLOCK_SIZE,
                TILE, 1,
            )  # fmt: skip
            order_lists(
                block_row, light_ptr, light_order_ptr, light_order_ptr + ROOM, light_length,
                tl.max(light_length, axis=0), BLOCK_SIZE, TILE, ENTRY,
            )  # fmt: skip
            # so was their order
            tl.debug_barrier()
            offs_w = tl.arange(0, WALK_TILE)
            before = maximum
            num_listed = tl.sum(heavy_length, axis=0)
            keys_read += num_listed
            walked = walk_listed(
                query, threshold, tokens, group, heavy_order_ptr, num_listed, open_block, soft_cap,
                Walked(output, maximum, lane_kept, lane_lost, lane_read), shape, tiling,
            )  # fmt: skip
            output, maximum, lane_kept = walked.output, walked.maximum, walked.lane_kept
            lane_lost, lane_read = walked.lane_lost, walked.lane_read
            rescale = tl.exp2((before - maximum) * LOG2_E)[None, :]
            first_quarter *= rescale
            second_quarter *= rescale
            third_quarter *= rescale
            fourth_quarter *= rescale
            lane_weights *= rescale

            num_listed = tl.sum(light_length, axis=0)
            copies_read += num_listed
            if num_listed > 0:
                # a tile and two ahead, as in the scan; the last key again behind it, to be weighed with 0
                last = num_listed - 1
                slot = tl.load(light_order_ptr + tl.minimum(offs_w, last))
                entry = tl.load(light_order_ptr + ROOM + tl.minimum(offs_w, last))
                bits, value_step, codes = _load_light(
                    light_ptr, code_base, step_base, slot, entry, copies, shape, G_PAD, QUARTER
                )
                slot = tl.load(light_order_ptr + tl.minimum(WALK_TILE + offs_w, last))
                entry = tl.load(light_order_ptr + ROOM + tl.minimum(WALK_TILE + offs_w, last))
                for first in tl.range(0, num_listed, WALK_TILE):
                    next_bits, next_step, next_codes = _load_light(
                        light_ptr, code_base, step_base, slot, entry, copies, shape, G_PAD, QUARTER
                    )
                    slot = tl.load(light_order_ptr + tl.minimum(first + 2 * WALK_TILE + offs_w, last))
                    entry = tl.load(light_order_ptr + ROOM + tl.minimum(first + 2 * WALK_TILE + offs_w, last))
                    is_scored = (first + offs_w < num_listed)[:, None] & mask_g[None, :]
                    light_scores = tl.where(is_scored, bits.to(tl.float32, bitcast=True), DISCARDED)
                    weights = tl.exp2((light_scores - maximum[None, :]) * LOG2_E)
                    lane_kept += weights
                    weights = (weights * (value_step.to(tl.float32) * _SCALE_UP)[:, None]).to(query.dtype)
                    lane_weights += weights.to(tl.float32)
                    first_quarter = _quarter(codes, weights, first_quarter, 0)
                    second_quarter = _quarter(codes, weights, second_quarter, 2)
                    third_quarter = _quarter(codes, weights, third_quarter, 4)
                    fourth_quarter = _quarter(codes, weights, fourth_quarter, 6)
                    bits, value_step, codes = next_bits, next_step, next_codes
            heavy_length = tl.zeros((TILE,), dtype=tl.int32)
            light_length = tl.zeros((TILE,), dtype=tl.int32)
            # the next scan writes over what this one reads
            tl.debug_barrier()
    if copies_read > 0:
        shift = tl.sum(lane_weights, axis=0) * (1.0 + VALUE_MIDDLE / 4.0)
        output = _turn_back(copies.rotation, first_quarter, shift, 0, output, HEAD_SIZE, QUARTER)
        output = _turn_back(copies.rotation, second_quarter, shift, QUARTER, output, HEAD_SIZE, QUARTER)
        output = _turn_back(copies.rotation, third_quarter, shift, 2 * QUARTER, output, HEAD_SIZE, QUARTER)
        output = _turn_back(copies.rotation, fourth_quarter, shift, 3 * QUARTER, output, HEAD_SIZE, QUARTER)
    of_columns = tl.sum(scan_lost, axis=0)
    if COLUMNS != G_PAD:
        # the same heads in more columns
        is_same = (column[:, None] == offs_g[None, :]).to(tl.float32)
        of_columns = tl.sum(of_columns[:, None] * is_same, axis=0)
    start_maximum = tl.load(queries.anchor_lse + first_head + offs_g, mask=mask_g, other=0.0)
    lost_sum = tl.sum(lane_lost, axis=0) + of_columns * tl.exp2((start_maximum - maximum) * LOG2_E)
    rows_read += tl.sum(lane_read, axis=0)
    return Piece(output, maximum, tl.sum(lane_kept, axis=0), lost_sum, rows_read, keys_read, copies_read)
