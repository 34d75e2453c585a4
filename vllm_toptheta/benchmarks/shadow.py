"""Time of the decode kernels with shadow keys, variant by variant, beside `values` and dense attention, on one GPU.

Keys, values and queries are random. So that a projection has something to project on, the variances of the keys'
channels fall off as those of real keys do in the directions that matter to scores (docs/shadow.md); margins and r are
calibrated on the very scores that are measured, for 99 % of the survivors' softmax mass. What depends on the data is
reported with every time: keys and value rows read.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field

from vllm_toptheta.benchmarks.kernels import CACHE_BYTES, KernelWorkload, parse_spec, time_in_graph
from vllm_toptheta.errors import BenchmarkError
from vllm_toptheta.kernels.tuning import ShadowConfig

if TYPE_CHECKING:
    import torch

    from vllm_toptheta.benchmarks.registry import Inputs
    from vllm_toptheta.kernels.shadow import ShadowWorkspace
    from vllm_toptheta.kernels.shadow_codes import ShadowProjection

DEFAULT_SPECS = ("32q1s32k", "8q1s32k", "4q1s128k", "1q1s128k", "32q1s8k")
CHECKED_SPEC = "q1s8k_q1s3001_q1s48"
DECAY = 8.0  # the variance of a key's channel i is that of channel 0 times exp(-DECAY * i / head_size)
KEPT_MASS = 0.99
NUM_SINK, NUM_RECENT = 16, 64
CALIBRATION_SEQUENCES = 2
MAX_ERROR = 0.01  # of an output, whose values are about 0.1 to 3
COMPILE_SECONDS = 240


@dataclass(frozen=True)
class Variant:
    """A format's number of channels, and launch parameters."""

    num_channels: int = 64
    config: ShadowConfig = field(default_factory=ShadowConfig)


