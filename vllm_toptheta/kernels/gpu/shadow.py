"""Top-Theta attention of one new token per sequence that reads most keys as shadows, on the GPU: mode `shadow`.

It answers what `values.decode` does, but for two things: a key can be missed whose shadow scores more than the margin
below its own score, and the softmax denominator knows keys that were not read by their number instead of their scores.
"""

from __future__ import annotations

from typing import Any

import triton

from vllm_toptheta.kernels.contract import DecodeStep, LayerCall, check
from vllm_toptheta.kernels.gpu.codes import TOKENS_PER_STEP
from vllm_toptheta.kernels.gpu.launch import (
    launch_merge,
    launch_options,
    schedule_arguments,
    schedule_unit,
    split_arguments,
    step_arguments,
)
from vllm_toptheta.kernels.gpu.scratch import ShadowScratch
from vllm_toptheta.kernels.gpu.shadow_query import query_kernel
from vllm_toptheta.kernels.gpu.shadow_split import shadow_split_kernel
from vllm_toptheta.kernels.gpu.tuning import has_dependent_launch, num_multiprocessors
from vllm_toptheta.kernels.gpu.values import check_kernels

MIN_ROW_BYTES = 32  # of a row of codes: the depth of a product of int8
MIN_COLUMNS = 8  # of a product on tensor cores


def decode(step: DecodeStep, call: LayerCall, scratch: ShadowScratch) -> None:
    """One new token per sequence: score every shadow key, read the exact keys of candidates and survivors' value rows.

    A token is a candidate if its shadow reaches threshold minus margin for some head of the group, if it is one of the
    first `num_sink` or the last `num_recent`, or if it lies in the page of the new token. Candidates whose exact score
    reaches a head's threshold are its survivors. The others enter its softmax denominator by their scores, and keys
    that are no candidates as r(n) * exp(threshold) each, where n is the length of the sequence.

    A step of few tokens, or of short sequences, as the scratch's `config` says, is faster if all keys are read: it is
    answered as by `values.decode`.

    Three launches whose grids depend on shapes only; nothing is allocated and the host waits for nothing, so the call
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
    check(step, call)
    check_kernels(call)
    num_seqs, num_heads, _ = call.query.shape
    _, num_kv_heads, block_size, _ = call.cache.kv_cache.shape
    shadow, codes, counters = call.layer.shadow, call.cache.codes, call.layer.counters
    if shadow is None or codes is None:
        raise ValueError("shadow: None, expected a layer with shadow keys")
    code_bytes = shadow.codec.code_bytes
    row_tokens = max(1, MIN_ROW_BYTES // code_bytes)
    if codes.stride(0) % 16 or codes.data_ptr() % 16:
        raise ValueError(f"codes: strides {codes.stride()}, expected blocks at multiples of 16 bytes")
    if block_size % row_tokens:
        raise ValueError(f"codes: pages of {block_size} tokens, expected a multiple of {row_tokens}")
    if num_seqs == 0:
        return
    group = num_heads // num_kv_heads
    config, values_config = scratch.config, scratch.values_config
    num_sms = num_multiprocessors(call.query.device)
    num_programs = config.num_programs(num_kv_heads, num_sms)
    num_exact_programs = values_config.num_programs(num_kv_heads, num_sms)
    num_pieces = (max(num_programs, num_exact_programs) + num_seqs) * num_kv_heads
    if len(scratch.partial_stats) < num_pieces or len(scratch.floors) < num_seqs:
        raise ValueError(f"scratch: made for fewer than {num_seqs} sequences")
    early = config.early_launch and has_dependent_launch(call.query.device)
    # pages, if the tiles of either kernel consist of them
    unit = max(schedule_unit(tile, block_size) for tile in (config.tile, values_config.tile))
    common = step_arguments(step, call, scratch, unit=unit)
    exact = split_arguments(step, call, scratch, values_config)
    exact_schedule = schedule_arguments(values_config, unit)
    shadows: dict[str, Any] = {
        "query_codes_ptr": scratch.query_codes,
        "floors_ptr": scratch.floors,
        "codes_ptr": codes,
        "keys_read_ptr": None if counters is None else counters.keys_read,
        "stride_code_block": codes.stride(0),
        "stride_code_head": codes.stride(1),
        "few_tokens": config.few_tokens * num_programs,
        "short_length": config.short_length,
        "CODE_BYTES": code_bytes,
        "EARLY_SPLIT": early,
    }
    query_kernel[(num_kv_heads, num_exact_programs)](
        margin_ptr=shadow.margin,
        decoder_ptr=shadow.codec.decoder,
        key_mean_ptr=shadow.codec.key_mean,
        encoder_ptr=shadow.codec.encoder,
        code_offset_ptr=shadow.codec.code_offset,
        TOKENS=min(TOKENS_PER_STEP, triton.next_power_of_2(block_size)),
        **exact,
        **exact_schedule,
        **shadows,
        **common,
        **launch_options(values_config.num_warps, values_config.max_registers),
    )
    schedule = {"MIN_WORK": max(1, config.min_work * config.tile // unit), "DENSE_WORK": config.dense_work}
    scan: dict[str, Any] = {
        "list_ptr": scratch.candidates,
        "order_ptr": scratch.candidate_order,
        "G_PAD": max(config.min_group, triton.next_power_of_2(group)),
        "TILE": config.tile,
        "DENSE_TILE": config.dense_tile,
        "CHUNK_TILES": config.chunk_tiles,
        "LIST_DEPTH": config.list_depth,
        "SCAN_STAGES": config.scan_stages,
        "DENSE_STAGES": config.dense_stages,
    }
    both = {name: value for name, value in exact.items() if name not in (*scan, "GATHER_STAGES", "IN_PLACE")}
    shadow_split_kernel[(num_kv_heads, num_programs)](
        log_scale_ptr=shadow.log_unread_ratio,
        num_sink=shadow.num_sink,
        num_recent=shadow.num_recent,
        ROW_TOKENS=row_tokens,
        COLUMN_HEADS=max(triton.next_power_of_2(group), MIN_COLUMNS // row_tokens),
        WALK_TILE=config.walk_tile,
        WALK_STAGES=config.walk_stages,
        ON_GPU=call.query.is_cuda,
        EARLY_MERGE=early,
        **scan,
        **both,
        **schedule,
        **shadows,
        **common,
        **launch_options(config.num_warps, config.max_registers, is_early=early),
    )
    launch_merge(
        common | schedule,
        call,
        num_programs=num_programs,
        num_warps=config.merge_warps,
        is_early=early,
        choice={
            "few_tokens": shadows["few_tokens"],
            "num_exact_programs": num_exact_programs,
            "short_length": config.short_length,
            "EXACT_MIN_WORK": exact_schedule["MIN_WORK"],
            "EXACT_DENSE_WORK": exact_schedule["DENSE_WORK"],
        },
    )
