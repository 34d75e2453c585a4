"""The search for launch parameters of the decode kernel, and for the steps that are no slower without thresholds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm_toptheta.benchmarks.kernels import (
    KernelWorkload,
    inputs_of,
    layers_of,
    time_in_graph,
    time_layer,
)
from vllm_toptheta.benchmarks.specs import parse_spec
from vllm_toptheta.errors import BenchmarkError

if TYPE_CHECKING:
    from vllm_toptheta.kernels.gpu.tuning import LaunchConfig

DENSE_LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)  # where thresholds may begin to pay, for one sequence


def tune(
    workload: KernelWorkload, *, report_progress: Callable[[str], None] = lambda _: None
) -> tuple[str, LaunchConfig]:
    """The card's name, and the candidate with the least product of times over the batches, thresholds on and off.

    With a pattern, also how many tokens make it faster than reading every key; without, the table's number stays.

    Raises:
        BenchmarkError: There is no GPU.
    """
    import torch
    from triton.runtime.errors import OutOfResources

    from vllm_toptheta.benchmarks.registry import toptheta
    from vllm_toptheta.kernels.gpu.tuning import card_name, launch_config

    if not torch.cuda.is_available():
        raise BenchmarkError("the kernels run on NVIDIA GPUs only, and there is none")
    scores = dict.fromkeys(candidates(), 0.0)
    for spec in workload.specs:
        copies = inputs_of(workload, parse_spec(spec))
        for config in scores:
            times = []
            for dense in ("never", "always"):
                calls = [toptheta(inputs, dense=dense, config=config, in_triton=True)[0] for inputs in copies]
                try:
                    times.append(time_in_graph(calls))
                except OutOfResources:
                    times.append(math.inf)  # more shared memory than the card has
            scores[config] += sum(math.log(time) for time in times)
            report_progress(f"{spec}: {times[0]:.1f} us, {times[1]:.1f} us with every key kept; {config}")
        del copies
        torch.cuda.empty_cache()
    best = min(scores, key=lambda config: scores[config])
    device, element_bytes = torch.device("cuda"), getattr(torch, workload.kv_dtype).itemsize
    known = launch_config(workload.head_size, element_bytes, device)
    dense_tokens = _dense_tokens(workload, best, report_progress) if workload.patterns else known.dense_tokens
    return card_name(device), replace(best, dense_length=known.dense_length, dense_tokens=dense_tokens)


def _dense_tokens(workload: KernelWorkload, config: LaunchConfig, report_progress: Callable[[str], None]) -> int:
    """Tokens of a step for each program, below which a sequence is decoded sooner if every key is kept.

    By single sequences, with the survivors of a pattern.
    """
    import torch

    from vllm_toptheta.benchmarks.patterns import Batch, pattern_of
    from vllm_toptheta.benchmarks.registry import toptheta
    from vllm_toptheta.kernels.gpu.tuning import num_multiprocessors

    pattern = pattern_of(workload.patterns[0], target_k=workload.target_k)
    num_programs: int = config.num_programs(workload.num_kv_heads, num_multiprocessors(torch.device("cuda")))
    lost = []
    for length in DENSE_LENGTHS:
        copies = inputs_of(workload, [length])
        batch = Batch([length], workload.num_kv_heads, workload.num_heads // workload.num_kv_heads)
        layers = [pattern.survivors(layer, batch) for layer in layers_of(pattern.num_layers, workload.max_layers)]
        sparse = statistics.mean(time_layer(survivors, copies, config)[0] for survivors in layers)
        calls = [toptheta(inputs, dense="always", config=config, in_triton=True)[0] for inputs in copies]
        dense = time_in_graph(calls)
        report_progress(f"1 x {length}: {sparse:.1f} us, {dense:.1f} us with every key kept")
        lost.append(sparse - dense)
        del copies
        torch.cuda.empty_cache()
    return round(gain_begins(DENSE_LENGTHS, lost) / num_programs)


def gain_begins(lengths: Sequence[int], lost: Sequence[float]) -> float:
    """The length behind which nothing is lost any more, on a line between the two around it; at most the last one."""
    length, last = 0.0, 0.0
    for longer, more in zip(lengths, lost, strict=True):
        if more <= 0:
            return length + (longer - length) * last / (last - more) if last > 0 else length
        length, last = longer, more
    return length


def candidates() -> list[LaunchConfig]:
    """Launch parameters worth trying; the first is the default."""
    from vllm_toptheta.kernels.gpu.tuning import LaunchConfig

    two: dict[str, Any] = {"programs_per_sm": 2, "max_registers": None}
    return [
        LaunchConfig(**options)
        for options in (
            {},
            {"scan_stages": 4},
            {"min_group": 16},
            {"tile": 128},
            {"tile": 128, "scan_stages": 4},
            two,
            {**two, "scan_stages": 4},
            {**two, "dense_tile": 32},
            {**two, "tile": 128},
        )
    ]
