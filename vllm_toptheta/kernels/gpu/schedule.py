"""How a decode step is shared out among programs, decided on the device.

The grid of a captured CUDA graph is fixed, the lengths are not. So every kv head gets a fixed number of programs, and
each works out its own share from `seq_lens`: the keys of all sequences are laid end to end, in units of a few tokens,
and program p takes the work from p * share to (p + 1) * share, wherever sequences begin and end in there. A unit of a
sequence that keeps everything counts `dense_work` times, because more is read of it: twice where otherwise all keys are
read and few values, more often where most keys are not read either. In mode `shadow`, a step may read all keys
nevertheless, where that is faster (`reads_all_keys`); it is shared out as in mode `values` then.

A step too small for thresholds is bound by latency, and a program that has the end of one sequence and the beginning of
the next takes nearly twice as long as others. There a sequence's work is rounded up to whole shares. Large steps are
bound by memory, and equal shares are faster, unless a piece takes long beside its
keys (`piece_work`) and few are wasted.

What a program does for one sequence is a piece; sequence s and program p share piece number p + s, which is unique,
because going through the work in order increases one of the two at every step.
"""

import triton
import triton.language as tl

from vllm_toptheta.kernels.gpu.records import Schedule, next_power_of_2
from vllm_toptheta.kernels.gpu.thresholds import keeps_all

MIN_BLOCK_SIZE = 16
_ANY_LENGTH = tl.constexpr(2**31 - 1)


def unit_of(tile: int, block_size: int) -> int:
    """Tokens of a unit of work: a page where pages fill a tile, because then block numbers are loaded page by page."""
    return block_size if tile % block_size == 0 else MIN_BLOCK_SIZE


