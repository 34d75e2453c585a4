"""Time per output token of whole engines: the same prompts through each backend, one after the other.

Each backend gets a process of its own, because a vLLM engine takes over its process. Rounds alternate between the
backends, so that a machine that slows down meanwhile slows all of them.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field

from vllm_toptheta.benchmarks.dummy import accept, keep
from vllm_toptheta.benchmarks.host import cpu_name
from vllm_toptheta.errors import BenchmarkError

if TYPE_CHECKING:
    from rich.table import Table

LOG_TAIL = 4000  # characters of a failed engine's log that are shown
# options of what stands behind a backend's colon
_MODES: dict[str, dict[str, Any]] = {
    "": {},
    "values": {"mode": "values"},
    "shadow": {"mode": "shadow"},
    "tiers": {"mode": "shadow", "shadow_values": True},
    "lossless": {"lossless": True},
    "lossless-tiers": {"lossless": True, "mode": "shadow", "shadow_values": True},
}


class ServingWorkload(BaseModel):
    """What every backend has to do."""

    model: str
    context: int = Field(ge=1, description="Prompt tokens of a request.")
    output_tokens: int = Field(ge=2, description="Tokens generated per request.")
    batch_size: int = Field(ge=1, description="Requests at a time.")
    repeats: int = Field(ge=1, description="Measured batches per engine.")
    dtype: str = "auto"
    enforce_eager: bool = True
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the backend toptheta.")
    shadow_keys: str | None = Field(default=None, description="Store for mode shadow; that of the model if not given.")
    random_rows: int | None = Field(
        default=None, description="Random weights, with thresholds by which a kv head reads that many value rows."
    )
    random_keys: int | None = Field(
        default=None, description="With random weights, keys that a kv head reads in mode shadow."
    )
    draft_tokens: str | None = Field(default=None, description="In lossless modes; the backend's if not given.")
    acceptance: float | None = Field(
        default=None, description="With random weights, the probability by which each draft is accepted."
    )
    gpu_memory_utilization: float = 0.92


class BackendTimes(BaseModel):
    """One backend's measurement."""

    backend: str = Field(description="And its mode behind a colon, unless it is the default.")
    ms_per_token: list[float] = Field(
        description="Of each measured batch: decode time over generated tokens of a request."
    )
    rows_read_share: float | None = Field(
        default=None, description="Value rows read over cached in thresholded layers."
    )
    keys_read_share: float | None = Field(default=None, description="Likewise keys, in mode shadow.")
    copies_read_share: float | None = Field(default=None, description="Likewise values that were read as copies.")
    accepted_share: float | None = Field(default=None, description="Drafts accepted over drafted.")

    @property
    def median(self) -> float:
        """Median time per output token, milliseconds."""
        return statistics.median(self.ms_per_token)


class ServingReport(BaseModel):
    """A comparison; the first backend is the one that the others are measured against."""

    workload: ServingWorkload
    device: str
    vllm: str
    backends: list[BackendTimes]


def compare(workload: ServingWorkload, backends: Sequence[str], rounds: int) -> ServingReport:
    """Measure each backend in `rounds` alternating engines.

    Raises:
        BenchmarkError: Random weights lack a number of keys for mode `shadow`, weights that are not random have an
            acceptance, nothing drafts that could be accepted, or an engine failed; shows the end of its log.
    """
    from importlib.metadata import version

    for backend in backends:
        if backend.partition(":")[2] not in _MODES:
            raise BenchmarkError(
                f"{backend} names no mode",
                field="--backends",
                remedy=f"Choose one of {', '.join(filter(None, _MODES))}",
            )
    rows, keys = workload.random_rows, workload.random_keys
    if rows is not None and (keys or 0) <= rows and any(backend.endswith(":shadow") for backend in backends):
        raise BenchmarkError(
            "random weights say nothing about which keys mode shadow would read",
            field="--random-keys",
            remedy=f"Choose a number above {rows}, the value rows that a kv head reads",
        )
    drafts = any(_MODES[backend.partition(":")[2]].get("lossless") for backend in backends)
    for option, value in (("--draft-tokens", workload.draft_tokens), ("--acceptance", workload.acceptance)):
        if value is not None and not drafts:
            raise BenchmarkError(
                "none of the backends drafts", field=option, remedy="Add TOPTHETA:lossless to --backends"
            )
    if workload.acceptance is not None and rows is None:
        raise BenchmarkError(
            "a model's drafts are accepted or not",
            field="--acceptance",
            remedy="Leave it out, or give --random-rows",
        )

    times = {backend: BackendTimes(backend=backend, ms_per_token=[]) for backend in backends}
    for _ in range(rounds):
        for backend in backends:
            measured = _in_new_process(workload, backend)
            times[backend].ms_per_token += measured.ms_per_token
            times[backend].rows_read_share = measured.rows_read_share
            times[backend].keys_read_share = measured.keys_read_share
            times[backend].copies_read_share = measured.copies_read_share
            times[backend].accepted_share = measured.accepted_share
    # where they lie is nobody's business
    named = workload.model_copy(update={"model": Path(workload.model).name, "shadow_keys": None})
    return ServingReport(workload=named, device=_device(), vllm=version("vllm"), backends=list(times.values()))


