"""A step of mode `shadow`, by shadow keys or by copies: what its kernels are given, and how those in Triton start."""

from __future__ import annotations

import functools
from typing import NamedTuple

from vllm_toptheta.kernels.contract import DecodeStep, LayerCall, check
from vllm_toptheta.kernels.gpu.cuda.launching import SplitStep
from vllm_toptheta.kernels.gpu.launches import Choice, Launches, shadow_launches
from vllm_toptheta.kernels.gpu.records import (
    Copies,
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
from vllm_toptheta.kernels.gpu.scratch import ShadowScratch, TierScratch
from vllm_toptheta.kernels.gpu.shadow_query import query_kernel
from vllm_toptheta.kernels.gpu.shadow_split import shadow_split_kernel
from vllm_toptheta.kernels.gpu.tiles import MIN_COLUMNS
from vllm_toptheta.kernels.gpu.tuning import ShadowConfig, launch_options
from vllm_toptheta.kernels.gpu.values import check_kernels, tiling_of


class ShadowStep(NamedTuple):
    """What the kernels of a step are given.

    Attributes:
        split: The step as it is scanned.
        launches, choice: How it is launched, and when and how all of its keys are read instead.
        sizes: Sequences, and when they keep everything, as kernels in Triton take it.
        bounds: What follows there: the stride of the block table, and when all keys are read.
        on_gpu: As of `Tiling`.
    """

    split: SplitStep
    launches: Launches
    choice: Choice
    sizes: tuple[int, int, int]
    bounds: tuple[int, int, int]
    on_gpu: bool

    @classmethod
    def of(cls, step: DecodeStep, call: LayerCall, scratch: ShadowScratch | TierScratch) -> ShadowStep:
        """A layer's step.

        Raises:
            ValueError: As for `contract.check`; or the scratch is for fewer sequences.
        """
        check_kernels(call)
        check(step, call)
        launches, choice = shadow_launches(call, scratch)
        anchor_lse = scratch.anchor_lse if isinstance(scratch, TierScratch) else None
        split = SplitStep(
            step,
            Tokens.of(step, call.cache),
            Queries.of(call, scratch.thresholds, anchor_lse),
            Pieces(scratch.partial_output, scratch.partial_stats),
            Counts.of(call.layer.counters),
            Shape.of(call),
            launches.schedule,
            launches.num_programs,
        )
        sizes = call.query.shape[0], step.max_dense_len, step.min_step_tokens
        bounds = step.block_table.stride(0), choice.few_tokens, choice.short_length
        return cls(split, launches, choice, sizes, bounds, call.query.is_cuda)


def launch_queries(
    given: ShadowStep, scratch: ShadowScratch | TierScratch, keys: Shadow | Copies, *, tokens_at_once: int
) -> None:
    """Enqueue what the scan compares codes with, or all work of a step of which all keys are read.

    Args:
        given: The step.
        scratch: What `keys` has its memory from.
        keys: What is read of most keys.
        tokens_at_once: Of a page that is filled, whose codes or copies are written; 0 leaves queries and pages alone.
    """
    split, choice, config, early = given.split, given.choice, scratch.values_config, given.launches.is_early
    query_kernel[(split.num_kv_heads, choice.num_programs)](
        split.tokens,
        split.queries,
        keys,
        Lists(scratch.survivors, scratch.order),
        split.pieces,
        split.counts,
        *given.sizes,
        *given.bounds,
        split.shape,
        choice.schedule,
        tiling_of(config, split.shape.GROUP, on_gpu=given.on_gpu),
        BY_COPIES=isinstance(keys, Copies),
        TOKENS=min(tokens_at_once, next_power_of_2(split.shape.BLOCK_SIZE)),
        EARLY_QUERY=early,
        EARLY_SPLIT=early,
        **launch_options(config.num_warps, config.max_registers, is_early=early),
    )


def launch_split(
    given: ShadowStep,
    config: ShadowConfig,
    keys: Shadow | Copies,
    lists: Lists,
    light: Lists | None = None,
    *,
    row_tokens: int = 1,
    log_heavy: float | None = None,
) -> None:
    """Enqueue the scan, and what it asks for.

    Args:
        given, keys: As for `launch_queries`.
        config: How it is launched.
        lists, light, row_tokens, log_heavy: As of `shadow_split_kernel`.
    """
    split, early = given.split, given.launches.is_early
    group, by_copies = split.shape.GROUP, isinstance(keys, Copies)
    shadow_split_kernel[(split.num_kv_heads, split.num_programs)](
        split.tokens,
        split.queries,
        keys,
        lists,
        light,
        split.pieces,
        split.counts,
        *given.sizes,
        *((None, None) if by_copies else split.step.length_range),
        *given.bounds,
        log_heavy,
        split.shape,
        split.schedule,
        scan_tiling(config, group, on_gpu=given.on_gpu),
        BY_COPIES=by_copies,
        ROW_TOKENS=row_tokens,
        COLUMN_HEADS=max(next_power_of_2(group), MIN_COLUMNS // row_tokens),
        IS_EARLY=early,
        **launch_options(config.num_warps, config.max_registers, is_early=early),
    )


@functools.cache
def scan_tiling(config: ShadowConfig, group: int, *, on_gpu: bool) -> Tiling:
    """The scan of shadow keys or copies, and the walk of keys that are read exactly, by `group` query heads."""
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
