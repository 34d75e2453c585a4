"""Mode `values` and dense layers on CPUs, compiled by Numba, which comes with vLLM: keys are read once, in place.

scan     scores of all keys, by chunks of a sequence and kv head that threads share
judge    the threshold of every head, from the scores of its anchors
weigh    exponentials of all keys, and the values of those that some head of the group keeps
join     the chunks of a head, in their order, whoever computed them

`values` says what is computed, and computes it in torch operations where Numba is missing or a dtype is not known here.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from numba import njit, prange
from numba.extending import overload

from vllm_toptheta.kernels.contract import DecodeStep, Layer, LayerCache, LayerCall
from vllm_toptheta.kernels.cpu.batch import Batch
from vllm_toptheta.limits import NUM_FIRST_ANCHORS, NUM_LAST_ANCHORS

__all__ = ["READ_AS", "decode", "warm_up"]

CHUNK = 256  # keys
READ_AS = {torch.float32: torch.float32, torch.bfloat16: torch.uint16}  # what is cached, and what it is read as
NO_WINDOW = 1 << 40
_FAST = {"reassoc", "contract", "nsz", "arcp"}
_LOWEST, _LEAST = np.float32(-np.inf), np.float32(np.finfo(np.float32).tiny)


def _compiled(function: Any) -> Any:
    """Compiled at its first call, and kept on disk unless there is no place for it."""
    options = {"parallel": True, "fastmath": _FAST}
    try:
        return njit(function, cache=True, **options)
    except RuntimeError:  # neither beside this file nor in the user's folder
        return njit(function, **options)


def _widened(element):
    """A cached element as float32."""


@overload(_widened, inline="always")
def _widened_of(element):
    if element == numba.uint16:
        return lambda element: np.uint32(np.uint32(element) << np.uint32(16)).view(np.float32)
    return lambda element: element


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


@_compiled
def _decode(
    query,  # [num_seqs, num_heads, head_size] float32, scaled
    pages,  # [...] of the cache's memory, from its first element on
    page_stride,
    head_stride,
    num_kv_heads,
    block_size,
    blocks,  # [num_seqs, max_blocks] int64
    seq_lens,  # [num_seqs] int64
    window,  # keys that are seen
    soft_cap,  # 0 for none
    coefficients,  # [num_heads, 4] float32
    log_lengths,  # [num_seqs] float32
    offsets,  # [num_seqs] float32
    is_dense,  # [num_seqs] bool
    keeps_denominator,  # whether it is that of all keys
    value_sum,  # [...] float32, as `pages`; empty without value means
    sum_page_stride,
    sum_head_stride,
    output,  # [num_seqs, num_heads, head_size] float32, written
    rows_read,  # [num_seqs, num_kv_heads] int64, written
    lost_mass,  # [num_seqs, num_heads] float32, written
):
    num_seqs, num_heads, head_size = query.shape
    group = num_heads // num_kv_heads
    num_chunks = -(-seq_lens.max() // CHUNK)
    num_tasks = num_seqs * num_kv_heads * num_chunks
    has_mean = len(value_sum) > 0
    scores = np.empty((num_seqs, num_heads, num_chunks * CHUNK), np.float32)
    maxima = np.empty((num_seqs, num_heads, num_chunks), np.float32)
    for task in prange(num_tasks):
        seq, kv_head, chunk = task // (num_kv_heads * num_chunks), task // num_chunks % num_kv_heads, task % num_chunks
        end = min((chunk + 1) * CHUNK, seq_lens[seq])
        key = np.empty(head_size, np.float32)
        best = np.full(group, _LOWEST, np.float32)
        begin = max(chunk * CHUNK, seq_lens[seq] - window)
        # page by page, because divisions take as long as a key
        for page in range(begin // block_size, -(-end // block_size)):
            first = page * block_size
            start = blocks[seq, page] * page_stride + kv_head * head_stride
            for token in range(max(begin, first), min(end, first + block_size)):
                row = pages[start + (token - first) * head_size : start + (token - first + 1) * head_size]
                for channel in range(head_size):
                    key[channel] = _widened(row[channel])
                for index in range(group):
                    of_head = query[seq, kv_head * group + index]
                    score = np.float32(0.0)
                    for channel in range(head_size):
                        score += of_head[channel] * key[channel]
                    if soft_cap > 0:
                        score = soft_cap * np.float32(math.tanh(score / soft_cap))
                    scores[seq, kv_head * group + index, token] = score
                    best[index] = max(best[index], score)
        for index in range(group):
            maxima[seq, kv_head * group + index, chunk] = best[index]

    best_of = np.empty((num_seqs, num_heads), np.float32)
    theta = np.empty((num_seqs, num_heads), np.float32)
    for seq in range(num_seqs):
        seq_len, log_length = seq_lens[seq], log_lengths[seq]
        for head in range(num_heads):
            best_of[seq, head] = maxima[seq, head].max()
            if is_dense[seq]:
                theta[seq, head] = _LOWEST
                continue
            terms = coefficients[head]
            limit = terms[0] + (terms[1] + terms[2] * log_length) * log_length + offsets[seq]
            if terms[3] != 0:
                # sequences that are not dense are longer than all anchors
                anchors = np.float32(0.0)
                for index in range(NUM_FIRST_ANCHORS):
                    anchors += _exp(scores[seq, head, index] - best_of[seq, head])
                for index in range(seq_len - NUM_LAST_ANCHORS, seq_len):
                    anchors += _exp(scores[seq, head, index] - best_of[seq, head])
                limit += terms[3] * (best_of[seq, head] + math.log(anchors))
            theta[seq, head] = limit

    sums = np.zeros((num_tasks, group, 2), np.float32)  # of all keys, and of those that are kept
    weighted = np.empty((num_tasks, group, head_size), np.float32)
    num_read = np.zeros(num_tasks, np.int64)
    for task in prange(num_tasks):
        seq, kv_head, chunk = task // (num_kv_heads * num_chunks), task // num_chunks % num_kv_heads, task % num_chunks
        end = min((chunk + 1) * CHUNK, seq_lens[seq])
        begin = max(chunk * CHUNK, seq_lens[seq] - window)
        open_start = seq_lens[seq] // block_size * block_size if has_mean else seq_lens[seq]
        weights = np.empty((group, CHUNK), np.float32)
        is_read = np.zeros(CHUNK, np.uint8)
        for index in range(group):
            head = kv_head * group + index
            of_head, best, limit = (
                scores[seq, head, chunk * CHUNK : (chunk + 1) * CHUNK],
                best_of[seq, head],
                theta[seq, head],
            )
            of_weights, total = weights[index], np.float32(0.0)
            # loops of one kind of element each, which become vectors
            for place in range(begin - chunk * CHUNK, end - chunk * CHUNK):
                of_weights[place] = _exp(of_head[place] - best)
            for place in range(begin - chunk * CHUNK, end - chunk * CHUNK):
                total += of_weights[place]
                of_weights[place] = of_weights[place] if of_head[place] >= limit else np.float32(0.0)
            for place in range(begin - chunk * CHUNK, end - chunk * CHUNK):
                is_read[place] |= np.uint8(of_head[place] >= limit)
            sums[task, index, 0] = total
        for token in range(max(begin, open_start), end):
            is_read[token - chunk * CHUNK] = 1
        value, of_chunk = np.empty(head_size, np.float32), np.zeros((group, head_size), np.float32)
        for page in range(begin // block_size, -(-end // block_size)):
            first = page * block_size
            start = blocks[seq, page] * page_stride + kv_head * head_stride + block_size * head_size
            for token in range(max(begin, first), min(end, first + block_size)):
                place = token - chunk * CHUNK
                if is_read[place] == 0:
                    continue
                num_read[task] += 1
                row = pages[start + (token - first) * head_size : start + (token - first + 1) * head_size]
                for channel in range(head_size):
                    value[channel] = _widened(row[channel])
                for index in range(group):
                    weight = weights[index, place]
                    if weight != 0:
                        sums[task, index, 1] += weight
                        for channel in range(head_size):
                            of_chunk[index, channel] += weight * value[channel]
        weighted[task] = of_chunk

    for task in prange(num_seqs * num_kv_heads):
        seq, kv_head = task // num_kv_heads, task % num_kv_heads
        seq_len, first_task = seq_lens[seq], task * num_chunks
        rows_read[seq, kv_head] = num_read[first_task : first_task + num_chunks].sum()
        mean = np.zeros(head_size, np.float32)
        if has_mean and not is_dense[seq]:
            num_full = seq_len // block_size
            if num_full:
                start = blocks[seq, num_full - 1] * sum_page_stride + kv_head * sum_head_stride
                for channel in range(head_size):
                    mean[channel] = value_sum[start + channel]
            for token in range(num_full * block_size, seq_len):
                start = blocks[seq, token // block_size] * page_stride + kv_head * head_stride
                start += (block_size + token % block_size) * head_size
                for channel in range(head_size):
                    mean[channel] += _widened(pages[start + channel])
            for channel in range(head_size):
                mean[channel] /= np.float32(seq_len)
        for index in range(group):
            head = kv_head * group + index
            total, kept = np.float32(0.0), np.float32(0.0)
            for chunk in range(num_chunks):
                total += sums[first_task + chunk, index, 0]
                kept += sums[first_task + chunk, index, 1]
            lost = np.float32(0.0) if is_dense[seq] else max((total - kept) / total, np.float32(0.0))
            lost_mass[seq, head] = lost
            divisor = total if keeps_denominator else max(kept, _LEAST)
            # without a denominator of all keys nothing is known to be lost, unless no key survived at all
            known = lost if keeps_denominator else np.float32(kept == 0)
            for channel in range(head_size):
                found = np.float32(0.0)
                for chunk in range(num_chunks):
                    found += weighted[first_task + chunk, index, channel]
                output[seq, head, channel] = found / divisor + known * mean[channel]


class _Arrays(NamedTuple):
    """A batch as arrays, the same for all layers of a step."""

    blocks: Any
    seq_lens: Any
    log_lengths: Any  # as calibrated thresholds take them
    own_log_lengths: Any  # as relative ones do
    offsets: Any
    is_dense: Any
    is_all_dense: Any  # of a layer without thresholds


def decode(batch: Batch, call: LayerCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Write `call.output`.

    Args:
        batch: The sequences.
        call: A layer's, with a cache of one of `READ_AS`; without thresholds it keeps every key.

    Returns:
        Value rows read, [num_seqs, num_kv_heads] int64, and lost mass, [num_seqs, num_heads] float32.
    """
    layer, cache, value_sum = call.layer, call.cache.kv_cache, call.cache.value_sum
    num_seqs, num_heads, _ = call.query.shape
    num_kv_heads, block_size = cache.shape[1:3]
    arrays = _arrays_of(batch)
    rows_read, lost_mass = torch.empty(num_seqs, num_kv_heads, dtype=torch.int64), torch.empty(num_seqs, num_heads)
    output = call.output if call.output.is_contiguous() else torch.empty_like(call.output)
    thresholds = layer.thresholds
    if thresholds is None:
        coefficients, log_lengths, is_dense = torch.zeros(num_heads, 4), arrays.log_lengths, arrays.is_all_dense
    else:
        coefficients, is_dense = thresholds.coefficients, arrays.is_dense
        log_lengths = arrays.own_log_lengths if thresholds.is_relative else arrays.log_lengths
    _use_threads_of_torch()
    _decode(
        (call.query.float() * layer.softmax_scale).numpy(),
        _memory(cache).view(READ_AS[cache.dtype]).numpy(),
        cache.stride(0),
        cache.stride(1),
        num_kv_heads,
        block_size,
        arrays.blocks,
        arrays.seq_lens,
        NO_WINDOW if layer.sliding_window is None else layer.sliding_window,
        np.float32(layer.logits_soft_cap or 0.0),
        coefficients.numpy(),
        log_lengths,
        arrays.offsets,
        is_dense,
        layer.denominator_compensation,
        _NOTHING if value_sum is None else _memory(value_sum).numpy(),
        0 if value_sum is None else value_sum.stride(0),
        0 if value_sum is None else value_sum.stride(1),
        output.numpy(),
        rows_read.numpy(),
        lost_mass.numpy(),
    )
    if output is not call.output:
        call.output.copy_(output)
    return rows_read, lost_mass


