"""Time of the decode kernels with shadow keys, variant by variant, beside `values` and dense attention, on one GPU.

Keys, values and queries are random (`shadow_inputs`). What depends on the data is reported with every time: keys and
value rows read.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from vllm_toptheta.benchmarks.kernels import CACHE_BYTES, KernelWorkload, time_in_graph
from vllm_toptheta.benchmarks.shadow_inputs import ShadowInputs, message, moved, random_inputs, wrong
from vllm_toptheta.benchmarks.specs import parse_spec
from vllm_toptheta.errors import BenchmarkError
from vllm_toptheta.kernels.gpu.tuning import ShadowConfig

LONG_SPECS = ("32q1s32k", "8q1s32k", "4q1s128k", "1q1s128k", "32q1s8k")
# on both sides of where scanning begins
SHORT_SPECS = ("1q1s32k", "1q1s16k", "1q1s8k", "1q1s4k", "1q1s1k", "8q1s4k", "8q1s2k", "8q1s1k")
FULL_SPECS = ("32q1s2k", "32q1s1k", "64q1s1k", "64q1s512")
DEFAULT_SPECS = LONG_SPECS + SHORT_SPECS + FULL_SPECS
COMPILE_SECONDS = 240


@dataclass(frozen=True)
class Variant:
    """A format's number of channels, and launch parameters."""

    num_channels: int = 64
    config: ShadowConfig = field(default_factory=ShadowConfig)


# what the other variants differ from in one thing each; `walk 128` became the default
_BASE: dict[str, Any] = {"max_registers": 168, "programs_per_sm": 3, "walk_tile": 64}


def _variant(num_channels: int = 64, **options: Any) -> Variant:
    return Variant(num_channels, ShadowConfig(**(_BASE | options)))


_WIDE: dict[str, Any] = {"tile": 512, "num_warps": 8, "max_registers": 128, "programs_per_sm": 2}
_FREE: dict[str, Any] = {"max_registers": None, "programs_per_sm": 2}

VARIANTS: dict[str, Variant] = {
    "base": _variant(),
    "tile 128": _variant(tile=128),
    "tile 512": _variant(tile=512),
    "2 stages": _variant(scan_stages=2),
    "4 stages": _variant(scan_stages=4),
    "2 programs": _variant(**_FREE),
    "4 programs": _variant(max_registers=128, programs_per_sm=4),
    "8 warps": _variant(**_WIDE),
    "long chunks": _variant(chunk_tiles=32, list_depth=48),
    "early walks": _variant(list_depth=20),
    "earlier walks": _variant(chunk_tiles=4, list_depth=7),
    "walk 32": _variant(walk_tile=32),
    "walk 128": _variant(walk_tile=128, **_FREE),
    "walk 2 stages": _variant(walk_stages=2),
    "32 channels": _variant(32),
    "32 channels, tile 512": _variant(32, tile=512),
    "32 channels, early walks": _variant(32, list_depth=20),
}


class ShadowTime(BaseModel):
    """One variant, or one kernel it is compared with, on one batch; an `error` instead of times if it failed."""

    spec: str
    block_size: int
    kernel: str
    device: str
    microseconds: float | None = Field(default=None, description="Median over graph replays.")
    scan_microseconds: float | None = Field(
        default=None, description="Of scanning, with thresholds that leave no candidates."
    )
    ratio: float | None = Field(default=None, description="Time of the faster FlashAttention-3 over this one.")
    ratio_to_values: float | None = Field(default=None, description="Time of mode values over this one.")
    keys_read_share: float | None = None
    rows_read_share: float | None = None
    error: str | None = None


def compare(
    specs: list[str],
    block_sizes: list[int],
    names: list[str],
    *,
    processes: int = 12,
    rows_file: Path | None = None,
    report_progress: Callable[[str], None] = lambda _: None,
) -> list[ShadowTime]:
    """Compile, check and time variants.

    Args:
        specs: Batches in vLLM's grammar.
        block_sizes: Tokens of a page.
        names: Of `VARIANTS`.
        processes: Compile and check in so many processes; 0 does it in this one.
        rows_file: Every row is appended to it as a line of JSON as soon as it is there.
        report_progress: Called with a line for every row.

    Raises:
        BenchmarkError: There is no GPU, a batch or a variant is unknown, or FlashAttention-3 does not run.
    """
    import torch

    for spec in specs:
        parse_spec(spec)
    if unknown := [name for name in names if name not in VARIANTS]:
        raise BenchmarkError(f"{unknown[0]!r} is no variant", remedy=f"Choose from: {'; '.join(VARIANTS)}")
    if not torch.cuda.is_available():
        raise BenchmarkError("the kernels run on NVIDIA GPUs only, and there is none")
    rows: list[ShadowTime] = []

    def add(row: ShadowTime) -> None:
        rows.append(row)
        report_progress(row.model_dump_json(exclude_none=True, exclude={"device"}))
        if rows_file is not None:
            with rows_file.open("a", encoding="utf-8") as file:
                file.write(row.model_dump_json(exclude_none=True) + "\n")
                file.flush()
                os.fsync(file.fileno())

    checked = _check_ahead(names, block_sizes, processes, report_progress)
    for block_size in block_sizes:
        for name in names:
            key = name, block_size
            if key not in checked:
                checked[key] = wrong(VARIANTS[name].num_channels, VARIANTS[name].config, block_size)
            if error := checked[key]:
                add(_row("checked", block_size, name, error=error))
    for block_size in block_sizes:
        for spec in specs:
            usable = [name for name in names if checked[name, block_size] is None]
            for row in _measure(spec, block_size, usable):
                add(row)
            torch.cuda.empty_cache()
    return rows


