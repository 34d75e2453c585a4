"""Decoding in mode `values`, and of dense layers, as Numba compiles it: every key is read once, in place.

anchors  the threshold of every head, from the scores of the first and last keys
chunks   scores of a chunk of keys, exponentials, and the values of those that some head of the group keeps
join     the chunks of a head, in their order, whoever computed them

`score_keys` and `add_rows`, most of the work, are written as LLVM's instructions on vectors of 16 numbers: Numba's own
loops over arrays would keep their sums in memory. LLVM makes of a vector what the CPU has: one register with AVX-512,
two with AVX2, four with NEON. All that is compiled stands in this file: Numba's cache on disk looks at no other.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from vllm_toptheta.limits import LOST_MASS_EDGES, NUM_FIRST_ANCHORS, NUM_LAST_ANCHORS

__all__ = ["CHUNK", "ELEMENTS", "LANES", "decode"]

LANES = 16
CHUNK = 512  # keys
MOST_HEADS = 8  # whose sums, of two vectors each, fit into registers; larger groups take several turns
# keys and values are asked for this much before they are worked on
KEYS_AHEAD = 128
ROWS_AHEAD = 16
# what numbers are kept as: float32 itself, the bits of bfloat16, or those of float16
ELEMENTS = (types.float32, types.uint16, types.int16)
_FAST = {"reassoc", "contract", "nsz", "arcp"}  # no "nnan": memory that nobody has written may hold anything
# the last bucket has no upper edge of its own, since no mass exceeds 1
_INNER_EDGES = np.array(LOST_MASS_EDGES[:-1], np.float32)
_LOWEST, _LEAST = np.float32(-np.inf), np.float32(np.finfo(np.float32).tiny)

_FLOAT, _INT16, _INT32, _INT64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_BYTES = ir.IntType(8).as_pointer()
_VECTOR, _WORDS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_INT32, LANES)
_HALVES, _SHORTS = ir.VectorType(ir.HalfType(), LANES), ir.VectorType(_INT16, LANES)
_FLAGS = tuple(sorted(_FAST))


def _load(builder: Any, pointer: Any, element: types.Type) -> Any:
    """16 elements, of one of `ELEMENTS`, as float32."""
    if element == types.float32:
        return builder.load(builder.bitcast(pointer, _VECTOR.as_pointer()), align=4)
    if element == types.int16:
        return builder.fpext(builder.load(builder.bitcast(pointer, _HALVES.as_pointer()), align=2), _VECTOR)
    bits = builder.load(builder.bitcast(pointer, _SHORTS.as_pointer()), align=2)
    return builder.bitcast(builder.shl(builder.zext(bits, _WORDS), _words(16)), _VECTOR)


def _store(builder: Any, vector: Any, pointer: Any, element: types.Type = types.float32) -> None:
    """16 numbers as elements, of one of `ELEMENTS`: the nearest, of two as near the even one."""
    if element == types.int16:
        vector = builder.fptrunc(vector, _HALVES)
    elif element == types.uint16:
        bits = builder.bitcast(vector, _WORDS)
        is_odd = builder.and_(builder.lshr(bits, _words(16)), _words(1))
        nearest = builder.add(bits, builder.add(is_odd, _words(0x7FFF)))  # a NaN's may overflow
        bits = builder.select(builder.fcmp_unordered("uno", vector, vector), _words(0x7FC00000), nearest)
        vector = builder.trunc(builder.lshr(bits, _words(16)), _SHORTS)
    builder.store(vector, builder.bitcast(pointer, vector.type.as_pointer()), align=element.bitwidth // 8)


def _words(number: int) -> Any:
    return ir.Constant(_WORDS, [number] * LANES)


def _splat(builder: Any, number: Any) -> Any:
    """A vector of one number."""
    undefined = ir.Constant(_VECTOR, ir.Undefined)
    first = builder.insert_element(undefined, number, ir.Constant(_INT32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_WORDS, [0] * LANES))


def _add_product(builder: Any, total: Any, one: Any, other: Any) -> Any:
    return builder.fadd(total, builder.fmul(one, other, flags=_FLAGS), flags=_FLAGS)


def _prefetch(builder: Any, pointer: Any) -> None:
    """Ask for memory that will be read soon, which need not exist.

    Into the second cache: it waits for twice as many lines at a time as the first, and pages that lie anywhere arrive
    twice as fast.
    """
    kind = ir.FunctionType(ir.VoidType(), [_BYTES, _INT32, _INT32, _INT32])
    function = builder.module.declare_intrinsic("llvm.prefetch", (_BYTES,), kind)
    to_read, into_second, of_data = ir.Constant(_INT32, 0), ir.Constant(_INT32, 2), ir.Constant(_INT32, 1)
    builder.call(function, [builder.bitcast(pointer, _BYTES), to_read, into_second, of_data])


def _pointer(context: Any, builder: Any, kind: types.Array, array: Any) -> Any:
    """To an array's first element."""
    return cgutils.create_struct_proxy(kind)(context, builder, array).data


