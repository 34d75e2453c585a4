"""Mode `values` and dense layers on CPUs by compiled code (`numba_decode`), with Numba, which comes with vLLM.

`values` says what is computed, and computes it in torch operations where Numba is missing or a cache is not known here.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numba
import numpy as np
import torch

from vllm_toptheta.kernels.contract import Counters, DecodeStep, Layer, LayerCache, LayerCall
from vllm_toptheta.kernels.cpu.batch import Batch
from vllm_toptheta.kernels.cpu.numba_decode import LANES
from vllm_toptheta.kernels.cpu.numba_decode import decode as decode_pages
from vllm_toptheta.kernels.cpu.scratch import CpuScratch

__all__ = ["decode", "reads", "warm_up"]

# what its bits are read as, in the order of `numba_decode.ELEMENTS`
READ_AS = {torch.float32: torch.float32, torch.bfloat16: torch.uint16, torch.float16: torch.int16}
KINDS = {dtype: kind for kind, dtype in enumerate(READ_AS)}
NO_WINDOW = 1 << 40


def reads(dtype: torch.dtype, head_size: int, block_size: int) -> bool:
    """Whether there is code for such a cache."""
    return dtype in READ_AS and head_size % LANES == 0 and block_size % LANES == 0


class _Steps(NamedTuple):
    """A batch as arrays, the same for all layers of a step."""

    blocks: Any
    seq_lens: Any
    log_lengths: Any  # as calibrated thresholds take them
    own_log_lengths: Any  # as relative ones do
    offsets: Any
    is_dense: Any
    is_all_dense: Any  # of a layer without thresholds
    is_counted: Any
    totals: Any


class BoundLayer:
    """A layer and its cache as arrays, the same in all steps.

    Attributes:
        cache, layer: Of the calls that it serves.
        value_rows_read: [num_seqs, num_kv_heads] int64, of the last step.
        lost_mass: [num_seqs, num_heads] float32, of the last step.
    """

    def __init__(self, call: LayerCall) -> None:
        self.cache, self.layer = cache, layer = call.cache, call.layer
        kv_cache, thresholds = cache.kv_cache, layer.thresholds
        self._num_heads, self._num_kv_heads = call.query.shape[1], kv_cache.shape[1]
        self.value_rows_read = np.empty((0, self._num_kv_heads), np.int64)
        self.lost_mass = np.empty((0, self._num_heads), np.float32)
        value_sum = cache.value_sum
        layout = (
            *kv_cache.stride()[:2],
            kv_cache.shape[2],
            NO_WINDOW if layer.sliding_window is None else layer.sliding_window,
            *((0, 0) if value_sum is None else value_sum.stride()[:2]),
            int(layer.denominator_compensation),
            call.query.shape[2],
        )
        # the same memory: the guard moves thresholds
        coefficients = torch.zeros(self._num_heads, 4) if thresholds is None else thresholds.coefficients
        self._described = (
            _memory(kv_cache).view(READ_AS[kv_cache.dtype]).numpy(),
            np.empty(0, np.float32) if value_sum is None else _memory(value_sum).numpy(),
            np.array(layout, np.int64),
            np.array([layer.softmax_scale, layer.logits_soft_cap or 0.0], np.float32),
            coefficients.numpy(),
        )
        self._is_relative = thresholds is not None and thresholds.is_relative
        self._no_sinks = np.full(self._num_heads, -np.inf, np.float32)
        self._counters = _counters_of(layer.counters)

    def decode(self, batch: Batch, call: LayerCall) -> None:
        """See `decode`."""
        layer, step, query = self.layer, _arrays_of(batch), call.query.contiguous()
        if len(self.lost_mass) != len(query):
            self.value_rows_read = np.empty((len(query), self._num_kv_heads), np.int64)
            self.lost_mass = np.empty((len(query), self._num_heads), np.float32)
        output = call.output if call.output.is_contiguous() else torch.empty(call.output.shape, dtype=call.output.dtype)
        decode_pages(
            query.data_ptr(),
            KINDS[query.dtype],
            output.data_ptr(),
            KINDS[output.dtype],
            *self._described,
            self._no_sinks if layer.sinks is None else layer.sinks.float().numpy(),
            step.blocks,
            step.seq_lens,
            step.own_log_lengths if self._is_relative else step.log_lengths,
            step.offsets,
            step.is_all_dense if layer.thresholds is None else step.is_dense,
            step.is_counted,
            step.totals,
            self.value_rows_read,
            self.lost_mass,
            *self._counters,
        )
        if output is not call.output:
            call.output.copy_(output)


def decode(batch: Batch, call: LayerCall, scratch: CpuScratch) -> None:
    """Write `call.output`, and add to the layer's counters.

    Args:
        batch: The sequences.
        call: A layer's, with a cache that `reads` knows; without thresholds it keeps every key.
        scratch: Of the layer; it keeps what is the same in all of its steps.
    """
    bound: BoundLayer | None = scratch.bound
    if bound is None or bound.cache is not call.cache or bound.layer is not call.layer:
        bound = scratch.bound = BoundLayer(call)
    bound.decode(batch, call)


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
    call = LayerCall(torch.zeros(1, 1, 16), torch.empty(1, 1, 16), cache, Layer(1.0))
    decode(Batch.of_step(step, 16), call, CpuScratch())


@functools.lru_cache(maxsize=1)
def _arrays_of(batch: Batch) -> _Steps:
    """Of the step that is being decoded; its first layer sees to the threads too."""
    _use_threads_of_torch()
    is_dense = batch.is_dense[:, 0].contiguous()
    return _Steps(
        batch.blocks.numpy(),
        batch.seq_lens.numpy(),
        batch.log_lengths.numpy(),
        batch.seq_lens.float().log().numpy(),
        batch.offsets.contiguous().numpy(),
        is_dense.numpy(),
        torch.ones_like(is_dense).numpy(),
        batch.is_counted[:, 0].contiguous().numpy(),
        batch.totals.numpy(),
    )


def _memory(tensor: torch.Tensor) -> torch.Tensor:
    """All memory from a tensor's first element to its last, on one axis."""
    length = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((length,), (1,))


def _counters_of(counters: Counters | None) -> tuple[Any, ...]:
    """Counters as `decode_pages` takes them."""
    if counters is None:
        none = np.empty(0, np.int64)
        return none, none, none, np.empty(0, np.float64), np.empty((0, 0), np.int64)
    keys_read = torch.empty(0, dtype=torch.int64) if counters.keys_read is None else counters.keys_read
    added_to = (counters.totals, counters.value_rows_read, keys_read, counters.lost_mass, counters.lost_mass_histogram)
    return tuple(counter.numpy() for counter in added_to)