def serving_table(report: ServingReport) -> Table:
    """The report as a table; a ratio above 1 is faster than the first backend."""
    from rich.table import Table

    work = report.workload
    table = Table(
        title=f"{work.batch_size} x {work.context} tokens, {work.output_tokens} generated",
        caption=f"{report.device}, vLLM {report.vllm}; median over {len(report.backends[0].ms_per_token)} batches",
    )
    for heading in (
        "backend",
        "ms / token",
        "min",
        "max",
        "tokens / s",
        "ratio",
        "value rows read %",
        "keys read %",
        "copies read %",
        "accepted %",
    ):
        table.add_column(heading, justify="left" if heading == "backend" else "right")
    for backend in report.backends:
        table.add_row(
            backend.backend,
            f"{backend.median:.2f}",
            f"{min(backend.ms_per_token):.2f}",
            f"{max(backend.ms_per_token):.2f}",
            f"{1000 * work.batch_size / backend.median:.1f}",
            f"{report.backends[0].median / backend.median:.3f}",
            *(
                "" if share is None else f"{100 * share:.1f}"
                for share in (
                    backend.rows_read_share,
                    backend.keys_read_share,
                    backend.copies_read_share,
                    backend.accepted_share,
                )
            ),
        )
    return table


def _in_new_process(workload: ServingWorkload, backend: str) -> BackendTimes:
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "times.json")
        process = subprocess.run(  # noqa: S603 - our own interpreter and module
            [sys.executable, "-m", __name__, workload.model_dump_json(), backend, str(result)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if process.returncode or not result.exists():
            raise BenchmarkError(
                f"the engine with backend {backend} failed; the end of its log:\n{process.stdout[-LOG_TAIL:]}"
            )
        return BackendTimes.model_validate_json(result.read_text())


def _measure(workload: ServingWorkload, backend: str) -> BackendTimes:
    """Start an engine in this process and time it."""
    from vllm import LLM, SamplingParams

    from vllm_toptheta.telemetry.reader import STATS_RPC
    from vllm_toptheta.telemetry.stats import merge

    is_dummy = workload.random_rows is not None
    name, _, mode = backend.partition(":")
    options = workload.options | _MODES[mode]
    has_copies = bool(options.get("shadow_values"))
    if options.get("lossless"):
        if workload.draft_tokens is not None:
            options["draft_tokens"] = workload.draft_tokens
        if workload.acceptance is not None:
            accept(workload.acceptance)
    if is_dummy:
        if has_copies:
            options["heavy"] = 1.0  # of keys that are all alike, none is
        # random weights lose far more mass than a model does, and a guard would read row after row for it
        options["guard"] = "warn"
    if mode == "shadow" and workload.shadow_keys is not None:
        options["thresholds"] = workload.shadow_keys
    engine = LLM(
        model=workload.model,
        attention_backend=name,
        additional_config={"toptheta": options} if options else {},
        dtype=workload.dtype,
        max_model_len=workload.context + workload.output_tokens + 1,
        # graphs are captured at multiples of 8 up to this; a batch between two sizes would run without a full graph
        max_num_seqs=-(-workload.batch_size // 8) * 8,
        enforce_eager=workload.enforce_eager,
        disable_log_stats=False,
        gpu_memory_utilization=workload.gpu_memory_utilization,
        load_format="dummy" if is_dummy else "auto",
        skip_tokenizer_init=is_dummy,
    )
    vocabulary = engine.llm_engine.model_config.get_vocab_size()
    # different prompts, so that no request shares another's cache; the same in every repeat, so that only the first
    # batch, which is not measured, has to compute them
    prompts = [
        {"prompt_token_ids": [(request * 7919 + index * 104729) % vocabulary for index in range(workload.context)]}
        for request in range(workload.batch_size)
    ]
    sampling = SamplingParams(
        temperature=0.0, max_tokens=workload.output_tokens, ignore_eos=True, detokenize=not is_dummy
    )
    if workload.random_rows is not None and any(engine.collective_rpc(STATS_RPC)):
        few_tokens = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True, detokenize=False)
        keep(
            engine,
            lambda: engine.generate(prompts, few_tokens, use_tqdm=False),
            rows=workload.random_rows,
            keys=workload.random_keys if mode == "shadow" else None,
            are_copies=has_copies,
        )
    times = []
    for repeat in range(1 + workload.repeats):
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        seconds = [output.metrics.last_token_ts - output.metrics.first_token_ts for output in outputs]
        if repeat:
            times.append(1000 * statistics.mean(seconds) / (workload.output_tokens - 1))
    ranks = [rank for rank in engine.collective_rpc(STATS_RPC) if rank is not None]
    stats = merge([ranks]) if ranks else None
    counts = {metric.name: getattr(metric, "value", 0) for metric in engine.get_metrics()}
    drafted, accepted = (counts.get(f"vllm:spec_decode_num_{name}_tokens", 0) for name in ("draft", "accepted"))
    return BackendTimes(
        backend=backend,
        ms_per_token=times,
        rows_read_share=None if stats is None else stats.rows_read_share,
        copies_read_share=None if stats is None else stats.copies_read_share,
        keys_read_share=None if stats is None else stats.keys_read_share,
        accepted_share=accepted / drafted if drafted else None,
    )


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return cpu_name()


if __name__ == "__main__":
    Path(sys.argv[3]).write_text(
        _measure(ServingWorkload.model_validate_json(sys.argv[1]), sys.argv[2]).model_dump_json()
    )