def _use_threads_of_torch() -> None:
    """As many as torch has; where Numba starts its own, by OpenMP, it would set torch's number too."""
    num_threads = torch.get_num_threads()
    numba.set_num_threads(min(num_threads, numba.config.NUMBA_NUM_THREADS))
    if torch.get_num_threads() != num_threads:
        torch.set_num_threads(num_threads)


def warm_up(dtype: torch.dtype) -> None:
    """Compile what reads caches of `dtype`, which takes some seconds unless it lies on disk."""
    step = DecodeStep(torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32))
    cache = LayerCache(torch.zeros(1, 1, 16, 32, dtype=dtype))
    decode(Batch.of_step(step, 16), LayerCall(torch.zeros(1, 1, 16), torch.empty(1, 1, 16), cache, Layer(1.0)))


_NOTHING = np.empty(0, np.float32)


@functools.lru_cache(maxsize=1)
def _arrays_of(batch: Batch) -> _Arrays:
    """Of the step that is being decoded."""
    is_dense = batch.is_dense[:, 0].contiguous()
    return _Arrays(
        batch.blocks.numpy(),
        batch.seq_lens.numpy(),
        batch.log_lengths.numpy(),
        batch.seq_lens.float().log().numpy(),
        batch.offsets.contiguous().numpy(),
        is_dense.numpy(),
        torch.ones_like(is_dense).numpy(),
    )


def _memory(tensor: torch.Tensor) -> torch.Tensor:
    """All memory from a tensor's first element to its last, on one axis."""
    length = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((length,), (1,))
