"""Mode `values` and dense layers on CPUs by compiled code (`numba_decode`), with Numba, which comes with vLLM.

`values` says what is computed, and computes it in torch operations where Numba is missing or a cache is not known here.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numba
import numpy as np
import torch

from vllm_toptheta.kernels.contract import DecodeStep, Layer, LayerCache, LayerCall
from vllm_toptheta.kernels.cpu.batch import Batch
from vllm_toptheta.kernels.cpu.numba_decode import LANES, Pages, Queries, Sums
from vllm_toptheta.kernels.cpu.numba_decode import decode as decode_pages
from vllm_toptheta.kernels.cpu.scratch import CpuScratch

__all__ = ["decode", "reads", "warm_up"]

# what is cached, and what its bits are read as
READ_AS = {torch.float32: torch.float32, torch.bfloat16: torch.uint16, torch.float16: torch.int16}
NO_WINDOW = 1 << 40
NO_SUMS = Sums(np.empty(0, np.float32), 0, 0)


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


class BoundLayer:
    """A layer and its cache as arrays, the same in all steps.

    Attributes:
        cache, layer: Of the calls that it serves.
    """

    def __init__(self, cache: LayerCache, layer: Layer, num_heads: int) -> None:
        self.cache, self.layer = cache, layer
        kv_cache, value_sum, thresholds = cache.kv_cache, cache.value_sum, layer.thresholds
        self._pages = Pages(
            memory=_memory(kv_cache).view(READ_AS[kv_cache.dtype]).numpy(),
            page_stride=kv_cache.stride(0),
            head_stride=kv_cache.stride(1),
            block_size=kv_cache.shape[2],
            blocks=None,
            seq_lens=None,
            window=NO_WINDOW if layer.sliding_window is None else layer.sliding_window,
        )
        self._sums = NO_SUMS
        if value_sum is not None:
            self._sums = Sums(_memory(value_sum).numpy(), value_sum.stride(0), value_sum.stride(1))
        self._scale = np.float32(layer.softmax_scale)
        self._soft_cap = np.float32(layer.logits_soft_cap or 0.0)
        self._no_sinks = np.full(num_heads, -np.inf, np.float32)
        # the same memory: the guard moves thresholds
        coefficients = torch.zeros(num_heads, 4) if thresholds is None else thresholds.coefficients
        self._coefficients = coefficients.numpy()

    def decode(self, batch: Batch, call: LayerCall) -> tuple[torch.Tensor, torch.Tensor]:
        """See `decode`."""
        layer, (num_seqs, num_heads, _) = self.layer, call.query.shape
        step = _arrays_of(batch)
        rows_read = torch.empty(num_seqs, self.cache.kv_cache.shape[1], dtype=torch.int64)
        lost_mass = torch.empty(num_seqs, num_heads)
        output = call.output if call.output.is_contiguous() else torch.empty_like(call.output)
        is_relative = layer.thresholds is not None and layer.thresholds.is_relative
        decode_pages(
            Queries(
                query=call.query.contiguous().view(READ_AS[call.query.dtype]).numpy(),
                scale=self._scale,
                soft_cap=self._soft_cap,
                coefficients=self._coefficients,
                log_lengths=step.own_log_lengths if is_relative else step.log_lengths,
                offsets=step.offsets,
                is_dense=step.is_all_dense if layer.thresholds is None else step.is_dense,
                keeps_denominator=layer.denominator_compensation,
                sinks=self._no_sinks if layer.sinks is None else layer.sinks.float().numpy(),
            ),
            self._pages._replace(blocks=step.blocks, seq_lens=step.seq_lens),
            self._sums,
            output.numpy(),
            rows_read.numpy(),
            lost_mass.numpy(),
        )
        if output is not call.output:
            call.output.copy_(output)
        return rows_read, lost_mass


def decode(batch: Batch, call: LayerCall, scratch: CpuScratch) -> tuple[torch.Tensor, torch.Tensor]:
    """Write `call.output`.

    Args:
        batch: The sequences.
        call: A layer's, with a cache that `reads` knows; without thresholds it keeps every key.
        scratch: Of the layer; it keeps what is the same in all of its steps.

    Returns:
        Value rows read, [num_seqs, num_kv_heads] int64, and lost mass, [num_seqs, num_heads] float32.
    """
    bound: BoundLayer | None = scratch.bound
    if bound is None or bound.cache is not call.cache or bound.layer is not call.layer:
        bound = scratch.bound = BoundLayer(call.cache, call.layer, call.query.shape[1])
    return bound.decode(batch, call)


def _use_threads_of_torch() -> None:
    """As many as torch has; where Numba starts its own, by OpenMP, it would set torch's number too."""
    num_threads = torch.get_num_threads()
    numba.set_num_threads(min(num_threads, numba.config.NUMBA_NUM_THREADS))
    if torch.get_num_threads() != num_threads:
        torch.set_num_threads(num_threads)


def warm_up(dtype: torch.dtype, query_dtype: torch.dtype) -> None:
    """Compile what reads caches of `dtype` for such queries, which takes some seconds unless it lies on disk."""
    step = DecodeStep(torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32))
    cache = LayerCache(torch.zeros(1, 1, 16, 32, dtype=dtype))
    query = torch.zeros(1, 1, 16, dtype=query_dtype)
    call = LayerCall(query, torch.empty(1, 1, 16), cache, Layer(1.0))
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
    )


def _memory(tensor: torch.Tensor) -> torch.Tensor:
    """All memory from a tensor's first element to its last, on one axis."""
    length = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((length,), (1,))
