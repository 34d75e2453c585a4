"""Time of the decode kernels alone: ours against dense ones on the same pages, in CUDA graphs, on one GPU.

Keys, values and queries are random, and so are the scores. The thresholds are therefore calibrated on the very scores
that are measured (the k-th largest of each head), which gives the wanted number of survivors but not their clustering
in real text. Random survivors rarely coincide between the heads of a group, so more rows are read here. With patterns
(`patterns`), the same step is also timed with the survivors of each, and with as many rows evenly spread.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field
from rich.table import Table

from vllm_toptheta.benchmarks.specs import parse_batch
from vllm_toptheta.errors import BenchmarkError
from vllm_toptheta.limits import gpus_lack

if TYPE_CHECKING:
    import torch

    from vllm_toptheta.benchmarks.inputs import Inputs, StepShape
    from vllm_toptheta.benchmarks.patterns import Batch, Pattern
    from vllm_toptheta.kernels.gpu.tuning import LaunchConfig

DEFAULT_SPECS = ("32q1s32k", "8q1s32k", "4q1s128k", "32q1s8k", "1q1s32k", "64q1s1k")
CPU_SPECS = ("1q1s256", "1q1s1k", "1q1s4k", "1q1s8k", "1q1s16k", "4q1s4k")
COPY_BYTES = 1 << 30
CACHE_BYTES = 256 << 20  # a step that reads less is timed on several copies, so that the L2 cache serves none of it
GRAPH_MICROSECONDS = 3000  # work in a graph, so that its launch does not count
REPLAYS = 21
# as it is served; then, with thresholds at any length, what it costs to be able to choose for each request, to score
# anchors, and to count. Thresholds that follow anchors keep more rows of some sequences than of others, so the cost of
# anchors is between the fourth and the fifth, which keep the same
OURS: dict[str, dict[str, Any]] = {
    "Top-Theta": {"dense": "served"},
    "Top-Theta, thresholds at any length": {},
    "Top-Theta, no choice per request": {"per_request": False},
    "Top-Theta, the same thresholds for all sequences": {"anchors": "scored"},
    "Top-Theta, the same, no anchors scored": {"anchors": "none"},
    "Top-Theta, not counted": {"count": False},
    "Top-Theta, context too short": {"dense": "always"},
}

_SHAPE = re.compile(r"([1-9]\d*),([1-9]\d*),([1-9]\d*)")


class KernelWorkload(BaseModel):
    """The attention of a layer, and what is decoded with it."""

    specs: list[str] = Field(
        description="Batches in vLLM's grammar: 32q1s32k is 32 requests of 32K, one new token each; 32q4s32k, four."
    )
    num_heads: int = 32
    num_kv_heads: int = 8
    head_size: int = 128
    block_size: int = 16
    dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"
    target_k: int = Field(default=128, ge=1, description="Survivors of a head, on average.")
    patterns: list[str] = Field(default=[], description="Also where survivors are: rules or files, see `patterns`.")
    max_layers: int | None = Field(default=None, ge=1, description="Of a pattern, evenly spread; all without.")
    heavy_share: float | None = Field(
        default=None, ge=0.0, le=1.0, description="Also by tiers where survivors are, of which this share is heavy."
    )


class KernelTime(BaseModel):
    """One kernel on one batch."""

    kernel: str
    microseconds: float = Field(description="Median over graph replays; of a pattern, mean over its layers.")
    slowest_microseconds: float | None = Field(default=None, description="Of a pattern's slowest layer.")
    tb_per_s: float = Field(description="Bytes that it has to read, over time.")
    ratio: float = Field(description="Time of the faster FlashAttention-3 over this one.")
    rows_read_share: float = Field(description="Value rows read over rows cached (f).")
    limit_share: float = Field(description="The ratio over the byte limit 2 / (1 + f), or that of the tiers.")
    keys_read_share: float | None = Field(default=None, description="Of tiers, exact keys read over keys cached.")
    copies_read_share: float | None = Field(default=None, description="Of tiers, copies of values read.")


class BatchReport(BaseModel):
    """All kernels on one batch; `missing` says why one was left out."""

    spec: str
    kernels: list[KernelTime]
    missing: dict[str, str]


class KernelReport(BaseModel):
    """A comparison on one GPU."""

    workload: KernelWorkload
    device: str
    versions: dict[str, str]
    copy_tb_per_s: float = Field(description="Of a device-to-device copy, bytes read and written.")
    thresholds: str = "k-th largest of the same random scores, relative to each row's anchors unless said"
    batches: list[BatchReport]


def parse_shape(shape: str, *, on_gpu: bool = True) -> tuple[int, int, int]:
    """Query heads, kv heads and head size of a layer, given as 32,8,128.

    Raises:
        BenchmarkError: It is malformed, or there are no kernels for it.
    """
    match = _SHAPE.fullmatch(shape.replace(" ", ""))
    if match is None:
        raise BenchmarkError(
            f"{shape!r} is no shape", field="--shape", remedy="Write <query heads>,<kv heads>,<head size>: 32,8,128"
        )
    num_heads, num_kv_heads, head_size = map(int, match.groups())
    if num_heads % num_kv_heads:
        raise BenchmarkError(f"{num_heads} query heads are no multiple of {num_kv_heads} kv heads", field="--shape")
    if on_gpu and (lacking := gpus_lack(head_size, num_heads, num_kv_heads)):
        raise BenchmarkError(lacking, field="--shape")
    return num_heads, num_kv_heads, head_size


def layers_of(num_layers: int, most: int | None) -> range:
    """All layers of a pattern, or at most some, the first and others at equal distances."""
    return range(0, num_layers, 1 if most is None else -(-num_layers // most))


def compare(workload: KernelWorkload, *, report_progress: Callable[[str], None] = lambda _: None) -> KernelReport:
    """Measure every kernel on every batch.

    Raises:
        BenchmarkError: There is no GPU, or FlashAttention-3, the measure of all, does not run.
    """
    import torch

    from vllm_toptheta.benchmarks.patterns import pattern_of
    from vllm_toptheta.benchmarks.registry import versions

    batches = [(spec, *parse_batch(spec)) for spec in workload.specs]
    if workload.heavy_share is not None and any(query_len > 1 for _, _, query_len in batches):
        raise BenchmarkError("copies are read for one new token of a request only", field="--heavy-share")
    patterns = [pattern_of(name, target_k=workload.target_k) for name in workload.patterns]
    if not torch.cuda.is_available():
        raise BenchmarkError("the kernels run on NVIDIA GPUs only, and there is none")
    copy_tb_per_s = _copy_tb_per_s()
    reports = []
    for spec, lens, query_len in batches:
        report_progress(spec)
        reports.append(_measure(workload, spec, inputs_of(workload, lens, query_len), patterns))
        torch.cuda.empty_cache()
    return KernelReport(
        # a report is shown to others, whom folders of this machine do not concern
        workload=workload.model_copy(update={"patterns": [Path(name).name for name in workload.patterns]}),
        device=torch.cuda.get_device_name(),
        versions=versions(),
        copy_tb_per_s=copy_tb_per_s,
        batches=reports,
    )


def kernel_table(report: KernelReport) -> Table:
    """The report as a table."""
    work = report.workload
    table = Table(
        title=f"{work.num_heads} query heads, {work.num_kv_heads} kv heads, head size {work.head_size}, "
        f"pages of {work.block_size}, KV {work.kv_dtype}, k = {work.target_k}",
        caption=f"{report.device}; a copy moves {report.copy_tb_per_s:.2f} TB/s; "
        + ", ".join(f"{name} {number}" for name, number in report.versions.items())
        + f"; thresholds: {report.thresholds}",
    )
    for heading in ("batch", "kernel", "us", "slowest layer", "TB/s", "rows read %", "ratio", "of the limit %"):
        table.add_column(heading, justify="left" if heading in ("batch", "kernel") else "right")
    for batch in report.batches:
        for kernel in batch.kernels:
            table.add_row(
                batch.spec,
                kernel.kernel,
                f"{kernel.microseconds:.1f}",
                "" if kernel.slowest_microseconds is None else f"{kernel.slowest_microseconds:.1f}",
                f"{kernel.tb_per_s:.2f}",
                f"{100 * kernel.rows_read_share:.1f}"
                + (f" + {100 * kernel.copies_read_share:.1f} copies" if kernel.copies_read_share is not None else ""),
                f"{kernel.ratio:.3f}",
                f"{100 * kernel.limit_share:.0f}",
            )
        for kernel_name, reason in batch.missing.items():
            table.add_row(batch.spec, f"{kernel_name}: {reason}", style="dim")
        table.add_section()
    return table


def time_in_graph(calls: Sequence[Callable[[], Any]]) -> float:
    """Median microseconds of a call, from replays of a CUDA graph that repeats `calls`, which do alike, in turn."""
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(3):
        start.record()
        for call in calls:
            call()
        end.record()
        torch.cuda.synchronize()
    rounds = max(1, int(GRAPH_MICROSECONDS / max(1000 * start.elapsed_time(end), 1.0)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    times = []
    for replay in range(REPLAYS + 2):
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if replay >= 2:
            times.append(1000 * start.elapsed_time(end) / (rounds * len(calls)))
    return float(statistics.median(times))


def _copy_tb_per_s() -> float:
    """Rate of a device-to-device copy, bytes read and written."""
    import torch

    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2e-6 * COPY_BYTES / time_in_graph([lambda: target.copy_(source)])


def _measure(workload: KernelWorkload, spec: str, copies: Sequence[Inputs], patterns: Sequence[Pattern]) -> BatchReport:
    from vllm_toptheta.benchmarks.patterns import Batch, Spread
    from vllm_toptheta.benchmarks.registry import DENSE, toptheta

    lens = copies[0].seq_lens.tolist()
    times: dict[str, tuple[float, float]] = {}
    slowest: dict[str, float] = {}
    missing: dict[str, str] = {}
    for name, build in DENSE.items():
        try:
            times[name] = time_in_graph([build(inputs) for inputs in copies]), 1.0
        except (ImportError, RuntimeError, ValueError, TypeError, AssertionError) as error:
            missing[name] = "not installed" if isinstance(error, ImportError) else f"failed: {error}"[:100]
    baseline = min((time for name, (time, _) in times.items() if name.startswith("FlashAttention")), default=None)
    if baseline is None:
        raise BenchmarkError(f"FlashAttention-3 does not run here: {missing}")
    share = 1.0
    for name, options in OURS.items():
        built = [toptheta(inputs, **options) for inputs in copies]
        built[0][0]()
        if options.get("count", True):
            share = float(built[0][1].value_rows_read.sum()) / (sum(lens) * workload.num_kv_heads)
        times[name] = time_in_graph([call for call, _ in built]), share
    batch = Batch(lens, workload.num_kv_heads, workload.num_heads // workload.num_kv_heads)
    replayed = [one for given in patterns for one in (Spread(given), given)]
    for pattern in replayed:
        layers = layers_of(pattern.num_layers, workload.max_layers)
        of_layers = [time_layer(pattern.survivors(layer, batch), copies) for layer in layers]
        name = f"Top-Theta, {pattern.name}"
        times[name] = statistics.mean(time for time, _ in of_layers), statistics.mean(share for _, share in of_layers)
        slowest[name] = max(time for time, _ in of_layers)
    by_tiers = [
        _time_tiers(workload, pattern, batch, copies, baseline)
        for pattern in replayed
        if workload.heavy_share is not None
    ]
    return BatchReport(
        spec=spec,
        kernels=[
            KernelTime(
                kernel=name,
                microseconds=time,
                slowest_microseconds=slowest.get(name),
                tb_per_s=1e-6 * copies[0].kv_bytes * (1 + share) / 2 / time,
                ratio=baseline / time,
                rows_read_share=share,
                limit_share=baseline / time * (1 + share) / 2,
            )
            for name, (time, share) in times.items()
        ]
        + by_tiers,
        missing=missing,
    )


def _time_tiers(
    workload: KernelWorkload, pattern: Pattern, batch: Batch, copies: Sequence[Inputs], baseline: float
) -> KernelTime:
    """Our kernels with copies of keys and values, over the layers of a pattern."""
    from vllm_toptheta.benchmarks.registry import toptheta_by_tiers
    from vllm_toptheta.evaluation.decode_report import share_of_bytes

    times, reads = [], []
    for layer in layers_of(pattern.num_layers, workload.max_layers):
        survivors = pattern.survivors(layer, batch)
        replays = [inputs.replay(survivors, heavy_share=workload.heavy_share or 0.0) for inputs in copies]
        built = [toptheta_by_tiers(inputs) for inputs in replays]
        built[0][0]()
        counters = built[0][1]
        counted = (counters.value_rows_read, counters.keys_read, counters.copies_read)
        num_rows = sum(batch.lens) * workload.num_kv_heads
        reads.append([float(count.sum()) / num_rows for count in counted if count is not None])
        times.append(time_in_graph([call for call, _ in built]))
    rows, keys, values = (statistics.mean(column) for column in zip(*reads, strict=True))
    bytes_share = share_of_bytes(
        head_size=workload.head_size, keys=keys, value_rows=rows, key_copies=1.0, value_copies=values
    )
    time = statistics.mean(times)
    return KernelTime(
        kernel=f"Top-Theta by tiers, {pattern.name}",
        microseconds=time,
        slowest_microseconds=max(times),
        tb_per_s=1e-6 * copies[0].kv_bytes * bytes_share / time,
        ratio=baseline / time,
        rows_read_share=rows,
        limit_share=baseline / time * bytes_share,
        keys_read_share=keys,
        copies_read_share=values,
    )


def time_layer(
    survivors: Sequence[torch.Tensor], copies: Sequence[Inputs], config: LaunchConfig | None = None
) -> tuple[float, float]:
    """Microseconds of our kernel where these survive, and the share of value rows that it reads.

    With launch parameters, which are those of the kernel in Triton, of that.
    """
    from vllm_toptheta.benchmarks.registry import toptheta

    built = [toptheta(inputs.replay(survivors), config=config, in_triton=config is not None) for inputs in copies]
    (call, counters), *_ = built
    call()
    rows_cached = int(copies[0].seq_lens.sum()) * copies[0].kv_cache.shape[1]
    share = float(counters.value_rows_read.sum()) / rows_cached
    return time_in_graph([call for call, _ in built]), share


def step_shape(workload: KernelWorkload) -> StepShape:
    """The sizes of a workload's steps."""
    import torch

    from vllm_toptheta.benchmarks.inputs import StepShape

    return StepShape(
        workload.num_heads,
        workload.num_kv_heads,
        workload.head_size,
        workload.block_size,
        getattr(torch, workload.dtype),
        getattr(torch, workload.kv_dtype),
        workload.target_k,
    )


def inputs_of(workload: KernelWorkload, lens: list[int], query_len: int = 1) -> list[Any]:
    """Random steps of `query_len` new tokens a request, as many as it takes to outgrow the L2 cache."""

    from vllm_toptheta.benchmarks.inputs import Inputs
    from vllm_toptheta.kernels.codec import tier_bytes

    code_bytes = 0 if workload.heavy_share is None else tier_bytes(workload.head_size)
    first = Inputs.random(lens, step_shape(workload), code_bytes=code_bytes, query_len=query_len)
    # by tiers, an eighth or so of the bytes is read
    count = max(1, -(-CACHE_BYTES * (1 if workload.heavy_share is None else 6) // first.kv_bytes))
    return [first, *(_copy(first) for _ in range(count - 1))]


def _copy(inputs: Any) -> Any:
    """The same step in other memory."""
    import torch

    cache = inputs.kv_cache
    memory = torch.empty(len(cache) * cache.stride(0), dtype=cache.dtype, device="cuda")
    other = memory.as_strided(cache.shape, cache.stride())
    memory.view(torch.uint8).copy_(torch.as_strided(cache, (len(memory),), (1,)).view(torch.uint8))
    return replace(inputs, kv_cache=other, query=inputs.query.clone())
