"""Top-Theta attention of one new token per sequence that reads most keys as shadows, on the GPU: mode `shadow`.

It answers what `values.decode` does, but for two things: a key can be missed whose shadow scores more than the margin
below its own score, and the softmax denominator knows keys that were not read by their number instead of their scores.
"""

from __future__ import annotations

import functools

from vllm_toptheta.kernels.contract import DecodeStep, LayerCall, check
from vllm_toptheta.kernels.gpu.codes import TOKENS_PER_STEP
from vllm_toptheta.kernels.gpu.launches import shadow_launches
from vllm_toptheta.kernels.gpu.merge import launch_merge
from vllm_toptheta.kernels.gpu.records import (
    Counts,
    Lists,
    Pieces,
    Queries,
    Shadow,
    Shape,
    Tiling,
    Tokens,
    next_power_of_2,
)
from vllm_toptheta.kernels.gpu.scratch import ShadowScratch
from vllm_toptheta.kernels.gpu.shadow_query import query_kernel
from vllm_toptheta.kernels.gpu.shadow_split import shadow_split_kernel
from vllm_toptheta.kernels.gpu.threshold_kernel import launch_thresholds
from vllm_toptheta.kernels.gpu.tiles import MIN_COLUMNS
from vllm_toptheta.kernels.gpu.tuning import ShadowConfig, launch_options
from vllm_toptheta.kernels.gpu.values import check_kernels, tiling_of

MIN_ROW_BYTES = 32  # of a row of codes: the depth of a product of int8


def decode(step: DecodeStep, call: LayerCall, scratch: ShadowScratch) -> None:
    """One new token per sequence: score every shadow key, read the exact keys of candidates and survivors' value rows.

    A token is a candidate if its shadow reaches threshold minus margin for some head of the group, if it is an
    anchor, or if it lies in the page of the new token. Candidates whose exact score
    reaches a head's threshold are its survivors. The others enter its softmax denominator by their scores, and keys
    that are no candidates as r(n) * exp(threshold) each, where n is the length of the sequence.

    A step of few tokens, or of short sequences, as the scratch's `config` says, is faster if all keys are read: it is
    answered as by `values.decode`.

    Four launches whose grids depend on shapes only; nothing is allocated and the host waits for nothing, so the call
    can be captured in a CUDA graph. Any number of candidates is right, however unlikely. Bits of the output do not
    depend on what `scratch` held. The lost mass that is counted is an estimate as far as it lies in keys that were not
    read.

    Args:
        step: The step.
        call: Of a layer with thresholds and shadow keys.
        scratch: For at least as many sequences.

    Raises:
        ValueError: A shape, dtype or stride is not as the records describe it; the message starts with the field's
            name.
    """
    check_kernels(call)
    check(step, call)
    num_seqs, num_heads, _ = call.query.shape
    _, num_kv_heads, block_size, _ = call.cache.kv_cache.shape
    shadow, codes = call.layer.shadow, call.cache.codes
    if shadow is None or codes is None:
        raise ValueError("shadow: None, expected a layer with shadow keys")
    row_tokens = max(1, MIN_ROW_BYTES // shadow.codec.code_bytes)
    if codes.stride(0) % 16 or codes.data_ptr() % 16:
        raise ValueError(f"codes: strides {codes.stride()}, expected blocks at multiples of 16 bytes")
    if block_size % row_tokens:
        raise ValueError(f"codes: pages of {block_size} tokens, expected a multiple of {row_tokens}")
    if num_seqs == 0:
        return
    config, values_config = scratch.config, scratch.values_config
    launches, choice = shadow_launches(call, scratch)
    early = launches.is_early
    on_gpu = call.query.is_cuda
    tokens, queries, shape = Tokens.of(step, call.cache), Queries.of(call, scratch.thresholds), Shape.of(call)
    pieces = Pieces(scratch.partial_output, scratch.partial_stats)
    shadows = Shadow.of(shadow, codes, query_codes=scratch.query_codes, floors=scratch.floors)
    launch_thresholds(step, tokens, queries, shape, is_early=early)
    query_kernel[(num_kv_heads, choice.num_programs)](
        tokens,
        queries,
        shadows,
        Lists(scratch.survivors, scratch.order),
        pieces,
        Counts.of(call.layer.counters),
        num_seqs,
        step.max_dense_len,
        step.min_step_tokens,
        step.block_table.stride(0),
        choice.few_tokens,
        choice.short_length,
        shape,
        choice.schedule,
        tiling_of(values_config, shape.GROUP, on_gpu=on_gpu),
        TOKENS=min(TOKENS_PER_STEP, next_power_of_2(block_size)),
        EARLY_QUERY=early,
        EARLY_SPLIT=early,
        **launch_options(values_config.num_warps, values_config.max_registers, is_early=early),
    )
    shadow_split_kernel[(num_kv_heads, launches.num_programs)](
        tokens,
        queries,
        shadows,
        Lists(scratch.candidates, scratch.candidate_order),
        pieces,
        Counts.of(call.layer.counters),
        num_seqs,
        step.max_dense_len,
        step.min_step_tokens,
        *step.length_range,
        step.block_table.stride(0),
        choice.few_tokens,
        choice.short_length,
        shape,
        launches.schedule,
        scan_tiling(config, shape.GROUP, on_gpu=on_gpu),
        ROW_TOKENS=row_tokens,
        COLUMN_HEADS=max(next_power_of_2(shape.GROUP), MIN_COLUMNS // row_tokens),
        EARLY_SPLIT=early,
        EARLY_MERGE=early,
        **launch_options(config.num_warps, config.max_registers, is_early=early),
    )
    launch_merge(step, call, pieces, launches, choice)


@functools.cache
def scan_tiling(config: ShadowConfig, group: int, *, on_gpu: bool) -> Tiling:
    """The scan of shadow keys, and the walk of candidates, by `group` query heads."""
    return Tiling(
        TILE=config.tile,
        SCAN_STAGES=config.scan_stages,
        G_PAD=max(config.min_group, next_power_of_2(group)),
        CHUNK_TILES=config.chunk_tiles,
        LIST_DEPTH=config.list_depth,
        DENSE_TILE=config.dense_tile,
        DENSE_STAGES=config.dense_stages,
        GATHER_TILE=config.walk_tile,
        GATHER_STAGES=config.walk_stages,
        ON_GPU=on_gpu,
    )
