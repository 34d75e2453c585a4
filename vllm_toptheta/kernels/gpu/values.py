"""Top-Theta attention of new tokens of sequences over the paged KV cache, on the GPU: mode `values`."""

from __future__ import annotations

import functools

import torch

from vllm_toptheta.kernels.contract import FLOAT8_DTYPES, DecodeStep, LayerCall, check
from vllm_toptheta.kernels.gpu.cuda.launching import SplitStep
from vllm_toptheta.kernels.gpu.cuda.value_split import launch_value_split
from vllm_toptheta.kernels.gpu.launches import values_launches
from vllm_toptheta.kernels.gpu.merge import launch_merge
from vllm_toptheta.kernels.gpu.records import (
    Counts,
    Lists,
    Pieces,
    Queries,
    Shape,
    Tiling,
    Tokens,
    next_power_of_2,
)
from vllm_toptheta.kernels.gpu.schedule import ANY_LENGTH
from vllm_toptheta.kernels.gpu.scratch import Scratch
from vllm_toptheta.kernels.gpu.split import split_kernel
from vllm_toptheta.kernels.gpu.survivors import CHUNK_TILES, LIST_DEPTH
from vllm_toptheta.kernels.gpu.threshold_kernel import launch_thresholds
from vllm_toptheta.kernels.gpu.tiles import ROW_ALIGNMENT
from vllm_toptheta.kernels.gpu.tuning import LaunchConfig, launch_options
from vllm_toptheta.limits import HEAD_SIZES, MAX_QUERIES_PER_KV


def decode(step: DecodeStep, call: LayerCall, scratch: Scratch) -> None:
    """New tokens of sequences: score every cached key, read only the value rows that some head of the group keeps.

    Three launches whose grids depend on shapes only; nothing is allocated and the host waits for nothing, so the call
    can be captured in a CUDA graph. Lengths are read on the device. Bits of the output do not depend on what `scratch`
    held.

    Args:
        step: The step.
        call: Of a layer with thresholds.
        scratch: For at least as many sequences.

    Raises:
        ValueError: A shape, dtype or stride is not as the records describe it; the message starts with the field's
            name.
    """
    check_kernels(call)
    check(step, call)
    if scratch.loader is not None:
        check_cuda(call)
    num_seqs = len(step.seq_lens)
    if num_seqs == 0:
        return
    # so that all new tokens of a sequence keep every key where the first of them does
    step = step._replace(max_dense_len=min(step.max_dense_len + step.max_query_len - 1, ANY_LENGTH.value))
    config, launches = scratch.config, values_launches(step, call, scratch)
    early = launches.is_early
    pieces = Pieces(scratch.partial_output, scratch.partial_stats)
    tokens, queries, shape = (
        Tokens.of(step, call.cache),
        Queries.of(call, scratch.thresholds),
        Shape.of(call, step.max_query_len),
    )
    counts = Counts.of(call.layer.counters)
    launch_thresholds(step, tokens, queries, shape, is_early=early)
    if scratch.loader is not None:
        given = SplitStep(step, tokens, queries, pieces, counts, shape, launches.schedule, launches.num_programs)
        launch_value_split(scratch.loader, given, launches.head_programs, is_early=early)
    else:
        split_kernel[(call.cache.kv_cache.shape[1], launches.num_programs)](
            tokens,
            queries,
            Lists(scratch.survivors, scratch.order),
            pieces,
            counts,
            num_seqs,
            step.max_dense_len,
            step.min_step_tokens,
            step.block_table.stride(0),
            shape,
            launches.schedule,
            tiling_of(config, shape.GROUP, on_gpu=call.query.is_cuda),
            EARLY_SPLIT=early,
            EARLY_MERGE=early,
            **launch_options(config.num_warps, config.max_registers, is_early=early),
        )
    launch_merge(step, call, pieces, launches)


@functools.cache
def tiling_of(config: LaunchConfig, group: int, *, on_gpu: bool) -> Tiling:
    """The loops over keys all of which are read, by `group` queries."""
    return Tiling(
        TILE=config.tile,
        SCAN_STAGES=config.scan_stages,
        G_PAD=max(config.min_group, next_power_of_2(group)),
        CHUNK_TILES=CHUNK_TILES,
        LIST_DEPTH=LIST_DEPTH,
        DENSE_TILE=config.dense_tile,
        DENSE_STAGES=config.dense_stages,
        GATHER_TILE=config.tile,
        GATHER_STAGES=config.gather_stages,
        ON_GPU=on_gpu,
    )


def check_cuda(call: LayerCall) -> None:
    """See that kernels in CUDA C++ read what is cached, and what is asked.

    Raises:
        ValueError: As for `contract.check`.
    """
    expected = call.output.dtype
    for name, tensor in (("kv_cache", call.cache.kv_cache), ("query", call.query)):
        if tensor.dtype != expected:
            raise ValueError(f"{name}: dtype is {tensor.dtype}, expected {expected} for kernels in CUDA C++")


def check_kernels(call: LayerCall) -> None:
    """See that there are kernels for a layer.

    Raises:
        ValueError: As for `contract.check`.
    """
    query, kv_cache, dtype = call.query, call.cache.kv_cache, call.output.dtype
    _, num_heads, head_size = query.shape
    num_kv_heads = kv_cache.shape[1]
    if call.layer.thresholds is None:
        raise ValueError("thresholds: None, and dense layers are not decoded here")
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"output: dtype is {dtype}, expected bfloat16 or float16")
    if query.dtype not in (dtype, *FLOAT8_DTYPES):
        raise ValueError(f"query: dtype is {query.dtype}, expected {dtype} or float8")
    if head_size not in HEAD_SIZES:
        raise ValueError(f"query: head_size is {head_size}, expected one of {', '.join(map(str, HEAD_SIZES))}")
    if num_heads // num_kv_heads > MAX_QUERIES_PER_KV:
        raise ValueError(
            f"query: {num_heads} heads over {num_kv_heads} kv heads, expected groups of 1 to {MAX_QUERIES_PER_KV}"
        )
    if kv_cache.dtype not in (dtype, *FLOAT8_DTYPES):
        raise ValueError(f"kv_cache: dtype is {kv_cache.dtype}, expected {dtype} or float8")
    if kv_cache.stride(0) % ROW_ALIGNMENT.value or kv_cache.stride(2) % ROW_ALIGNMENT.value:
        raise ValueError(
            f"kv_cache: strides of blocks and tokens are {kv_cache.stride(0)} and {kv_cache.stride(2)} elements, "
            f"expected multiples of {ROW_ALIGNMENT.value}"
        )
