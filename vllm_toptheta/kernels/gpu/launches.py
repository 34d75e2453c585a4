"""Among how many programs a step is split, and how it is shared out among them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from vllm_toptheta.kernels.contract import DecodeStep, LayerCall
from vllm_toptheta.kernels.gpu.cuda.value_split import ValueLoader, ValueSizes
from vllm_toptheta.kernels.gpu.records import Schedule
from vllm_toptheta.kernels.gpu.schedule import schedule_of, unit_of
from vllm_toptheta.kernels.gpu.scratch import Scratch, ShadowScratch, TierScratch, most_programs
from vllm_toptheta.kernels.gpu.tuning import LaunchConfig, has_dependent_launch, num_multiprocessors

DENSE_WORK = 2  # of a unit of which keys and values are read, where otherwise it is keys and few values


class Launches(NamedTuple):
    """How a step's kernels are launched.

    Attributes:
        num_programs: Of each kv head.
        schedule: How the step is shared out among them.
        merge_warps: As of `LaunchConfig`.
        is_early: Whether a kernel starts while its predecessor runs.
        head_programs: As of `contract.Layer`, where the kernel minds them.
    """

    num_programs: int
    schedule: Schedule
    merge_warps: int
    is_early: bool
    head_programs: torch.Tensor | None = None


class Choice(NamedTuple):
    """When all keys of a step are read, in mode `shadow`, and what is different then.

    Attributes:
        few_tokens, short_length: See `schedule.reads_all_keys`.
        num_programs: Of each kv head.
        schedule: How the step is shared out among them.
    """

    few_tokens: int
    short_length: int
    num_programs: int
    schedule: Schedule


def values_launches(step: DecodeStep, call: LayerCall, scratch: Scratch) -> Launches:
    """Those of mode `values`.

    Raises:
        ValueError: The scratch is for fewer sequences, or fewer new tokens of each.
    """
    config, device = scratch.config, call.query.device
    num_seqs, block_size = len(step.seq_lens), call.cache.kv_cache.shape[2]
    num_programs = config.num_programs(call.cache.kv_cache.shape[1], num_multiprocessors(device))
    most = most_programs(num_programs, scratch.loader)
    _check_room(call, most, scratch, num_seqs=num_seqs, max_query_len=step.max_query_len)
    schedule = _values_schedule(config, unit_of(config.tile, block_size), num_seqs)
    is_early = config.early_launch and has_dependent_launch(device)
    head_programs = call.layer.head_programs if _has_usual_programs(step, call, scratch.loader) else None
    return Launches(num_programs, schedule, config.merge_warps, is_early, head_programs)


def _has_usual_programs(step: DecodeStep, call: LayerCall, loader: ValueLoader | None) -> bool:
    """Whether a kernel has as many programs as that of one new token, which the programs of heads are shares of."""
    if loader is None or step.max_query_len == 1:
        return loader is not None
    _, num_heads, head_size = call.query.shape
    usual = ValueSizes.of(head_size, num_heads // call.cache.kv_cache.shape[1])
    return loader.sizes.resident == usual.resident


def shadow_launches(call: LayerCall, scratch: ShadowScratch | TierScratch) -> tuple[Launches, Choice]:
    """Those of mode `shadow`, and when and how all keys are read instead.

    Raises:
        ValueError: The scratch is for fewer sequences.
    """
    config, values_config, device = scratch.config, scratch.values_config, call.query.device
    num_seqs, (num_kv_heads, block_size) = len(call.query), call.cache.kv_cache.shape[1:3]
    num_sms = num_multiprocessors(device)
    num_programs = config.num_programs(num_kv_heads, num_sms)
    num_values_programs = values_config.num_programs(num_kv_heads, num_sms)
    loader = scratch.loader if isinstance(scratch, TierScratch) else None
    head_programs = None if loader is None else call.layer.head_programs
    most = most_programs(num_programs, loader)
    _check_room(call, max(most, num_values_programs), scratch, num_seqs=num_seqs)
    # pages, if the tiles of either kernel consist of them
    unit = max(unit_of(tile, block_size) for tile in (config.tile, values_config.tile))
    schedule = schedule_of(
        unit,
        min_tokens=config.min_work * config.tile,
        dense_work=config.dense_work,
        num_seqs=num_seqs,
        piece_tokens=config.piece_tokens,
    )
    is_early = config.early_launch and has_dependent_launch(device)
    return (
        Launches(num_programs, schedule, config.merge_warps, is_early, head_programs),
        Choice(
            config.few_tokens * num_programs,
            config.short_length,
            num_values_programs,
            _values_schedule(values_config, unit, num_seqs),
        ),
    )


def _check_room(
    call: LayerCall,
    num_programs: int,
    scratch: Scratch | ShadowScratch | TierScratch,
    *,
    num_seqs: int,
    max_query_len: int = 1,
) -> None:
    num_tokens, num_heads, _ = call.query.shape
    num_kv_heads, pieces = call.cache.kv_cache.shape[1], scratch.partial_stats
    if pieces.shape[2] != num_heads // num_kv_heads * max_query_len:
        raise ValueError(f"scratch: made for another number of new tokens than {max_query_len} of each sequence")
    if len(scratch.thresholds) < num_tokens or len(pieces) < (num_programs + num_seqs) * num_kv_heads:
        raise ValueError(f"scratch: made for fewer than {num_seqs} sequences")


def _values_schedule(config: LaunchConfig, unit: int, num_seqs: int) -> Schedule:
    """How a step of which all keys are read is shared out, in units of `unit` tokens."""
    return schedule_of(
        unit,
        min_tokens=config.min_work * config.tile,
        dense_work=DENSE_WORK,
        num_seqs=num_seqs,
        piece_tokens=config.piece_tokens,
    )
