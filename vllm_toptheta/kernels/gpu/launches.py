"""Among how many programs a step is split, and how it is shared out among them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from vllm_toptheta.kernels.contract import LayerCall
from vllm_toptheta.kernels.gpu.records import Schedule
from vllm_toptheta.kernels.gpu.schedule import schedule_of, unit_of
from vllm_toptheta.kernels.gpu.scratch import Scratch, ShadowScratch, TierScratch
from vllm_toptheta.kernels.gpu.tuning import LaunchConfig, has_dependent_launch, num_multiprocessors

DENSE_WORK = 2  # of a unit of which keys and values are read, where otherwise it is keys and few values


class Launches(NamedTuple):
    """How a step's kernels are launched.

    Attributes:
        num_programs: Of each kv head.
        schedule: How the step is shared out among them.
        merge_warps: As of `LaunchConfig`.
        is_early: Whether a kernel starts while its predecessor runs.
    """

    num_programs: int
    schedule: Schedule
    merge_warps: int
    is_early: bool


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


def values_launches(call: LayerCall, scratch: Scratch) -> Launches:
    """Those of mode `values`.

    Raises:
        ValueError: The scratch is for fewer sequences.
    """
    config, device = scratch.config, call.query.device
    num_seqs, block_size = len(call.query), call.cache.kv_cache.shape[2]
    num_programs = config.num_programs(call.cache.kv_cache.shape[1], num_multiprocessors(device))
    _check_room(call, num_programs, scratch.thresholds, scratch.partial_stats)
    schedule = _values_schedule(config, unit_of(config.tile, block_size), num_seqs)
    is_early = config.early_launch and has_dependent_launch(device)
    return Launches(num_programs, schedule, config.merge_warps, is_early)


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
    _check_room(call, max(num_programs, num_values_programs), scratch.thresholds, scratch.partial_stats)
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
        Launches(num_programs, schedule, config.merge_warps, is_early),
        Choice(
            config.few_tokens * num_programs,
            config.short_length,
            num_values_programs,
            _values_schedule(values_config, unit, num_seqs),
        ),
    )


def _check_room(call: LayerCall, num_programs: int, thresholds: torch.Tensor, partial_stats: torch.Tensor) -> None:
    num_seqs, num_kv_heads = len(call.query), call.cache.kv_cache.shape[1]
    if len(thresholds) < num_seqs or len(partial_stats) < (num_programs + num_seqs) * num_kv_heads:
        raise ValueError(f"scratch: made for fewer than {num_seqs} sequences")


def _values_schedule(config: LaunchConfig, unit: int, num_seqs: int) -> Schedule:
    """How a step of which all keys are read is shared out, in units of `unit` tokens."""
    return schedule_of(unit, min_tokens=config.min_work * config.tile, dense_work=DENSE_WORK, num_seqs=num_seqs)