class _Loop:
    """A loop that counts from 0 and adds to vectors in registers, a row of them for every head; runs at least once."""

    def __init__(self, builder: Any, heads: int, vectors: int, count: Any) -> None:
        self.builder, self.count = builder, count
        before = builder.block
        self.body, self.after = builder.append_basic_block("body"), builder.append_basic_block("after")
        builder.branch(self.body)
        builder.position_at_end(self.body)
        self.index = builder.phi(_INT64)
        self.index.add_incoming(ir.Constant(_INT64, 0), before)
        self.totals = [[builder.phi(_VECTOR) for _ in range(vectors)] for _ in range(heads)]
        for total in sum(self.totals, []):
            total.add_incoming(ir.Constant(_VECTOR, [0.0] * LANES), before)

    def add(self, factors: list[Any], vectors: list[Any]) -> list[list[Any]]:
        """Every head's factor times these vectors to its totals; go round again until all is counted."""
        builder = self.builder
        sums = [
            [_add_product(builder, total, factor, vector) for total, vector in zip(row, vectors, strict=True)]
            for row, factor in zip(self.totals, factors, strict=True)
        ]
        following = _plus(builder, self.index, 1)
        self.index.add_incoming(following, builder.block)
        for total, new in zip(sum(self.totals, []), sum(sums, []), strict=True):
            total.add_incoming(new, builder.block)
        builder.cbranch(builder.icmp_signed("<", following, self.count), self.body, self.after)
        builder.position_at_end(self.after)
        return sums


def _plus(builder: Any, number: Any, constant: int) -> Any:
    return builder.add(number, ir.Constant(_INT64, constant))


def _times(builder: Any, number: Any, constant: int) -> Any:
    return builder.mul(number, ir.Constant(_INT64, constant))


def _choose(builder: Any, number: Any, cases: Mapping[int, Callable[[], None]]) -> None:
    """Code for every case; a number that is given chooses at run time."""
    done = builder.append_basic_block("done")
    choice = builder.switch(number, done)
    for case, emit in cases.items():
        block = builder.append_basic_block(f"case_{case}")
        choice.add_case(ir.Constant(_INT64, case), block)
        builder.position_at_end(block)
        emit()
        builder.branch(done)
    builder.position_at_end(done)


def _for_sizes(builder: Any, num_heads: Any, num_vectors: Any, emit: Callable[[int, int], None]) -> None:
    """Code for every number of heads and vectors."""
    cases = {
        2 * heads + vectors: functools.partial(emit, heads, vectors)
        for heads in range(1, MOST_HEADS + 1)
        for vectors in (1, 2)
    }
    _choose(builder, builder.add(_times(builder, num_heads, 2), num_vectors), cases)


