"""The last of the Triton kernels of both modes: it joins what was left in pieces.

It adds sinks to denominators and the value mean from the page tails, and in passing it writes the tail of a page that
has just become full (`value_sums.py` says what that is), so that decoding needs no launch for it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_toptheta.kernels.contract import DecodeStep, LayerCall
from vllm_toptheta.kernels.gpu.launches import Choice, Launches
from vllm_toptheta.kernels.gpu.records import Counts, Pieces, Shape, Tokens, next_power_of_2
from vllm_toptheta.kernels.gpu.schedule import (
    dense_length,
    load_lengths,
    new_tokens,
    programs_of_head,
    reads_all_keys,
    units_of_piece,
    work_of_step,
)
from vllm_toptheta.kernels.gpu.thresholds import keeps_all, offset_of
from vllm_toptheta.kernels.gpu.tiles import DISCARDED, LOG2_E
from vllm_toptheta.kernels.gpu.tuning import launch_options


@triton.jit
def _count_tokens(totals_ptr, tokens, num_seqs, max_dense_len, SEQ_BLOCK: tl.constexpr):
    """Add a step to `Counters.totals`; one program does."""
    index = tl.arange(0, SEQ_BLOCK)
    seq_lens = load_lengths(tokens.seq_lens, num_seqs, SEQ_BLOCK)
    decoded = (seq_lens > 0).to(tl.int64)
    if tokens.query_start_loc is not None:
        start = tokens.query_start_loc + index
        is_seq = index < num_seqs
        decoded *= tl.load(start + 1, mask=is_seq, other=0) - tl.load(start, mask=is_seq, other=0)
    is_common = offset_of(tokens, index, num_seqs) == 0.0
    dense = tl.where(is_common & (seq_lens <= max_dense_len), decoded, 0)
    asked = tl.where(is_common, 0, decoded)
    field = tl.arange(0, 8)
    count = tl.where(field == 0, tl.sum(decoded, axis=0), 0)
    count += tl.where(field == 1, tl.sum(dense, axis=0), 0)
    count += tl.where(field == 2, tl.sum(seq_lens.to(tl.int64), axis=0), 0)
    count += tl.where(field == 3, tl.max((seq_lens > 0).to(tl.int64), axis=0), 0)
    count += tl.where(field == 4, tl.sum(asked, axis=0), 0)
    # nobody adds to these at the same time, but an addition by the memory is not waited for
    tl.atomic_add(totals_ptr + field, count, mask=field < 5, sem="relaxed")


@triton.jit
def _bucket(lost_mass, NUM_BUCKETS: tl.constexpr):
    """Bucket of a lost mass (`contract.Counters`): the exponent of the smallest power of two that is not below it."""
    # a float32's exponent stands above 23 bits, which carry into it unless all of them are 0
    exponent = ((lost_mass.to(tl.int32, bitcast=True) + 0x7FFFFF) >> 23) - 127
    return tl.minimum(tl.maximum(exponent + NUM_BUCKETS - 1, 0), NUM_BUCKETS - 1)


@triton.jit
def _fills(block, tokens, num_seqs, stride_table_seq, shape, SEQ_BLOCK: tl.constexpr):
    """Whether a sequence of the step fills a block with one of its new tokens.

    vLLM shares a page as soon as the token that fills it is scheduled, so a prompt of which one token is left may stand
    on it in the same step.
    """
    index = tl.arange(0, SEQ_BLOCK)
    seq_lens = load_lengths(tokens.seq_lens, num_seqs, SEQ_BLOCK)
    num_full = seq_lens // shape.BLOCK_SIZE
    # a page that was full before may pass for one that is being filled; its sum is made anew then, for nothing
    is_filling = (num_full > 0) & (seq_lens % shape.BLOCK_SIZE < shape.QUERY_LEN)
    last = tokens.block_table + index.to(tl.int64) * stride_table_seq + num_full - 1
    return tl.max((tl.load(last, mask=is_filling, other=-1) == block).to(tl.int32), axis=0) > 0


# lengths and counts change from batch to batch: one compilation serves them all
@triton.jit(
    do_not_specialize=(
        "stride_table_seq",
        "num_seqs",
        "num_kv_heads",
        "num_programs",
        "num_values_programs",
        "max_dense_len",
        "min_step_tokens",
        "few_tokens",
        "short_length",
    )
)
def merge_kernel(
    tokens,  # Tokens
    pieces,  # Pieces
    counts,  # Counts
    output_ptr,  # [num_tokens, num_heads, head_size]
    value_sum_ptr,  # [num_blocks, num_kv_heads, head_size] float32
    v_scale_ptr,  # [1] float32, or None
    sinks_ptr,  # [num_heads] float, or None
    head_programs_ptr,  # [num_kv_heads] int32, or None if each has as many programs
    stride_output_seq,
    stride_output_head,
    stride_sum_block,
    stride_sum_head,
    stride_table_seq,
    num_seqs,
    num_kv_heads,
    num_programs,
    num_values_programs,
    max_dense_len,
    min_step_tokens,
    few_tokens,
    short_length,
    shape: tl.constexpr,  # Shape
    schedule: tl.constexpr,  # Schedule
    values_schedule: tl.constexpr,  # Schedule of a step of which all keys are read
    PIECE_BLOCK: tl.constexpr,
    NUM_PARTS: tl.constexpr,  # that the channels of a head are divided into, a program each
    BLOCK_PAD: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,  # room for all kv heads
    NUM_BUCKETS: tl.constexpr,
    DENOMINATOR_COMPENSATION: tl.constexpr,
    CHOOSES: tl.constexpr,  # whether the pieces come from one kernel or the other
    EARLY_MERGE: tl.constexpr,
):
    BLOCK_SIZE: tl.constexpr = shape.BLOCK_SIZE
    HEAD_SIZE: tl.constexpr = shape.HEAD_SIZE
    GROUP: tl.constexpr = shape.GROUP
    WIDTH: tl.constexpr = shape.D_PAD // NUM_PARTS
    SEQ_BLOCK: tl.constexpr = schedule.SEQ_BLOCK
    head = tl.program_id(0).to(tl.int64) // NUM_PARTS
    part = tl.program_id(0) % NUM_PARTS
    seq = tl.program_id(1) // shape.QUERY_LEN
    heads = GROUP // shape.QUERY_LEN
    kv_head = head // heads
    query = head % heads
    offs_d = part * WIDTH + tl.arange(0, WIDTH)
    mask_d = offs_d < HEAD_SIZE
    max_dense_len = dense_length(tokens, num_seqs, max_dense_len, min_step_tokens, SEQ_BLOCK)
    if counts.totals is not None and (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        _count_tokens(counts.totals, tokens, num_seqs, max_dense_len, SEQ_BLOCK)
    seq_len = tl.load(tokens.seq_lens + seq)
    token, num_seen = seq, seq_len
    if shape.QUERY_LEN > 1:
        number = tl.program_id(1) % shape.QUERY_LEN
        token, num_seen, exists = new_tokens(tokens, seq, seq_len, number)
        if not exists:
            return
        query += number * heads
    output_row = output_ptr + token.to(tl.int64) * stride_output_seq + head * stride_output_head + offs_d
    if seq_len <= 0:
        tl.store(output_row, tl.zeros((WIDTH,), dtype=output_ptr.dtype.element_ty), mask=mask_d)
        return

    is_dense = keeps_all(tokens, seq, seq_len, num_seqs, max_dense_len)
    if shape.VALUE_MEAN:
        # issued first: nothing of this waits for the pieces
        last_page = (num_seen - 1) // BLOCK_SIZE
        num_open = num_seen - last_page * BLOCK_SIZE
        closes = num_open == BLOCK_SIZE
        num_rows = tl.where(is_dense & (num_open < BLOCK_SIZE), 0, num_open)
        table = tokens.block_table + seq.to(tl.int64) * stride_table_seq + last_page
        block = tl.load(table).to(tl.int64)
        previous = tl.load(table - 1, mask=last_page > 0, other=0).to(tl.int64)
        value_sum_row = value_sum_ptr + kv_head * stride_sum_head + offs_d
        offs_b = tl.arange(0, BLOCK_PAD)
        head_values = tokens.kv_cache + kv_head * tokens.stride_head + HEAD_SIZE
        value_sum = tl.load(value_sum_row + previous * stride_sum_block, mask=mask_d, other=0.0)
        page = head_values + block * tokens.stride_block
        values = tl.load(
            page + offs_b[:, None] * tokens.stride_token + offs_d[None, :],
            mask=(offs_b < num_rows)[:, None] & mask_d[None, :],
            other=0.0,
        )
        num_summed = last_page
        if (last_page > 0) & _fills(previous, tokens, num_seqs, stride_table_seq, shape, SEQ_BLOCK):
            # its sum is being written, and what was read of it means nothing; that of the page before was there in time
            num_summed -= 1
            before = tl.load(table - 2, mask=num_summed > 0, other=0).to(tl.int64)
            value_sum = tl.load(value_sum_row + before * stride_sum_block, mask=mask_d, other=0.0)
            value_sum = tl.where(num_summed > 0, value_sum, 0.0)
            value_sum += tl.sum(
                tl.load(
                    head_values
                    + previous * tokens.stride_block
                    + offs_b[:, None] * tokens.stride_token
                    + offs_d[None, :],
                    mask=(offs_b < BLOCK_SIZE)[:, None] & mask_d[None, :],
                    other=0.0,
                ).to(tl.float32),
                axis=0,
            )
        # a sequence's first page has no predecessor, and that of a null block may hold anything
        value_sum = tl.where(last_page > 0, value_sum, 0.0)
        value_sum += tl.sum(values.to(tl.float32), axis=0)

    min_work, dense_work, piece_work = schedule.MIN_WORK, schedule.DENSE_WORK, schedule.PIECE_WORK
    if CHOOSES:
        reads_all = reads_all_keys(load_lengths(tokens.seq_lens, num_seqs, SEQ_BLOCK), few_tokens, short_length)
        num_programs = tl.where(reads_all, num_values_programs, num_programs)
        min_work = tl.where(reads_all, values_schedule.MIN_WORK, schedule.MIN_WORK)
        dense_work = tl.where(reads_all, values_schedule.DENSE_WORK, schedule.DENSE_WORK)
        piece_work = tl.where(reads_all, values_schedule.PIECE_WORK, schedule.PIECE_WORK)
    if head_programs_ptr is not None:
        of_head = programs_of_head(
            tokens, head_programs_ptr, kv_head, num_kv_heads, num_seqs, max_dense_len, num_programs, min_work,
            dense_work, piece_work, schedule.UNIT, SEQ_BLOCK, HEAD_BLOCK,
        )  # fmt: skip
        num_programs = of_head
        if CHOOSES:
            num_programs = tl.where(reads_all, num_values_programs, of_head)
    work, share, entry, _, _ = work_of_step(
        tokens, num_seqs, max_dense_len, num_programs, min_work, dense_work, piece_work, schedule.UNIT, SEQ_BLOCK
    )
    index = tl.arange(0, SEQ_BLOCK)
    work_before = tl.sum(tl.where(index < seq, work, 0), axis=0)
    last_work = tl.sum(tl.where(index <= seq, work, 0), axis=0) - 1
    if EARLY_MERGE:
        tl.extra.cuda.gdc_wait()

    maximum = tl.full((), DISCARDED, dtype=tl.float32)
    kept_sum = tl.zeros((), dtype=tl.float32)
    lost_sum = tl.zeros((), dtype=tl.float32)
    weighted = tl.zeros((WIDTH,), dtype=tl.float32)
    last_program = last_work // share
    for first_program in range(work_before // share, last_program + 1, PIECE_BLOCK):
        program = first_program + tl.arange(0, PIECE_BLOCK)
        first_unit, last_unit = units_of_piece(
            program, share, work_before, entry, seq_len, is_dense, dense_work, schedule.UNIT
        )
        mask_p = (program <= last_program) & (first_unit < last_unit)
        piece = (program + seq).to(tl.int64) * num_kv_heads + kv_head
        stats = pieces.stats + piece * 3 * GROUP + query
        maxima = tl.load(stats, mask=mask_p, other=DISCARDED)
        kept = tl.load(stats + GROUP, mask=mask_p, other=0.0)
        lost = tl.load(stats + 2 * GROUP, mask=mask_p, other=0.0)
        partial = tl.load(
            pieces.output + (piece * GROUP + query)[:, None] * HEAD_SIZE + offs_d[None, :],
            mask=mask_p[:, None] & mask_d[None, :],
            other=0.0,
        )
        new_maximum = tl.maximum(maximum, tl.max(maxima, axis=0))
        weights = tl.exp2((maxima - new_maximum) * LOG2_E)
        rescale = tl.exp2((maximum - new_maximum) * LOG2_E)
        kept_sum = kept_sum * rescale + tl.sum(weights * kept, axis=0)
        lost_sum = lost_sum * rescale + tl.sum(weights * lost, axis=0)
        weighted = weighted * rescale + tl.sum(weights[:, None] * partial, axis=0)
        maximum = new_maximum

    if sinks_ptr is not None:
        # of no key, so neither lost nor with a value: it only takes a share
        sink = tl.load(sinks_ptr + head).to(tl.float32)
        new_maximum = tl.maximum(maximum, sink)
        rescale = tl.exp2((maximum - new_maximum) * LOG2_E)
        lost_sum *= rescale
        weighted *= rescale
        kept_sum = kept_sum * rescale + tl.exp2((sink - new_maximum) * LOG2_E)
    total = kept_sum + lost_sum
    # scores far below the threshold leave no trace in either sum
    lost_mass = tl.where(total > 0.0, lost_sum / tl.where(total > 0.0, total, 1.0), 1.0)
    if DENOMINATOR_COMPENSATION:
        known_lost = lost_mass
        result = weighted / tl.where(total > 0.0, total, 1.0)
    else:
        # nothing is known to be lost, unless no key survived at all
        known_lost = tl.where(kept_sum > 0.0, 0.0, 1.0)
        result = weighted / tl.where(kept_sum > 0.0, kept_sum, 1.0)
    if shape.VALUE_MEAN:
        result += known_lost * (value_sum / num_seen)
        if closes & (head % heads == 0):
            tl.store(value_sum_row + block * stride_sum_block, value_sum, mask=mask_d)
    if v_scale_ptr is not None:
        result *= tl.load(v_scale_ptr)
    tl.store(output_row, result.to(output_ptr.dtype.element_ty), mask=mask_d)
    if counts.lost_mass is not None:
        is_common = (part == 0) & (offset_of(tokens, seq, num_seqs) == 0.0)
        tl.atomic_add(counts.lost_mass + head, lost_mass.to(tl.float64), mask=is_common, sem="relaxed")
        bucket = counts.lost_mass_histogram + head * NUM_BUCKETS + _bucket(lost_mass, NUM_BUCKETS)
        tl.atomic_add(bucket, 1, mask=is_common & (seq_len > max_dense_len), sem="relaxed")


def launch_merge(
    step: DecodeStep, call: LayerCall, pieces: Pieces, launches: Launches, choice: Choice | None = None
) -> None:
    """Join what the programs of `launches` have left, or those of another kernel by `choice`."""
    output, cache, counters = call.output, call.cache, call.layer.counters
    num_seqs, num_heads = len(step.seq_lens), output.shape[1]
    num_programs, schedule = launches.num_programs, launches.schedule
    chosen = choice or Choice(0, 0, num_programs, schedule)
    piece_block, num_parts, merge_warps = _merge_shape(num_programs / num_seqs)
    merge_kernel[(num_heads * num_parts, num_seqs * step.max_query_len)](
        Tokens.of(step, cache),
        pieces,
        Counts.of(counters),
        output,
        cache.value_sum,
        cache.v_scale,
        call.layer.sinks,
        launches.head_programs,
        output.stride(0),
        output.stride(1),
        0 if cache.value_sum is None else cache.value_sum.stride(0),
        0 if cache.value_sum is None else cache.value_sum.stride(1),
        step.block_table.stride(0),
        num_seqs,
        cache.kv_cache.shape[1],
        num_programs,
        chosen.num_programs,
        step.max_dense_len,
        step.min_step_tokens,
        chosen.few_tokens,
        chosen.short_length,
        Shape.of(call, step.max_query_len),
        schedule,
        chosen.schedule,
        PIECE_BLOCK=piece_block,
        NUM_PARTS=num_parts,
        BLOCK_PAD=next_power_of_2(cache.kv_cache.shape[2]),
        HEAD_BLOCK=next_power_of_2(cache.kv_cache.shape[1]),
        NUM_BUCKETS=0 if counters is None else counters.lost_mass_histogram.shape[1],
        DENOMINATOR_COMPENSATION=call.layer.denominator_compensation,
        CHOOSES=choice is not None,
        EARLY_MERGE=launches.is_early,
        **launch_options(launches.merge_warps or merge_warps, is_early=launches.is_early),
    )


def _merge_shape(programs_per_seq: float) -> tuple[int, int, int]:
    """Pieces that a program of the merge reads at a time, parts that the channels of a head are divided into, warps.

    All of a sequence's pieces, where lengths are even. Few sequences have many pieces, and few programs to join them.
    """
    shapes = {3: (4, 1, 1), 8: (16, 1, 2), 16: (16, 2, 2), 32: (32, 4, 4), 64: (64, 4, 4)}
    return next((shape for most, shape in shapes.items() if programs_per_seq <= most), (256, 4, 4))