def _measure(spec: str, block_size: int, names: list[str]) -> Iterator[ShadowTime]:
    """Dense attention, mode `values`, then the variants."""
    import torch

    from vllm_toptheta.benchmarks.registry import flash_attention_3, toptheta
    from vllm_toptheta.kernels.contract import Counters, LayerThresholds

    lens = parse_spec(spec)
    workload = KernelWorkload(specs=[spec], block_size=block_size)
    num_tokens = sum(lens) * workload.num_kv_heads
    baseline = values = None
    for num_channels in sorted({VARIANTS[name].num_channels for name in names}, reverse=True):
        first = random_inputs(lens, block_size, num_channels)
        # the shadow keys alone must outgrow the L2 cache, as those of the layers between two steps do
        count = max(1, -(-CACHE_BYTES // (num_tokens * num_channels // 2)))
        copies = [first, *(moved(first) for _ in range(count - 1))]
        if baseline is None:
            times = [
                time_in_graph([flash_attention_3(inputs, num_splits=splits) for inputs in copies]) for splits in (0, 32)
            ]
            baseline = min(times)
            yield _row(spec, block_size, "FlashAttention-3", microseconds=baseline, ratio=1.0)
            built = [toptheta(inputs) for inputs in copies]
            built[0][0]()
            rows_read = float(built[0][1].value_rows_read.sum()) / num_tokens
            values = time_in_graph([call for call, _ in built])
            yield _row(
                spec, block_size, "values", microseconds=values, ratio=baseline / values, rows_read_share=rows_read
            )
        shadows = [ShadowInputs.build(inputs, num_channels) for inputs in copies]
        for name in names:
            variant = VARIANTS[name]
            if variant.num_channels != num_channels:
                continue
            try:
                scratch = shadows[0].scratch(variant.config)
                counters = Counters.allocate(workload.num_heads, workload.num_kv_heads, "cuda", counts_keys=True)
                shadows[0].call(scratch, counters=counters)()
                read = [float(found.sum()) / num_tokens for found in counters[:2] if found is not None]
                calls = [shadow.call(scratch, counters=counters) for shadow in shadows]
                microseconds = time_in_graph(calls)
                nothing = LayerThresholds(torch.full_like(first.absolute, torch.inf))
                scanning = scratch._replace(config=variant.config.scanning)
                calls = [shadow.call(scanning, counters=counters, thresholds=nothing) for shadow in shadows]
                yield _row(
                    spec,
                    block_size,
                    name,
                    microseconds=microseconds,
                    scan_microseconds=time_in_graph(calls),
                    ratio=baseline / microseconds,
                    ratio_to_values=None if values is None else values / microseconds,
                    rows_read_share=read[0],
                    keys_read_share=read[1],
                )
            except Exception as error:  # whatever a compiler or a launch may raise
                yield _row(spec, block_size, name, error=message(error))
        del copies, shadows
        torch.cuda.empty_cache()


def _check_ahead(
    names: list[str], block_sizes: list[int], processes: int, report_progress: Callable[[str], None]
) -> dict[tuple[str, int], str | None]:
    """What `wrong` says by variant and page size, from several processes, which fill Triton's cache on the disk.

    A variant has a process of its own, so that one that breaks a CUDA context breaks no other's. What is missing from
    the answer, because a process died or took too long, is for the caller to find out.
    """
    checked: dict[tuple[str, int], str | None] = {}
    if not processes:
        return checked
    began = time.monotonic()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn, max_tasks_per_child=1) as pool:
        futures = {pool.submit(_check, name, block_sizes): name for name in names}
        try:
            for future in as_completed(futures, timeout=COMPILE_SECONDS):
                try:
                    answers = future.result()
                except Exception as error:  # of the process, not of what it ran
                    report_progress(f"compiling {futures[future]}: {message(error)}")
                    continue
                checked |= {(futures[future], size): answer for size, answer in answers.items()}
        except TimeoutError:
            report_progress(f"compiling took more than {COMPILE_SECONDS} s; going on")
            pool.shutdown(wait=False, cancel_futures=True)
    report_progress(f"{len(checked)} compiled and checked in {time.monotonic() - began:.0f} s")
    return checked


def _check(name: str, block_sizes: list[int]) -> dict[int, str | None]:
    return {
        block_size: wrong(VARIANTS[name].num_channels, VARIANTS[name].config, block_size) for block_size in block_sizes
    }


def _row(spec: str, block_size: int, kernel: str, **fields: Any) -> ShadowTime:
    import torch

    return ShadowTime(spec=spec, block_size=block_size, kernel=kernel, device=torch.cuda.get_device_name(), **fields)


def summary(rows: list[ShadowTime]) -> str:
    """The variants by the geometric mean of their ratios to FlashAttention-3, as JSON."""
    ratios: dict[str, list[float]] = {}
    for row in rows:
        if row.ratio is not None:
            ratios.setdefault(row.kernel, []).append(row.ratio)
    means = {name: statistics.geometric_mean(numbers) for name, numbers in ratios.items()}
    return json.dumps(dict(sorted(means.items(), key=lambda item: -item[1])), indent=1)
