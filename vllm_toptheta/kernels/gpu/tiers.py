"""Top-Theta attention of one new token per sequence by tiers, on the GPU: exact rows, copies, and the mean value."""

from __future__ import annotations

from vllm_toptheta.kernels.contract import DecodeStep, LayerCall, check
from vllm_toptheta.kernels.gpu.copies import TOKENS_PER_STEP
from vllm_toptheta.kernels.gpu.cuda.launching import SplitStep
from vllm_toptheta.kernels.gpu.cuda.tier_split import launch_tier_split
from vllm_toptheta.kernels.gpu.launches import shadow_launches
from vllm_toptheta.kernels.gpu.merge import launch_merge
from vllm_toptheta.kernels.gpu.records import (
    Copies,
    Counts,
    Lists,
    Pieces,
    Queries,
    Shape,
    Tokens,
    next_power_of_2,
)
from vllm_toptheta.kernels.gpu.scratch import TierScratch
from vllm_toptheta.kernels.gpu.shadow import scan_tiling
from vllm_toptheta.kernels.gpu.threshold_kernel import launch_thresholds
from vllm_toptheta.kernels.gpu.tier_query import tier_query_kernel
from vllm_toptheta.kernels.gpu.tier_split import tier_split_kernel
from vllm_toptheta.kernels.gpu.tiles import MIN_COLUMNS
from vllm_toptheta.kernels.gpu.tuning import launch_options
from vllm_toptheta.kernels.gpu.values import check_cuda, check_kernels, tiling_of
from vllm_toptheta.limits import gpus_lack


def decode(step: DecodeStep, call: LayerCall, scratch: TierScratch) -> None:
    """One new token per sequence: score the copies of all keys, read heavy rows exactly and light values as copies.

    `reference.tiers` has the formulas. A step of few tokens, or of short sequences, as the scratch's `config` says, is
    faster if all keys are read: it is answered as by `values.decode`.

    Four launches, five by the kernels in CUDA C++, whose grids depend on shapes only; nothing is allocated and the host
    waits for nothing, so the call can be captured in a CUDA graph. Any number of heavy and light keys is right, however
    unlikely. Bits of the output do not depend on what `scratch` held.

    Args:
        step: The step.
        call: Of a layer with relative thresholds and tiers.
        scratch: For at least as many sequences.

    Raises:
        ValueError: A shape, dtype or stride is not as the records describe it; the message starts with the field's
            name.
    """
    check_kernels(call)
    check(step, call)
    num_seqs, _, head_size = call.query.shape
    _, num_kv_heads, block_size, _ = call.cache.kv_cache.shape
    tiers, codes = call.layer.tiers, call.cache.codes
    if tiers is None or codes is None:
        raise ValueError("tiers: None, expected a layer with copies")
    if lacking := gpus_lack(head_size, call.query.shape[1], num_kv_heads, has_copies=True):
        raise ValueError(f"query: {lacking}")
    if scratch.loader is not None:
        check_cuda(call)
    if codes.stride(0) % 16 or codes.stride(1) % 16 or codes.data_ptr() % 16:
        raise ValueError(f"codes: strides {codes.stride()}, expected blocks and heads at multiples of 16 bytes")
    if num_seqs == 0:
        return
    config, values_config = scratch.config, scratch.values_config
    launches, choice = shadow_launches(call, scratch)
    early = launches.is_early
    on_gpu = call.query.is_cuda
    queries = Queries.of(call, scratch.thresholds, scratch.anchor_lse)
    tokens, shape, counts = Tokens.of(step, call.cache), Shape.of(call), Counts.of(call.layer.counters)
    pieces = Pieces(scratch.partial_output, scratch.partial_stats)
    copies = Copies.of(tiers, codes, query_codes=scratch.query_codes, query_terms=scratch.query_terms)
    launch_thresholds(step, tokens, queries, shape, is_early=early)
    tier_query_kernel[(num_kv_heads, choice.num_programs)](
        tokens,
        queries,
        copies,
        Lists(scratch.survivors, scratch.order),
        pieces,
        counts,
        num_seqs,
        step.max_dense_len,
        step.min_step_tokens,
        step.block_table.stride(0),
        choice.few_tokens,
        choice.short_length,
        shape,
        choice.schedule,
        tiling_of(values_config, shape.GROUP, on_gpu=on_gpu),
        TOKENS=min(TOKENS_PER_STEP, next_power_of_2(block_size)) if scratch.loader is None else 0,
        EARLY_QUERY=early,
        EARLY_SPLIT=early,
        **launch_options(values_config.num_warps, values_config.max_registers, is_early=early),
    )
    if scratch.loader is not None:
        launch_tier_split(
            scratch.loader,
            SplitStep(step, tokens, queries, pieces, counts, shape, launches.schedule, launches.num_programs),
            copies,
            scratch.saved,
            few_tokens=choice.few_tokens,
            short_length=choice.short_length,
            log_heavy=tiers.log_heavy,
            is_early=early,
        )
    else:
        tier_split_kernel[(num_kv_heads, launches.num_programs)](
            tokens,
            queries,
            copies,
            Lists(scratch.heavy, scratch.heavy_order),
            Lists(scratch.light, scratch.light_order),
            pieces,
            counts,
            num_seqs,
            step.max_dense_len,
            step.min_step_tokens,
            step.block_table.stride(0),
            choice.few_tokens,
            choice.short_length,
            tiers.log_heavy,
            shape,
            launches.schedule,
            scan_tiling(config, shape.GROUP, on_gpu=on_gpu),
            COLUMNS=max(MIN_COLUMNS, next_power_of_2(shape.GROUP)),
            EARLY_SPLIT=early,
            EARLY_MERGE=early,
            **launch_options(config.num_warps, config.max_registers, is_early=early),
        )
    launch_merge(step, call, pieces, launches, choice)