def _variant(num_channels: int = 64, **options: Any) -> Variant:
    return Variant(num_channels, ShadowConfig(**options))


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
    "float16": _variant(product="float16"),
    "heads first": _variant(heads_first=True),
    "long chunks": _variant(chunk_tiles=32, list_depth=48),
    "early walks": _variant(list_depth=20),
    "earlier walks": _variant(chunk_tiles=4, list_depth=7),
    "walk 32": _variant(walk_tile=32),
    "walk 128": _variant(walk_tile=128, **_FREE),
    "walk 2 stages": _variant(walk_stages=2),
    "all values": _variant(all_values=True),
    "all values, 2 stages": _variant(all_values=True, walk_stages=2),
    "all values, 3 stages, 2 programs": _variant(all_values=True, walk_stages=3, **_FREE),
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
    scan_microseconds: float | None = Field(default=None, description="With thresholds that leave no candidates.")
    ratio: float | None = Field(default=None, description="Time of the faster FlashAttention-3 over this one.")
    ratio_to_values: float | None = Field(default=None, description="Time of mode values over this one.")
    keys_read_share: float | None = None
    rows_read_share: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class ShadowInputs:
    """A step with shadow keys, and what was calibrated on it."""

    inputs: Inputs
    codes: torch.Tensor
    projection: ShadowProjection
    margin: torch.Tensor
    ratio: torch.Tensor

    @classmethod
    def build(cls, inputs: Inputs, num_channels: int) -> ShadowInputs:
        """Write the shadow keys of a step whose pages have room for them, and calibrate on its first sequences."""
        import torch

        from vllm_toptheta.kernels.pages import codes_view
        from vllm_toptheta.kernels.shadow_codes import ShadowProjection, write_codes
        from vllm_toptheta.reference import fit_projection

        _, num_kv_heads, _, width = inputs.kv_cache.shape
        head_size = width // 2
        scales = _key_scales(head_size)
        identity = torch.eye(head_size, device="cuda").expand(num_kv_heads, -1, -1)
        fitted = fit_projection(
            torch.zeros(num_kv_heads, head_size, device="cuda"),
            identity * scales**2,
            identity,
            num_channels=num_channels,
        )
        projection = ShadowProjection.build(fitted.encoder, fitted.decoder, fitted.key_mean)
        codes = codes_view(inputs.kv_cache, projection.code_bytes)
        starts = torch.zeros(len(inputs.seq_lens) + 1, dtype=torch.int32, device="cuda")
        starts[1:] = inputs.seq_lens.cumsum(0)
        write_codes(
            inputs.kv_cache,
            codes,
            inputs.block_table,
            inputs.seq_lens,
            starts,
            projection=projection,
            max_query_len=inputs.max_seq_len,
        )
        margin, ratio = _calibrate(inputs, fitted)
        return cls(inputs, codes, projection, margin, ratio)

    def call(self, config: ShadowConfig, workspace: ShadowWorkspace, **options: Any) -> Callable[[], None]:
        """The kernels on this step."""
        import torch

        from vllm_toptheta.kernels.pages import value_sum_view
        from vllm_toptheta.kernels.shadow import decode_shadow

        inputs = self.inputs
        arguments: dict[str, Any] = {
            "output": torch.empty_like(inputs.query),
            "workspace": workspace,
            "projection": self.projection,
            "coefficients": inputs.coefficients,
            "margin": self.margin,
            "exp_threshold_scale": self.ratio,
            "min_length": 1,
            "max_length": 2**20,
            "min_sparse_context": 0,
            "num_sink": NUM_SINK,
            "num_recent": NUM_RECENT,
            "softmax_scale": inputs.softmax_scale,
            "value_sum": value_sum_view(inputs.kv_cache),
            "config": config,
        }
        arguments |= options
        tensors = inputs.query, inputs.kv_cache, self.codes, inputs.block_table, inputs.seq_lens
        return lambda: decode_shadow(*tensors, **arguments)

    def workspace(self, config: ShadowConfig) -> ShadowWorkspace:
        from vllm_toptheta.kernels.shadow import ShadowWorkspace

        num_seqs, num_heads, head_size = self.inputs.query.shape
        sizes = num_seqs, num_heads, self.inputs.kv_cache.shape[1], head_size, self.projection.code_bytes
        return ShadowWorkspace.allocate(*sizes, device="cuda", config=config)


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
                checked[key] = _wrong(VARIANTS[name], block_size)
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
    from vllm_toptheta.kernels.decode import DecodeCounters

    lens = parse_spec(spec)
    workload = KernelWorkload(specs=[spec], block_size=block_size)
    num_tokens = sum(lens) * workload.num_kv_heads
    baseline = values = None
    for num_channels in sorted({VARIANTS[name].num_channels for name in names}, reverse=True):
        first = _inputs(lens, block_size, num_channels)
        # the shadow keys alone must outgrow the L2 cache, as those of the layers between two steps do
        count = max(1, -(-CACHE_BYTES // (num_tokens * num_channels // 2)))
        copies = [first, *(_moved(first) for _ in range(count - 1))]
        if baseline is None:
            times = [
                time_in_graph([flash_attention_3(inputs, num_splits=splits) for inputs in copies]) for splits in (0, 32)
            ]
            baseline = min(times)
            yield _row(spec, block_size, "FlashAttention-3", microseconds=baseline, ratio=1.0)
            built = [toptheta(inputs) for inputs in copies]
            built[0][0]()
            rows_read = float(built[0][1].rows_read.sum()) / num_tokens
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
                workspace = shadows[0].workspace(variant.config)
                counters = DecodeCounters.allocate(workload.num_heads, workload.num_kv_heads, "cuda")
                keys_read = torch.zeros(workload.num_kv_heads, dtype=torch.int64, device="cuda")
                options: dict[str, Any] = {"counters": counters, "keys_read": keys_read}
                shadows[0].call(variant.config, workspace, **options)()
                shares = float(keys_read.sum()) / num_tokens, float(counters.rows_read.sum()) / num_tokens
                calls = [shadow.call(variant.config, workspace, **options) for shadow in shadows]
                microseconds = time_in_graph(calls)
                nothing = torch.full_like(first.coefficients, torch.inf)
                calls = [shadow.call(variant.config, workspace, coefficients=nothing, **options) for shadow in shadows]
                yield _row(
                    spec,
                    block_size,
                    name,
                    microseconds=microseconds,
                    scan_microseconds=time_in_graph(calls),
                    ratio=baseline / microseconds,
                    ratio_to_values=None if values is None else values / microseconds,
                    keys_read_share=shares[0],
                    rows_read_share=shares[1],
                )
            except Exception as error:  # whatever a compiler or a launch may raise
                yield _row(spec, block_size, name, error=_message(error))
        del copies, shadows
        torch.cuda.empty_cache()


def _wrong(variant: Variant, block_size: int) -> str | None:
    """What is wrong with a variant's answers against the fp32 reference, or None."""
    import torch

    from vllm_toptheta.kernels.decode import DecodeCounters

    try:
        shadow = ShadowInputs.build(
            _inputs(parse_spec(CHECKED_SPEC), block_size, variant.num_channels), variant.num_channels
        )
        num_heads, num_kv_heads = shadow.inputs.query.shape[1], shadow.inputs.kv_cache.shape[1]
        keys_read = torch.zeros(num_kv_heads, dtype=torch.int64, device="cuda")
        output = torch.full_like(shadow.inputs.query, torch.nan)
        counters = DecodeCounters.allocate(num_heads, num_kv_heads, "cuda")
        _write_value_sums(shadow.inputs)
        workspace = shadow.workspace(variant.config)
        shadow.call(variant.config, workspace, output=output, counters=counters, keys_read=keys_read)()
        expected, candidates = _expected(shadow)
        error = float((output.float() - expected).abs().max())
        off = abs(int(keys_read.sum()) - candidates) / candidates
    except Exception as error_of_run:  # whatever a compiler or a launch may raise
        return _message(error_of_run)
    # floors near an integer may fall to either side
    if not error <= MAX_ERROR or off > 1e-3:
        return f"wrong: outputs differ by {error:.4f}, keys read by {off:.2%}"
    return None


def _expected(shadow: ShadowInputs) -> tuple[torch.Tensor, int]:
    """The reference's outputs, and the number of candidates."""
    import torch

    from vllm_toptheta.reference import (
        Compensation,
        KeyProjection,
        candidate_keys,
        encode_keys,
        quantize_query,
        shadow_scores,
        top_theta_attention,
    )

    inputs = shadow.inputs
    num_heads, num_kv_heads = inputs.query.shape[1], inputs.kv_cache.shape[1]
    fitted = KeyProjection(shadow.projection.encoder, shadow.projection.decoder, shadow.projection.key_mean)
    outputs, num_candidates = [], 0
    for row, query in enumerate(inputs.query.split(1)):
        key, value = inputs.sequence(row)
        scaled = quantize_query(query, fitted, softmax_scale=inputs.softmax_scale)
        candidates = candidate_keys(
            shadow_scores(scaled, encode_keys(key, fitted))[0],
            inputs.coefficients[:, 0] - shadow.margin,
            num_kv_heads=num_kv_heads,
            num_sink=NUM_SINK,
            num_recent=NUM_RECENT,
            block_size=inputs.kv_cache.shape[2],
        )
        num_candidates += int(candidates.sum())
        result = top_theta_attention(
            query.float(),
            key,
            value,
            threshold=inputs.coefficients[:, 0],
            target_k=0,
            softmax_scale=inputs.softmax_scale,
            compensation=Compensation("exp_threshold", exp_threshold_scale=shadow.ratio),
            candidates=candidates.repeat_interleave(num_heads // num_kv_heads, dim=0)[None],
        )
        outputs.append(result.output)
    return torch.cat(outputs), num_candidates


def _calibrate(inputs: Inputs, projection: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Margins and r of every head, [num_heads] float32 each, from the first sequences."""
    import torch

    from vllm_toptheta.reference import encode_keys, quantize_query, shadow_scores

    margins, ratios = [], []
    threshold = inputs.coefficients
    for row in range(min(CALIBRATION_SEQUENCES, len(inputs.seq_lens))):
        key, _ = inputs.sequence(row)
        grouped = inputs.query[row].float().unflatten(0, (key.shape[1], -1))
        scores = torch.einsum("hgd,nhd->hgn", grouped, key).flatten(0, 1) * inputs.softmax_scale
        scaled = quantize_query(inputs.query[row : row + 1], projection, softmax_scale=inputs.softmax_scale)
        shortfall = threshold - shadow_scores(scaled, encode_keys(key, projection))[0]
        survives = scores >= threshold
        mass = (scores - scores.amax(dim=1, keepdim=True)).exp() * survives
        ordered, order = shortfall.masked_fill(~survives, -torch.inf).sort(dim=1)
        kept = mass.gather(1, order).cumsum(dim=1) / mass.sum(dim=1, keepdim=True)
        index = (kept < KEPT_MASS).sum(dim=1, keepdim=True).clamp(max=kept.shape[1] - 1)
        margins.append(ordered.gather(1, index)[:, 0].clamp(min=0))
        discarded = (scores - threshold).exp() * ~survives
        ratios.append(discarded.sum(dim=1) / (~survives).sum(dim=1).clamp(min=1))
    return torch.stack(margins).mean(0), torch.stack(ratios).mean(0)


def _inputs(lens: list[int], block_size: int, num_channels: int) -> Inputs:
    import torch

    from vllm_toptheta.benchmarks.registry import Inputs

    workload = KernelWorkload(specs=[])
    return Inputs.random(
        lens,
        num_heads=workload.num_heads,
        num_kv_heads=workload.num_kv_heads,
        head_size=workload.head_size,
        block_size=block_size,
        dtype=torch.bfloat16,
        kv_dtype=torch.bfloat16,
        target_k=workload.target_k,
        code_bytes=num_channels // 2,
        key_scales=_key_scales(workload.head_size),
    )


def _key_scales(head_size: int) -> torch.Tensor:
    """Standard deviation of every channel of the keys, 1 in the mean square."""
    import torch

    variances = torch.exp(-DECAY * torch.arange(head_size, device="cuda") / head_size)
    return (variances / variances.mean()).sqrt()


def _moved(inputs: Inputs) -> Inputs:
    """The same step in other memory."""
    import torch

    cache = inputs.kv_cache
    memory = torch.empty(len(cache) * cache.stride(0), dtype=cache.dtype, device="cuda")
    memory.copy_(torch.as_strided(cache, (len(memory),), (1,)))
    return replace(inputs, kv_cache=memory.as_strided(cache.shape, cache.stride()), query=inputs.query.clone())


def _write_value_sums(inputs: Inputs) -> None:
    import torch

    from vllm_toptheta.kernels.pages import value_sum_view
    from vllm_toptheta.kernels.value_sums import close_pages

    starts = torch.zeros(len(inputs.seq_lens) + 1, dtype=torch.int32, device="cuda")
    starts[1:] = inputs.seq_lens.cumsum(0)
    close_pages(inputs.kv_cache, value_sum_view(inputs.kv_cache), inputs.block_table, inputs.seq_lens, starts)


def _check_ahead(
    names: list[str], block_sizes: list[int], processes: int, report_progress: Callable[[str], None]
) -> dict[tuple[str, int], str | None]:
    """What `_wrong` says by variant and page size, from several processes, which fill Triton's cache on the disk.

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
                    report_progress(f"compiling {futures[future]}: {_message(error)}")
                    continue
                checked |= {(futures[future], size): answer for size, answer in answers.items()}
        except TimeoutError:
            report_progress(f"compiling took more than {COMPILE_SECONDS} s; going on")
            pool.shutdown(wait=False, cancel_futures=True)
    report_progress(f"{len(checked)} compiled and checked in {time.monotonic() - began:.0f} s")
    return checked


def _check(name: str, block_sizes: list[int]) -> dict[int, str | None]:
    return {block_size: _wrong(VARIANTS[name], block_size) for block_size in block_sizes}


def _row(spec: str, block_size: int, kernel: str, **fields: Any) -> ShadowTime:
    import torch

    return ShadowTime(spec=spec, block_size=block_size, kernel=kernel, device=torch.cuda.get_device_name(), **fields)


def _message(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' | '.join(lines[-3:])}"[:400]


def summary(rows: list[ShadowTime]) -> str:
    """The variants by the geometric mean of their ratios to FlashAttention-3, as JSON."""
    ratios: dict[str, list[float]] = {}
    for row in rows:
        if row.ratio is not None:
            ratios.setdefault(row.kernel, []).append(row.ratio)
    means = {name: statistics.geometric_mean(numbers) for name, numbers in ratios.items()}
    return json.dumps(dict(sorted(means.items(), key=lambda item: -item[1])), indent=1)
