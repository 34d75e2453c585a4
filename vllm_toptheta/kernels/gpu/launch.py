"""What the kernels of a decode step are launched with, where several take the same."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from vllm_toptheta.kernels.contract import DecodeStep, LayerCall
from vllm_toptheta.kernels.gpu.merge import merge_kernel
from vllm_toptheta.kernels.gpu.scratch import Scratch, ShadowScratch
from vllm_toptheta.kernels.gpu.survivors import CHUNK_TILES, LIST_DEPTH
from vllm_toptheta.kernels.gpu.tuning import LaunchConfig

MIN_BLOCK_SIZE = 16
TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# of the merge between two kernels that leave pieces
NO_CHOICE = {"few_tokens": 0, "num_exact_programs": 0, "short_length": 0, "EXACT_MIN_WORK": 0, "EXACT_DENSE_WORK": 0}


def schedule_unit(tile: int, block_size: int) -> int:
    """Tokens of a unit of work: a page where pages fill a tile, because then block numbers are loaded page by page."""
    return block_size if tile % block_size == 0 else MIN_BLOCK_SIZE


def step_arguments(step: DecodeStep, call: LayerCall, scratch: Scratch | ShadowScratch, *, unit: int) -> dict[str, Any]:
    """What every kernel of a step that leaves or joins pieces takes."""
    num_seqs, num_heads, head_size = call.query.shape
    kv_cache = call.cache.kv_cache
    return {
        "block_table_ptr": step.block_table,
        "seq_lens_ptr": step.seq_lens,
        "rules_ptr": step.rules,
        "partial_output_ptr": scratch.partial_output,
        "partial_stats_ptr": scratch.partial_stats,
        "kv_cache_ptr": kv_cache,
        "stride_kv_block": kv_cache.stride(0),
        "stride_kv_head": kv_cache.stride(1),
        "stride_kv_token": kv_cache.stride(2),
        "stride_table_seq": step.block_table.stride(0),
        "num_seqs": num_seqs,
        "min_sparse_context": step.max_dense_len,
        "BLOCK_SIZE": kv_cache.shape[2],
        "HEAD_SIZE": head_size,
        "GROUP": num_heads // kv_cache.shape[1],
        "D_PAD": triton.next_power_of_2(head_size),
        "UNIT": unit,
        "SEQ_BLOCK": sequence_block(num_seqs),
        "VALUE_MEAN": call.cache.value_sum is not None,
        "COUNT": call.layer.counters is not None,
    }


def schedule_arguments(config: LaunchConfig, unit: int) -> dict[str, Any]:
    """How a step of which all keys are read is shared out."""
    return {"MIN_WORK": max(1, config.min_work * config.tile // unit), "DENSE_WORK": 2}


def split_arguments(
    step: DecodeStep, call: LayerCall, scratch: Scratch | ShadowScratch, config: LaunchConfig
) -> dict[str, Any]:
    """What `split_step` takes beside `step_arguments` and `schedule_arguments`."""
    layer, query = call.layer, call.query
    if layer.thresholds is None:
        raise ValueError("thresholds: None")
    coefficients = layer.thresholds.coefficients
    group = scratch.survivors.shape[-1] - 1
    return {
        "query_ptr": query,
        "coefficients_ptr": coefficients,
        "q_scale_ptr": call.q_scale,
        "k_scale_ptr": call.cache.k_scale,
        "list_ptr": scratch.survivors,
        "order_ptr": scratch.order,
        "rows_read_ptr": None if layer.counters is None else layer.counters.value_rows_read,
        "stride_query_seq": query.stride(0),
        "stride_query_head": query.stride(1),
        "min_length": step.length_range[0],
        "max_length": step.length_range[1],
        "softmax_scale": layer.softmax_scale,
        "soft_cap": layer.logits_soft_cap or 0.0,
        "NUM_COEFFICIENTS": coefficients.shape[-1],
        "G_PAD": max(config.min_group, triton.next_power_of_2(group + 1)),
        "TILE": config.tile,
        "DENSE_TILE": config.dense_tile,
        "CHUNK_TILES": CHUNK_TILES,
        "LIST_DEPTH": LIST_DEPTH,
        "SCAN_STAGES": config.scan_stages,
        "DENSE_STAGES": config.dense_stages,
        "GATHER_STAGES": config.gather_stages,
        "SOFT_CAP": layer.logits_soft_cap is not None,
        "COMPUTE": TRITON_DTYPES[call.output.dtype],
        "HAS_Q_SCALE": call.q_scale is not None,
        "HAS_K_SCALE": call.cache.k_scale is not None,
        "IN_PLACE": query.is_cuda,
    }


def launch_options(num_warps: int, max_registers: int | None = None, *, is_early: bool = False) -> dict[str, Any]:
    """Options of a launch; `is_early`: while the kernel before still runs."""
    registers = {"maxnreg": max_registers} if max_registers else {}
    return {"num_warps": num_warps, **registers, **({"launch_pdl": True} if is_early else {})}


def launch_merge(
    step: dict[str, Any],
    call: LayerCall,
    *,
    num_programs: int,
    num_warps: int,
    is_early: bool,
    choice: dict[str, Any] | None = None,
) -> None:
    """Join the pieces that a kernel with the arguments `step` has left, or another one, where there is a `choice`."""
    output, value_sum, v_scale, counters = call.output, call.cache.value_sum, call.cache.v_scale, call.layer.counters
    num_seqs, num_heads, _ = output.shape
    piece_block, merge_warps = _merge_shape(num_programs / num_seqs)
    merge_kernel[(num_heads, num_seqs)](
        output_ptr=output,
        value_sum_ptr=value_sum,
        v_scale_ptr=v_scale,
        lost_mass_ptr=None if counters is None else counters.lost_mass,
        histogram_ptr=None if counters is None else counters.lost_mass_histogram,
        totals_ptr=None if counters is None else counters.totals,
        stride_output_seq=output.stride(0),
        stride_output_head=output.stride(1),
        stride_sum_block=0 if value_sum is None else value_sum.stride(0),
        stride_sum_head=0 if value_sum is None else value_sum.stride(1),
        num_kv_heads=num_heads // step["GROUP"],
        num_programs=num_programs,
        BLOCK_PAD=triton.next_power_of_2(step["BLOCK_SIZE"]),
        PIECE_BLOCK=piece_block,
        NUM_BUCKETS=0 if counters is None else counters.lost_mass_histogram.shape[1],
        HAS_V_SCALE=v_scale is not None,
        EXACT_DENOMINATOR=call.layer.denominator_compensation,
        CHOOSES=choice is not None,
        EARLY_MERGE=is_early,
        **(choice or NO_CHOICE),
        **step,
        **launch_options(num_warps or merge_warps, is_early=is_early),
    )


def _merge_shape(programs_per_seq: float) -> tuple[int, int]:
    """Pieces that a program of the merge reads at a time, all of a sequence's where lengths are even, and its warps."""
    return next(((size, warps) for size, warps in ((4, 1), (16, 2)) if programs_per_seq + 2 <= size), (64, 4))


def sequence_block(num_seqs: int) -> int:
    """Sequences that the schedule has room for; few sizes, because each is compiled."""
    return next((size for size in (32, 128, 512) if num_seqs <= size), triton.next_power_of_2(num_seqs))
