"""How a decode step is shared out among programs, decided on the device.

The grid of a captured CUDA graph is fixed, the lengths are not. So every kv head gets a number of programs (the same
one, but in kernels in CUDA C++: `balance.py`), and each works out its own share from `seq_lens`:
the keys of all sequences are laid end to end, in units of a few tokens, and program p takes the work from p * share
to (p + 1) * share, wherever sequences begin and end in there. A unit of a sequence that keeps everything counts
`dense_work` times, because more is read of it: twice where otherwise all keys are read and few values, more often
where most keys are not read either. In mode `shadow`, a step may read all keys nevertheless, where that is faster
(`reads_all_keys`); it is shared out as in mode `values` then. Kernels in CUDA C++ deal out the units of a sequence
before it is laid there (`Spread` of schedule.cuh), so that no share has more than its part of a cluster.

A step too small for thresholds is bound by latency, and a program that has the end of one sequence and the beginning
of the next takes nearly twice as long as others. There a sequence's work is rounded up to whole shares. Large steps
are bound by memory, and equal shares are faster. Where a piece takes long beside its keys (`piece_work`), a sequence
begins with as much work that is no keys, so that the program that has its beginning and another's end gets fewer keys;
and where that costs more than whole shares waste, work is rounded up as in small steps. There, kv heads have as many
programs as others, unless that costs more than second pieces (`programs_of_head`).

What a program does for one sequence is a piece; sequence s and program p share piece number p + s, which is unique,
because going through the work in order increases one of the two at every step.
"""

import triton
import triton.language as tl

from vllm_toptheta.kernels.gpu.records import Schedule, next_power_of_2
from vllm_toptheta.kernels.gpu.registers import Group, Share, Span, Units
from vllm_toptheta.kernels.gpu.thresholds import keeps_all
from vllm_toptheta.kernels.gpu.tiles import load_query, score_scale

MIN_BLOCK_SIZE = 16
ANY_LENGTH = tl.constexpr(2**31 - 1)


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
    return tl.where(num_tokens < min_step_tokens, ANY_LENGTH, max_dense_len)


@triton.jit
def reads_all_keys(seq_lens, few_tokens, short_length):
    """Whether a step has less than `few_tokens` or, in the mean of its sequences, less than `short_length`."""
    num_tokens = tl.sum(seq_lens, axis=0)
    return (num_tokens < few_tokens) | (num_tokens < short_length * tl.sum((seq_lens > 0).to(tl.int32), axis=0))


@triton.jit
def work_of(seq_len, is_dense, dense_work, entry, multiple, UNIT: tl.constexpr):
    """Work of sequences of `seq_len` tokens, a scalar or a tensor, and of an entry, rounded up to a multiple."""
    work = tl.cdiv(seq_len, UNIT) * tl.where(is_dense, dense_work, 1)
    return tl.cdiv(work + tl.where(seq_len > 0, entry, 0), multiple) * multiple