def _for_elements(builder: Any, kind: Any, address: Any, at: Any, emit: Callable[[types.Type, Any], None]) -> None:
    """Code for each of `ELEMENTS`, of which `kind` chooses, with a pointer to element `at` of those at `address`."""

    def emit_for(element: types.Type) -> None:
        place = builder.add(address, _times(builder, at, element.bitwidth // 8))
        emit(element, builder.inttoptr(place, _BYTES))

    _choose(builder, kind, {index: functools.partial(emit_for, element) for index, element in enumerate(ELEMENTS)})


@intrinsic
def _widen_vector(typing_context, address, kind, at, factor, numbers):
    """LANES elements as float32 times a factor, from element `at` on to the same place in an array."""

    def code(context, builder, signature, values):
        target = builder.gep(_pointer(context, builder, signature.args[4], values[4]), [values[2]])

        def emit(element, source):
            vector = _load(builder, source, element)
            _store(builder, builder.fmul(vector, _splat(builder, values[3]), flags=_FLAGS), target)

        _for_elements(builder, values[1], values[0], values[2], emit)
        return context.get_dummy_value()

    return types.void(address, kind, at, factor, numbers), code


@intrinsic
def _narrow_vector(typing_context, numbers, start, address, kind, at):
    """LANES numbers of an array, from `start` on, as elements from element `at` on."""

    def code(context, builder, signature, values):
        source = builder.gep(_pointer(context, builder, signature.args[0], values[0]), [values[1]])
        vector = _load(builder, source, types.float32)
        _for_elements(
            builder, values[3], values[2], values[4], lambda element, target: _store(builder, vector, target, element)
        )
        return context.get_dummy_value()

    return types.void(numbers, start, address, kind, at), code


@intrinsic
def score_keys(
    typing_context,
    num_heads,  # of the group, at most MOST_HEADS
    num_vectors,  # 1 or 2 times LANES keys
    query,  # [...] float32
    query_start,  # of the first of these heads; the others follow
    head_size,
    keys,  # [...] of the cache
    key_start,  # channel 0 of the first of these keys
    next_start,  # the same of those that will be asked for next
    key_stride,  # from a channel to the next
    scores,  # [...] float32, written
    score_start,
    score_stride,  # from a head to the next
):
    """q . k of the next keys of a page, for heads of a group."""
    arguments = (
        num_heads, num_vectors, query, query_start, head_size, keys, key_start, next_start, key_stride, scores,
        score_start, score_stride,
    )  # fmt: skip

    def code(context, builder, signature, values):
        of_query, of_keys, of_scores = (_pointer(context, builder, signature.args[at], values[at]) for at in (2, 5, 9))
        given_heads, given_vectors, _, first, size, _, start, following, stride, _, target, apart = values
        element = signature.args[5].dtype

        def emit(heads, vectors):
            loop = _Loop(builder, heads, vectors, size)
            to_channel = builder.mul(loop.index, stride)
            _prefetch(builder, builder.gep(of_keys, [builder.add(following, to_channel)]))
            row = builder.gep(of_keys, [builder.add(start, to_channel)])
            channel = [
                _load(builder, builder.gep(row, [ir.Constant(_INT64, LANES * part)]), element)
                for part in range(vectors)
            ]
            place = builder.add(first, loop.index)
            factors = [
                _splat(builder, builder.load(builder.gep(of_query, [builder.add(place, _times(builder, size, head))])))
                for head in range(heads)
            ]
            for head, sums in enumerate(loop.add(factors, channel)):
                at = builder.add(target, _times(builder, apart, head))
                for part, total in enumerate(sums):
                    _store(builder, total, builder.gep(of_scores, [_plus(builder, at, LANES * part)]))

        _for_sizes(builder, given_heads, given_vectors, emit)
        return context.get_dummy_value()

    return types.void(*arguments), code


@intrinsic
def add_rows(
    typing_context,
    num_heads,  # of the group, at most MOST_HEADS
    num_vectors,  # 1 or 2 times LANES channels
    weights,  # [...] float32
    weight_start,  # of the first of these heads
    weight_stride,  # from a head to the next
    places,  # [...] int64, which weights
    rows,  # [...] int64, and where in `pages` the values stand that they weigh
    count,  # of these, at least 1
    pages,  # [...] of the cache
    channel,  # the first of these channels
    output,  # [...] float32, written
    output_start,  # of the first of these heads
    output_stride,  # from a head to the next
):
    """Sums of weights times values, in the next channels, for heads of a group."""
    arguments = (
        num_heads, num_vectors, weights, weight_start, weight_stride, places, rows, count, pages, channel, output,
        output_start, output_stride,
    )  # fmt: skip

    def code(context, builder, signature, values):
        of_weights, of_places, of_rows, of_pages, of_output = (
            _pointer(context, builder, signature.args[at], values[at]) for at in (2, 5, 6, 8, 10)
        )
        given_heads, given_vectors, _, first, stride, _, _, number, _, offset, _, target, apart = values
        element = signature.args[8].dtype
        last = _plus(builder, number, -1)

        def emit(heads, vectors):
            loop = _Loop(builder, heads, vectors, number)
            later = _plus(builder, loop.index, ROWS_AHEAD)
            later = builder.select(builder.icmp_signed("<", later, last), later, last)
            soon = builder.add(builder.load(builder.gep(of_rows, [later])), offset)
            _prefetch(builder, builder.gep(of_pages, [soon]))
            row = builder.add(builder.load(builder.gep(of_rows, [loop.index])), offset)
            value = [
                _load(builder, builder.gep(of_pages, [_plus(builder, row, LANES * part)]), element)
                for part in range(vectors)
            ]
            place = builder.add(builder.load(builder.gep(of_places, [loop.index])), first)
            factors = [
                _splat(
                    builder, builder.load(builder.gep(of_weights, [builder.add(place, _times(builder, stride, head))]))
                )
                for head in range(heads)
            ]
            for head, sums in enumerate(loop.add(factors, value)):
                at = builder.add(builder.add(target, offset), _times(builder, apart, head))
                for part, total in enumerate(sums):
                    _store(builder, total, builder.gep(of_output, [_plus(builder, at, LANES * part)]))

        _for_sizes(builder, given_heads, given_vectors, emit)
        return context.get_dummy_value()

    return types.void(*arguments), code


def _compiled(function: Any) -> Any:
    """Compiled at its first call, and kept on disk unless there is no place for it."""
    options = {"parallel": True, "fastmath": _FAST}
    try:
        return njit(function, cache=True, **options)
    except RuntimeError:  # neither beside this file nor in the user's folder
        return njit(function, **options)


@njit(inline="always", fastmath=_FAST)
def _exp(x):
    """exp(x) of x <= 0, in operations that become vectors; 0 far below."""
    scaled = x * np.float32(1.4426950408889634)
    is_tiny = scaled < np.float32(-126.0)
    scaled = np.float32(-126.0) if is_tiny else scaled
    whole = np.floor(scaled + np.float32(0.5))
    # Taylor's series of 2^y between -0.5 and 0.5, to 2e-7
    y = (scaled - whole) * np.float32(0.6931471805599453)
    power = np.float32(1 / 720)
    power = power * y + np.float32(1 / 120)
    power = power * y + np.float32(1 / 24)
    power = power * y + np.float32(1 / 6)
    power = power * y + np.float32(0.5)
    power = power * y + np.float32(1.0)
    power = power * y + np.float32(1.0)
    # the exponent's bits, by a product that is exact: integers would be widened to 64 bits
    power *= np.int32((whole + np.float32(127.0)) * np.float32(1 << 23)).view(np.float32)
    return np.float32(0.0) if is_tiny else power


@njit(inline="always", fastmath=_FAST)
def _capped(score, soft_cap):
    """soft_cap * tanh(score / soft_cap)."""
    small = _exp(np.float32(-2.0) * np.abs(score) / soft_cap)
    size = soft_cap * (np.float32(1.0) - small) / (np.float32(1.0) + small)
    return -size if score < 0 else size


class Pages(NamedTuple):
    """A layer's cache, and where the sequences stand in it.

    Attributes:
        memory: [...] of `ELEMENTS`, from the cache's first on.
        page_stride, head_stride, block_size: In elements; in tokens.
        blocks: [num_seqs, max_blocks] int64.
        seq_lens: [num_seqs] int64.
        window: Most recent keys that are seen.
    """

    memory: Any
    page_stride: Any
    head_stride: Any
    block_size: Any
    blocks: Any
    seq_lens: Any
    window: Any


class Sums(NamedTuple):
    """The value sums of full pages; `memory` is empty without value means.

    Attributes:
        memory: [...] float32, from the first on.
        page_stride, head_stride: In elements.
    """

    memory: Any
    page_stride: Any
    head_stride: Any


class Queries(NamedTuple):
    """What is looked for.

    Attributes:
        query: [num_seqs, num_heads, head_size] float32, times the factor on q . k.
        soft_cap: float32, 0 for none.
        coefficients: [num_heads, 4] float32, as of `LayerThresholds`.
        log_lengths, offsets: [num_seqs] float32.
        is_dense: [num_seqs] bool.
        keeps_denominator: Whether it is that of all keys.
        sinks: [num_heads] float32, terms of anchor_lse and of the denominator; -inf for none.
    """

    query: Any
    soft_cap: Any
    coefficients: Any
    log_lengths: Any
    offsets: Any
    is_dense: Any
    keeps_denominator: Any
    sinks: Any


class _Chunks(NamedTuple):
    """What is known of every chunk of every sequence and kv head.

    Attributes:
        best: [num_chunks, group] float32, the highest score.
        sums: [num_chunks, group, 2] float32, of exponentials relative to it: of all keys, and of those that are kept.
        values: [num_chunks, group, head_size] float32, sums of kept exponentials times values.
        num_read: [num_chunks] int64, value rows.
    """

    best: Any
    sums: Any
    values: Any
    num_read: Any


@njit(inline="always")
def _vectors_of(size):
    """How many vectors are worked on at once where there are `size` numbers."""
    return 1 if size % (2 * LANES) else 2


@njit
def _widen(address, kind, factor, numbers):
    """The elements at `address` as float32 times a factor, as many as there is room for; they are whole vectors."""
    for at in range(0, len(numbers), LANES):
        _widen_vector(address, kind, at, factor, numbers)


@njit
def _narrow(numbers, address, kind, start):
    """Numbers as elements, from element `start` of those at `address` on; they are whole vectors."""
    for at in range(0, len(numbers), LANES):
        _narrow_vector(numbers, at, address, kind, start + at)


@njit(fastmath=_FAST)
def _score(query, soft_cap, pages, seq, kv_head, begin, end, origin, scores):
    """Scores of the keys from `begin` to `end` of a sequence, to [group, keys] from position `origin` on.

    Also of keys beside them, up to whole vectors; whatever those hold stands in no sum.
    """
    group, stride = scores.shape
    num_heads, head_size = query.shape[1:]
    flat_query, flat = query.ravel(), scores.ravel()
    block_size, blocks, vectors = pages.block_size, pages.blocks[seq], _vectors_of(pages.block_size)
    of_head, first_query = kv_head * pages.head_stride, (seq * num_heads + kv_head * group) * head_size
    width = vectors * LANES
    last = pages.seq_lens[seq] - 1
    for place in range(begin // width * width, end, width):
        page, soon = place // block_size, min(place + KEYS_AHEAD, last) // block_size
        start = blocks[page] * pages.page_stride + of_head + place - page * block_size
        then = blocks[soon] * pages.page_stride + of_head + (place + KEYS_AHEAD) % block_size
        for head in range(0, group, MOST_HEADS):
            score_keys(
                min(group - head, MOST_HEADS), vectors, flat_query, first_query + head * head_size, head_size,
                pages.memory, start, then, block_size, flat, head * stride + place - origin, stride,
            )  # fmt: skip
    if soft_cap > 0:
        for head in range(group):
            row = scores[head]
            for at in range(begin - origin, end - origin):
                row[at] = _capped(row[at], soft_cap)


@njit(fastmath=_FAST)
def _add_values(weights, places, rows, count, pages, head_size, output, output_start):
    """Sums of [group, keys] weights times `count` rows of values, to `output` from `output_start` on."""
    group, stride = weights.shape
    vectors, flat = _vectors_of(head_size), weights.ravel()
    for channel in range(0, head_size, vectors * LANES):
        for head in range(0, group, MOST_HEADS):
            add_rows(
                min(group - head, MOST_HEADS), vectors, flat, head * stride, stride, places, rows, count, pages.memory,
                channel, output, output_start + head * head_size, head_size,
            )  # fmt: skip


# Loops of one array each, in functions of their own: only so they become vectors.


@njit(fastmath=_FAST | {"nnan"})
def _highest(scores):
    best = _LOWEST
    for at in range(len(scores)):
        best = max(best, scores[at])
    return best


@njit(fastmath=_FAST)
def _exponentiate(scores, weights, best):
    """exp(score - best), and the sum."""
    total = np.float32(0.0)
    for at in range(len(scores)):
        weights[at] = _exp(scores[at] - best)
        total += weights[at]
    return total


@njit(fastmath=_FAST)
def _mark(scores, limit, is_read):
    """Add those from `limit` on to what is read."""
    for at in range(len(scores)):
        is_read[at] |= np.uint8(scores[at] >= limit)


@njit(fastmath=_FAST)
def _keep(scores, weights, limit):
    """Weights of scores from `limit` on, 0 of others, in place; and their sum."""
    total = np.float32(0.0)
    for at in range(len(scores)):
        weights[at] = weights[at] if scores[at] >= limit else np.float32(0.0)
        total += weights[at]
    return total


@njit(fastmath=_FAST)
def _find_thresholds(queries, pages, seq, kv_head, theta):
    """Those of a group, to `theta`, [group] float32."""
    group, seq_len = len(theta), pages.seq_lens[seq]
    if queries.is_dense[seq]:
        theta[:] = _LOWEST
        return
    needs_anchors, log_length = False, queries.log_lengths[seq]
    for index in range(group):
        terms = queries.coefficients[kv_head * group + index]
        theta[index] = terms[0] + (terms[1] + terms[2] * log_length) * log_length + queries.offsets[seq]
        needs_anchors |= terms[3] != 0
    if not needs_anchors:
        return
    # sequences that are not dense are longer than all anchors
    width = _vectors_of(pages.block_size) * LANES
    begin = seq_len - NUM_LAST_ANCHORS
    origin = begin // width * width
    earliest = np.empty((group, NUM_FIRST_ANCHORS + width), np.float32)
    latest = np.empty((group, NUM_LAST_ANCHORS + 2 * width), np.float32)
    _score(queries.query, queries.soft_cap, pages, seq, kv_head, 0, NUM_FIRST_ANCHORS, 0, earliest)
    _score(queries.query, queries.soft_cap, pages, seq, kv_head, begin, seq_len, origin, latest)
    for index in range(group):
        first, last = earliest[index, :NUM_FIRST_ANCHORS], latest[index, begin - origin : seq_len - origin]
        best = max(_highest(first), _highest(last))
        total = _exponentiate(first, first, best) + _exponentiate(last, last, best)
        head = kv_head * group + index
        lse, sink = best + math.log(total), queries.sinks[head]
        lse = max(lse, sink) + math.log1p(math.exp(-abs(lse - sink)))
        theta[index] += queries.coefficients[head, 3] * lse


@njit(fastmath=_FAST)
def _read_chunk(queries, pages, has_mean, seq, kv_head, chunk, theta, chunks, task):
    """The chunk's keys, and the values of those that some head of the group keeps, to place `task` of `chunks`."""
    group, seq_len, block_size = len(theta), pages.seq_lens[seq], pages.block_size
    origin, head_size = chunk * CHUNK, queries.query.shape[2]
    begin, end = max(origin, seq_len - pages.window), min(origin + CHUNK, seq_len)
    if begin >= end:
        chunks.best[task], chunks.sums[task], chunks.values[task] = _LOWEST, np.float32(0.0), np.float32(0.0)
        chunks.num_read[task] = 0
        return
    scores, is_read = np.empty((group, CHUNK), np.float32), np.zeros(CHUNK, np.uint8)
    _score(queries.query, queries.soft_cap, pages, seq, kv_head, begin, end, origin, scores)
    weights = np.empty((group, CHUNK), np.float32)
    for index in range(group):
        row, of_row, limit = scores[index, begin - origin : end - origin], weights[index], theta[index]
        best = _highest(row)
        _mark(row, limit, is_read[begin - origin :])
        total = _exponentiate(row, of_row[begin - origin :], best)
        chunks.best[task, index], chunks.sums[task, index, 0] = best, total
        chunks.sums[task, index, 1] = _keep(row, of_row[begin - origin :], limit)
    if has_mean:  # the open page is read for the mean
        for at in range(max(begin, seq_len // block_size * block_size) - origin, end - origin):
            is_read[at] = 1
    places, rows, count = np.empty(CHUNK, np.int64), np.empty(CHUNK, np.int64), 0
    for page in range(begin // block_size, -(-end // block_size)):
        first = page * block_size
        # values stand behind the page's keys
        row_start = pages.blocks[seq, page] * pages.page_stride + kv_head * pages.head_stride
        row_start += (block_size - first) * head_size
        for position in range(max(begin, first), min(end, first + block_size)):
            if is_read[position - origin]:
                places[count], rows[count] = position - origin, row_start + position * head_size
                count += 1
    chunks.num_read[task] = count
    if count:
        _add_values(weights, places, rows, count, pages, head_size, chunks.values.ravel(), task * group * head_size)
    else:
        chunks.values[task] = np.float32(0.0)


@njit(fastmath=_FAST)
def _find_mean(pages, value_sums, seq, kv_head, mean):
    """The mean of a sequence's values, to `mean`, [head_size] float32, which holds zeros."""
    seq_len, block_size, head_size = pages.seq_lens[seq], pages.block_size, len(mean)
    num_full = seq_len // block_size
    num_open = seq_len - num_full * block_size
    if num_open:
        start = pages.blocks[seq, num_full] * pages.page_stride + kv_head * pages.head_stride + block_size * head_size
        rows, places = start + np.arange(num_open) * head_size, np.zeros(num_open, np.int64)
        _add_values(np.ones((1, 1), np.float32), places, rows, num_open, pages, head_size, mean, 0)
    if num_full:
        start = pages.blocks[seq, num_full - 1] * value_sums.page_stride + kv_head * value_sums.head_stride
        for channel in range(head_size):
            mean[channel] += value_sums.memory[start + channel]
    for channel in range(head_size):
        mean[channel] /= np.float32(seq_len)


@njit(fastmath=_FAST)
def _join(queries, seq, head, index, first, end, chunks, mean, output):
    """A head's chunks, from `first` to `end`, to `output`, [head_size] float32; the lost mass."""
    sink, of_keys, kept = queries.sinks[head], np.float32(0.0), np.float32(0.0)
    best = max(chunks.best[first:end, index].max(), sink)
    output[:] = np.float32(0.0)
    for task in range(first, end):
        factor = _exp(chunks.best[task, index] - best)
        of_keys += factor * chunks.sums[task, index, 0]
        kept += factor * chunks.sums[task, index, 1]
        values = chunks.values[task, index]
        for channel in range(len(output)):
            output[channel] += factor * values[channel]
    of_sink = _exp(sink - best)
    lost = np.float32(0.0) if queries.is_dense[seq] else max((of_keys - kept) / (of_keys + of_sink), np.float32(0.0))
    divisor = of_sink + (of_keys if queries.keeps_denominator else max(kept, _LEAST))
    # without a denominator of all keys nothing is known to be lost, unless no key survived at all
    known = lost if queries.keeps_denominator else np.float32(kept + of_sink == 0)
    for channel in range(len(output)):
        output[channel] = output[channel] / divisor + known * mean[channel]
    return lost


@njit
def _count(is_counted, keys_seen, rows_read, lost_mass, value_rows_read, keys_read, masses, histogram):
    """Adds what a step read and lost to a layer's counters, as of `Counters`."""
    num_seqs, num_heads = lost_mass.shape
    for seq in range(num_seqs):
        value_rows_read += rows_read[seq]
        keys_read += keys_seen[seq]
        if is_counted[seq]:
            for head in range(num_heads):
                mass, bucket = lost_mass[seq, head], 0
                while bucket < len(_INNER_EDGES) and not mass <= _INNER_EDGES[bucket]:
                    bucket += 1
                masses[head] += mass
                histogram[head, bucket] += 1


@_compiled
def decode(
    query,  # address of [num_seqs, num_heads, head_size] elements
    query_kind,  # which of `ELEMENTS`
    output,  # the same, written
    output_kind,
    memory,  # as of `Pages`
    value_sums,  # as of `Sums`
    layout,  # [8] int64, see below
    factors,  # [2] float32, that on q . k, and the soft cap or 0
    coefficients,  # as of `Queries`
    sinks,
    blocks,  # as of `Pages`
    seq_lens,
    log_lengths,  # as of `Queries`
    offsets,
    is_dense,
    is_counted,  # [num_seqs] int64, as of `Batch`
    step_totals,  # [5] int64, as of `Batch`
    rows_read,  # [num_seqs, num_kv_heads] int64, value rows, written
    lost_mass,  # [num_seqs, num_heads] float32, written
    totals,  # as of `Counters`, added to; empty if nothing is counted
    value_rows_read,
    keys_read,  # empty if they are not counted
    masses,
    histogram,
):
    """One new token per sequence.

    Arguments are arrays and numbers, not records of them, which would take longer to hand over than many steps do.
    """
    page_stride, head_stride, block_size, window, sums_page, sums_head, keeps_denominator, head_size = layout
    num_seqs, num_heads = lost_mass.shape
    num_kv_heads = rows_read.shape[1]
    group = num_heads // num_kv_heads
    num_chunks = -(-seq_lens.max() // CHUNK)
    num_tasks = num_seqs * num_kv_heads * num_chunks
    has_mean = len(value_sums) > 0
    theta = np.empty((num_seqs * num_kv_heads, group), np.float32)
    chunks = _Chunks(
        np.empty((num_tasks, group), np.float32),
        np.empty((num_tasks, group, 2), np.float32),
        np.empty((num_tasks, group, head_size), np.float32),
        np.empty(num_tasks, np.int64),
    )
    wide = np.empty((num_seqs, num_heads, head_size), np.float32)
    _widen(query, query_kind, factors[0], wide.ravel())
    queries = Queries(wide, factors[1], coefficients, log_lengths, offsets, is_dense, keeps_denominator != 0, sinks)
    pages = Pages(memory, page_stride, head_stride, block_size, blocks, seq_lens, window)
    sums = Sums(value_sums, sums_page, sums_head)
    for of_group in prange(num_seqs * num_kv_heads):
        _find_thresholds(queries, pages, of_group // num_kv_heads, of_group % num_kv_heads, theta[of_group])
    for task in prange(num_tasks):
        of_group = task // num_chunks
        seq, kv_head = of_group // num_kv_heads, of_group % num_kv_heads
        _read_chunk(queries, pages, has_mean, seq, kv_head, task % num_chunks, theta[of_group], chunks, task)
    for of_group in prange(num_seqs * num_kv_heads):
        seq, kv_head = of_group // num_kv_heads, of_group % num_kv_heads
        first, end = of_group * num_chunks, (of_group + 1) * num_chunks
        rows_read[seq, kv_head] = chunks.num_read[first:end].sum()
        mean, found = np.zeros(head_size, np.float32), np.empty(head_size, np.float32)
        if has_mean and not is_dense[seq]:
            _find_mean(pages, sums, seq, kv_head, mean)
        for index in range(group):
            head = kv_head * group + index
            lost_mass[seq, head] = _join(queries, seq, head, index, first, end, chunks, mean, found)
            _narrow(found, output, output_kind, (seq * num_heads + head) * head_size)
    if len(totals):
        totals += step_totals
        keys_seen = np.minimum(seq_lens, window)
        _count(is_counted, keys_seen, rows_read, lost_mass, value_rows_read, keys_read, masses, histogram)