def schedule_of(unit: int, *, min_tokens: int, dense_work: int, num_seqs: int, piece_tokens: int = 0) -> Schedule:
    """How a step of `num_seqs` sequences is shared out among programs that `min_tokens` keys are worth.

    A piece takes as long as `piece_tokens` keys, beside its own.
    """
    return Schedule(unit, max(1, min_tokens // unit), dense_work, room_for(num_seqs), piece_tokens // unit)


def room_for(num_seqs: int) -> int:
    """Size of a vector over all sequences: one of few, because each is compiled."""
    return next((size for size in (32, 128, 512) if num_seqs <= size), next_power_of_2(num_seqs))


@triton.jit
def load_lengths(seq_lens_ptr, num_seqs, SEQ_BLOCK: tl.constexpr):
    """Lengths of all sequences, [SEQ_BLOCK] int32; 0 behind the last one."""
    index = tl.arange(0, SEQ_BLOCK)
    return tl.load(seq_lens_ptr + index, mask=index < num_seqs, other=0)


@triton.jit
def dense_length(tokens, num_seqs, max_dense_len, min_step_tokens, SEQ_BLOCK: tl.constexpr):
    """The longest sequence of a step that keeps every key: any, if the step has less than `min_step_tokens`."""
    num_tokens = tl.sum(load_lengths(tokens.seq_lens, num_seqs, SEQ_BLOCK), axis=0)
    return tl.where(num_tokens < min_step_tokens, _ANY_LENGTH, max_dense_len)


@triton.jit
def reads_all_keys(seq_lens, few_tokens, short_length):
    """Whether a step has less than `few_tokens` or, in the mean of its sequences, less than `short_length`."""
    num_tokens = tl.sum(seq_lens, axis=0)
    return (num_tokens < few_tokens) | (num_tokens < short_length * tl.sum((seq_lens > 0).to(tl.int32), axis=0))


@triton.jit
def work_of(seq_len, is_dense, dense_work, multiple, UNIT: tl.constexpr):
    """Work of sequences of `seq_len` tokens, a scalar or a tensor, rounded up to a multiple."""
    return tl.cdiv(tl.cdiv(seq_len, UNIT) * tl.where(is_dense, dense_work, 1), multiple) * multiple


@triton.jit
def work_of_step(
    tokens, num_seqs, max_dense_len, num_programs, min_work, dense_work, piece_work, UNIT: tl.constexpr,
    SEQ_BLOCK: tl.constexpr,
):  # fmt: skip
    """Return the work of every sequence, [SEQ_BLOCK] int32, a program's share of the whole, and `work_of`'s multiple.

    `max_dense_len` is a `dense_length`; what follows `num_programs` are fields of one `Schedule`. Whoever joins pieces
    has to ask with the same as those who left them.
    """
    seq_lens = load_lengths(tokens.seq_lens, num_seqs, SEQ_BLOCK)
    seq = tl.arange(0, SEQ_BLOCK)
    is_dense = keeps_all(tokens, seq, seq_lens, num_seqs, max_dense_len)
    work = work_of(seq_lens, is_dense, dense_work, 1, UNIT)
    total = tl.sum(work, axis=0)
    num_decoded = tl.maximum(tl.sum((work > 0).to(tl.int32), axis=0), 1)
    # either leaves programs for the part of a share that a sequence may waste; of even lengths the first wastes none
    even = tl.cdiv(tl.max(work, axis=0), tl.maximum(num_programs // num_decoded, 1))
    rounded = tl.minimum(even, tl.cdiv(total, tl.maximum(num_programs - num_decoded, 1)))
    equal = tl.cdiv(total, num_programs)
    # of large steps only where a piece less is worth more than what is wasted
    is_worth = (num_decoded <= num_programs) & (rounded < equal + piece_work)
    is_rounded = tl.where(max_dense_len == _ANY_LENGTH, 2 * num_decoded <= num_programs, is_worth)
    share = tl.maximum(tl.where(is_rounded, rounded, equal), min_work)
    multiple = tl.where(is_rounded, share, 1)
    return tl.cdiv(work, multiple) * multiple, share, multiple


@triton.jit
def units_of_piece(program, share, work_before, seq_len, is_dense, dense_work, UNIT: tl.constexpr):
    """Return the first unit of a sequence that is a program's, and the one behind its last.

    Args:
        program: Programs, a scalar or a tensor.
        share: Work of a program.
        work_before: Work of all sequences before this one.
        seq_len: Tokens of the sequence.
        is_dense: Whether it keeps everything.
        dense_work: Work of a unit if so.
    """
    weight = tl.where(is_dense, dense_work, 1)
    num_units = tl.cdiv(seq_len, UNIT)
    # units begin at multiples of their weight: rounding both ends up leaves none out and none twice
    first = tl.cdiv(tl.maximum(program * share - work_before, 0), weight)
    last = tl.cdiv(tl.maximum((program + 1) * share - work_before, 0), weight)
    return tl.minimum(first, num_units), tl.minimum(last, num_units)


@triton.jit
def first_of_share(work, share, program):
    """Return the sequence in which a share begins, the work before that sequence, and where the share ends."""
    ends = tl.cumsum(work, axis=0)
    before = ends <= program * share
    end_of_share = tl.minimum((program + 1) * share, tl.sum(work, axis=0))
    return tl.sum(before.to(tl.int32), axis=0), tl.sum(tl.where(before, work, 0), axis=0), end_of_share


@triton.jit
def store_piece(pieces, index, piece, shape, tiling):
    """Leave `piece` to the merge, as number `index` (int64)."""
    offs_g = tl.arange(0, tiling.G_PAD)
    offs_d = tl.arange(0, shape.D_PAD)
    mask_g = offs_g < shape.GROUP
    stats = pieces.stats + index * 3 * shape.GROUP + offs_g
    tl.store(stats, piece.maximum, mask=mask_g)
    tl.store(stats + shape.GROUP, piece.kept_sum, mask=mask_g)
    tl.store(stats + 2 * shape.GROUP, piece.lost_sum, mask=mask_g)
    tl.store(
        pieces.output + (index * shape.GROUP + offs_g[None, :]) * shape.HEAD_SIZE + offs_d[:, None],
        piece.output,
        mask=mask_g[None, :] & (offs_d < shape.HEAD_SIZE)[:, None],
    )