@triton.jit
def work_of_step(
    tokens, num_seqs, max_dense_len, num_programs, min_work, dense_work, piece_work, UNIT: tl.constexpr,
    SEQ_BLOCK: tl.constexpr,
):  # fmt: skip
    """Return the work of every sequence, [SEQ_BLOCK] int32, a program's share of the whole, `work_of`'s entry and
    multiple, and what share programs have if each sequence has an entry.

    `max_dense_len` is a `dense_length`; what follows `num_programs` are fields of one `Schedule`. Whoever joins pieces
    has to ask with the same as those who left them.
    """
    seq_lens = load_lengths(tokens.seq_lens, num_seqs, SEQ_BLOCK)
    seq = tl.arange(0, SEQ_BLOCK)
    is_dense = keeps_all(tokens, seq, seq_lens, num_seqs, max_dense_len)
    work = work_of(seq_lens, is_dense, dense_work, 0, 1, UNIT)
    total = tl.sum(work, axis=0)
    num_decoded = tl.maximum(tl.sum((work > 0).to(tl.int32), axis=0), 1)
    # either leaves programs for the part of a share that a sequence may waste; of even lengths the first wastes none
    even = tl.cdiv(tl.max(work, axis=0), tl.maximum(num_programs // num_decoded, 1))
    rounded = tl.minimum(even, tl.cdiv(total, tl.maximum(num_programs - num_decoded, 1)))
    # one sequence is one piece of each program, and small steps are rounded or not by their number of sequences
    piece_work = tl.where((num_decoded > 1) & (max_dense_len != ANY_LENGTH), piece_work, 0)
    equal = tl.cdiv(total + num_decoded * piece_work, num_programs)
    # of large steps only where what is wasted is hardly more than what second pieces take
    is_worth = (num_decoded <= num_programs) & (rounded < equal + piece_work // 2)
    is_rounded = tl.where(max_dense_len == ANY_LENGTH, 2 * num_decoded <= num_programs, is_worth)
    share = tl.maximum(tl.where(is_rounded, rounded, equal), min_work)
    multiple, entry = tl.where(is_rounded, share, 1), tl.where(is_rounded, 0, piece_work)
    return work_of(seq_lens, is_dense, dense_work, entry, multiple, UNIT), share, entry, multiple, equal


@triton.jit
def programs_of_head(
    tokens, head_programs_ptr, kv_head, num_kv_heads, num_seqs, max_dense_len, num_programs, min_work, dense_work,
    piece_work, UNIT: tl.constexpr, SEQ_BLOCK: tl.constexpr, HEAD_BLOCK: tl.constexpr,
):  # fmt: skip
    """Programs of a kv head of a kernel in CUDA C++, as `is_balanced` of schedule.cuh says.

    `num_programs` are those of a head on average; what follows, and what is in front, is as of `work_of_step`.
    """
    work, share, _, multiple, equal = work_of_step(
        tokens, num_seqs, max_dense_len, num_programs, min_work, dense_work, piece_work, UNIT, SEQ_BLOCK
    )
    head = tl.arange(0, HEAD_BLOCK)
    most = tl.max(tl.load(head_programs_ptr + head, mask=head < num_kv_heads, other=0), axis=0).to(tl.int64)
    second = tl.where(tl.sum((work > 0).to(tl.int32), axis=0) > 1, 4 * piece_work // 3, 0)
    is_balanced = (multiple == 1) | (share * most > (equal + second) * tl.cast(num_programs, tl.int64))
    is_balanced &= max_dense_len != ANY_LENGTH
    return tl.where(is_balanced, tl.load(head_programs_ptr + kv_head), num_programs)


@triton.jit
def units_of_piece(program, share, work_before, entry, seq_len, is_dense, dense_work, UNIT: tl.constexpr):
    """Return the first unit of a sequence that is a program's, and the one behind its last.

    Args:
        program: Programs, a scalar or a tensor.
        share: Work of a program.
        work_before: Work of all sequences before this one.
        entry: Work of the sequence before its first unit.
        seq_len: Tokens of the sequence.
        is_dense: Whether it keeps everything.
        dense_work: Work of a unit if so.
    """
    weight = tl.where(is_dense, dense_work, 1)
    num_units = tl.cdiv(seq_len, UNIT)
    work_before += entry
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
def share_of_program(tokens, num_seqs, max_dense_len, min_step_tokens, schedule):
    """Return this program's `Share`, the sequence in which it begins, and the work before that sequence.

    Of a grid [num_kv_heads, num_programs].
    """
    kv_head = tl.program_id(0).to(tl.int64)
    program = tl.program_id(1)
    num_kv_heads = tl.num_programs(0)
    max_dense_len = dense_length(tokens, num_seqs, max_dense_len, min_step_tokens, schedule.SEQ_BLOCK)
    work, size, entry, multiple, _ = work_of_step(
        tokens, num_seqs, max_dense_len, tl.num_programs(1), schedule.MIN_WORK, schedule.DENSE_WORK,
        schedule.PIECE_WORK, schedule.UNIT, schedule.SEQ_BLOCK,
    )  # fmt: skip
    seq, work_before, end = first_of_share(work, size, program)
    return Share(kv_head, program, num_kv_heads, max_dense_len, size, entry, multiple, end), seq, work_before


@triton.jit
def new_tokens(tokens, seq, seq_len, number):
    """Return which tokens of the step numbers of a sequence's new ones are, how many keys they see, and if they exist.

    Args:
        tokens: `Tokens`, with starts of sequences.
        seq: The sequence.
        seq_len: Its tokens, all new ones included.
        number: From 0 on, a scalar or a tensor; those behind the last new token are taken for it.
    """
    first = tl.load(tokens.query_start_loc + seq)
    last = tl.load(tokens.query_start_loc + seq + 1) - first - 1
    nearest = tl.minimum(number, last)
    return first + nearest, seq_len - last + nearest, number <= last


@triton.jit
def group_of_share(tokens, queries, share, shape, tiling):
    """The `Group` that a program has a share of."""
    offs_g = tl.arange(0, tiling.G_PAD)
    heads = shape.GROUP // shape.QUERY_LEN
    return Group(
        share.kv_head,
        offs_g < shape.GROUP,
        share.kv_head * heads + (offs_g if shape.QUERY_LEN == 1 else offs_g % heads),
        offs_g // heads,
        score_scale(queries),
        tokens.kv_cache + share.kv_head * tokens.stride_head,
        share.program.to(tl.int64) * share.num_kv_heads + share.kv_head,
    )


@triton.jit
def units_of_share(tokens, share, seq, work_before, num_seqs, schedule):
    """The `Units` of a sequence that lie in a share, where `work_before` is the work of all sequences before it."""
    seq_len = tl.load(tokens.seq_lens + seq)
    is_dense = keeps_all(tokens, seq, seq_len, num_seqs, share.max_dense_len)
    first, end = units_of_piece(
        share.program, share.size, work_before, share.entry, seq_len, is_dense, schedule.DENSE_WORK, schedule.UNIT
    )
    return Units(seq, seq_len, is_dense, first, end)


@triton.jit
def load_piece(tokens, queries, group, units, stride_table_seq, shape, schedule):
    """Return the queries of a piece, as of `load_query`, and its `Span`."""
    start, end = units.first * schedule.UNIT, tl.minimum(units.end * schedule.UNIT, units.seq_len)
    token, seen = units.seq, units.seq_len
    if shape.QUERY_LEN > 1:
        token, seen, _ = new_tokens(tokens, units.seq, units.seq_len, group.number)
    query = load_query(queries, token, group.head, group.mask, shape)
    return query, Span(tokens.block_table + units.seq.to(tl.int64) * stride_table_seq, start, end, token, seen)


@triton.jit
def open_page(seq_len, shape):
    """Where the page begins that a sequence's next token goes to, whose rows the merge reads if it needs the mean."""
    start = seq_len
    if shape.VALUE_MEAN:
        start = seq_len // shape.BLOCK_SIZE * shape.BLOCK_SIZE
    return start


@triton.jit
def store_piece(pieces, share, seq, piece, shape, tiling):
    """Leave the piece of a share and a sequence to the merge."""
    index = (share.program + seq).to(tl.int64) * share.num_kv_heads + share.kv_head
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
