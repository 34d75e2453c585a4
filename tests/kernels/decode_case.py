"""Random decode steps on a paged cache, and what the reference makes of them.

Each head's threshold is moved into a gap between its scores, wide against rounding, and kernel and reference must agree
on every survivor before their outputs are compared.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from tests.kernels.gaps import in_a_gap
from tests.kernels.simt.build import EmulatedKernel, build
from vllm_toptheta.kernels.codec import tier_bytes
from vllm_toptheta.kernels.contract import (
    NUM_COEFFICIENTS,
    Counters,
    DecodeStep,
    Layer,
    LayerCache,
    LayerCall,
    LayerThresholds,
    ShadowLayer,
    TailStep,
    TierLayer,
)
from vllm_toptheta.kernels.gpu.cuda import value_split
from vllm_toptheta.kernels.gpu.cuda.loading import SOURCE_FOLDER
from vllm_toptheta.kernels.gpu.cuda.tier_split import TierLoader
from vllm_toptheta.kernels.gpu.cuda.value_split import ValueLoader, ValueSizes
from vllm_toptheta.kernels.gpu.scratch import Scratch, Sizes
from vllm_toptheta.kernels.gpu.tails import write_tails
from vllm_toptheta.kernels.gpu.tuning import LaunchConfig
from vllm_toptheta.kernels.gpu.values import decode
from vllm_toptheta.kernels.pages import padded_page_bytes, value_sum_view
from vllm_toptheta.reference import (
    Compensation,
    anchor_lse,
    causal_scores,
    dense_attention,
    gather_sequence,
    top_theta_attention,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
RUNS_HERE = INTERPRETED or torch.cuda.is_available()
WHY_NOT = "needs a GPU, or Triton's interpreter (tests/interpreter.py)"
MARKS = [
    pytest.mark.skipif(not RUNS_HERE, reason=WHY_NOT),
    # of a key that survives, which is selected away
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),
]

INNER_EDGES = [2.0**-exponent for exponent in range(9, 0, -1)]  # of the lost mass's histogram


def loader_of(shape: Shape) -> ValueLoader | None:
    """What loads the kernel that reads keys and values; that in Triton is taken by default."""
    return None


def cuda_loader(shape: Shape) -> ValueLoader | None:
    """Loads the kernel in CUDA C++: on the device, or emulated where there is none; None where it is not made for."""
    group = shape.num_heads // shape.num_kv_heads
    if not value_split.is_made_for(shape.head_size, group, (shape.kv_dtype or shape.dtype).itemsize):
        return None
    if DEVICE == "cuda":
        return value_split.loader_for(torch.device("cuda", torch.cuda.current_device()), shape.head_size, group)
    return ValueLoader(emulated, ValueSizes.of(shape.head_size, group))


def emulated(file: str, name: str, macros: tuple[str, ...], shared_bytes: int) -> EmulatedKernel:
    """What the emulator makes of a kernel's source."""
    return build(SOURCE_FOLDER / file, name, dict(macro.split("=") for macro in macros))


@dataclass(frozen=True)
class Shape:
    """A decode step; lengths of 0 are padding rows."""

    lens: tuple[int, ...]
    num_heads: int = 4
    num_kv_heads: int = 2
    head_size: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.float16
    kv_dtype: torch.dtype | None = None
    query_dtype: torch.dtype | None = None
    layout: str = "NHD"
    soft_cap: float | None = None
    exact: bool = True
    value_mean: bool = True
    degree: int = 0  # of the thresholds in ln n
    slope: float = 0.0  # of the thresholds over the anchors' log-sum-exp
    max_dense_len: int = 0
    target_k: int = 20
    num_channels: int = 0  # of shadow keys
    has_copies: bool = False
    has_sinks: bool = False
    seed: int = 0

    @property
    def code_bytes(self) -> int:
        return tier_bytes(self.head_size) if self.has_copies else self.num_channels // 2


@dataclass
class Case:
    """The tensors of a step, on the device."""

    shape: Shape
    query: torch.Tensor
    kv_cache: torch.Tensor
    value_sum: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    coefficients: torch.Tensor
    scales: tuple[torch.Tensor, torch.Tensor] | None  # of keys and values
    q_scale: torch.Tensor | None

    @property
    def softmax_scale(self) -> float:
        return self.shape.head_size**-0.5

    def set_threshold(self, threshold: float) -> None:
        """The same for every head and length."""
        self.coefficients.zero_()
        self.coefficients[:, 0] = threshold

    @property
    def sinks(self) -> torch.Tensor | None:
        """[num_heads], some next to nothing and some more than most keys together, as a model's parameter."""
        shape = self.shape
        return torch.linspace(-3.0, 5.0, shape.num_heads, device=DEVICE).to(shape.dtype) if shape.has_sinks else None

    @property
    def length_range(self) -> tuple[int, int]:
        return 32, 40_000

    def run(
        self, config: LaunchConfig | None = None, scratch: Scratch | None = None, **options: Any
    ) -> tuple[torch.Tensor, Counters]:
        """Output and counters of the kernel, whose memory starts out as NaN."""
        if scratch is None:
            scratch = self.scratch(config)
            for buffer in scratch[2:]:
                buffer.view(torch.int32).fill_(0x7FFF_FFFF)  # NaN
        counters = Counters.allocate(self.shape.num_heads, self.shape.num_kv_heads, DEVICE)
        output = torch.full_like(self.query, torch.nan, dtype=self.shape.dtype)
        decode(*self.records(**({"output": output, "counters": counters} | options)), scratch)
        return output, counters

    def scratch(self, config: LaunchConfig | None = None, *, loader: ValueLoader | None = None) -> Scratch:
        """One for this step, and for the kernel that `loader` loads, or else the one of `loader_of`."""
        shape = self.shape
        sizes = Sizes(len(shape.lens), shape.num_heads, shape.num_kv_heads, shape.head_size)
        loader = loader or loader_of(shape)
        return Scratch.allocate(sizes, kv_dtype=self.kv_cache.dtype, device=DEVICE, config=config, loader=loader)

    def records(
        self,
        output: torch.Tensor,
        *,
        counters: Counters | None = None,
        coefficients: torch.Tensor | None = None,
        threshold_offset: torch.Tensor | None = None,
        max_dense_len: int | None = None,
        min_step_tokens: int = 0,
        head_programs: torch.Tensor | None = None,
        shadow: ShadowLayer | None = None,
        tiers: TierLayer | None = None,
        codes: torch.Tensor | None = None,
    ) -> tuple[DecodeStep, LayerCall]:
        """What the kernels take, by default by this case's own thresholds."""
        shape = self.shape
        coefficients = self.coefficients if coefficients is None else coefficients
        step = DecodeStep(
            self.block_table,
            self.seq_lens,
            max_dense_len=shape.max_dense_len if max_dense_len is None else max_dense_len,
            min_step_tokens=min_step_tokens,
            length_range=self.length_range,
            threshold_offset=threshold_offset,
        )
        layer = Layer(
            self.softmax_scale,
            shape.soft_cap,
            denominator_compensation=shape.exact,
            value_mean_compensation=shape.value_mean,
            thresholds=LayerThresholds(coefficients, is_relative=shape.slope != 0),
            shadow=shadow,
            tiers=tiers,
            counters=counters,
            sinks=self.sinks,
            head_programs=head_programs,
        )
        return step, LayerCall(self.query, output, self.cache(codes), layer, self.q_scale)

    def cache(self, codes: torch.Tensor | None = None) -> LayerCache:
        """The pages and their tails."""
        value_sum = self.value_sum if self.shape.value_mean else None
        return LayerCache(self.kv_cache, value_sum, codes, *(self.scales or (None, None)))

    def write_tails(
        self,
        before: list[int],
        after: list[int],
        shadow: ShadowLayer | None = None,
        codes: torch.Tensor | None = None,
        tiers: TierLayer | None = None,
        loader: TierLoader | None = None,
    ) -> None:
        """Write the tails of a step in which the sequences grow from `before` to `after`."""
        lens = torch.tensor(after, dtype=torch.int32, device=DEVICE)
        query_lens = [end - start for start, end in zip(before, after, strict=True)]
        starts = torch.tensor([0, *query_lens], device=DEVICE).cumsum(0).int()
        step = TailStep(self.block_table, lens, starts, max(query_lens))
        write_tails(step, self.cache(codes), Layer(self.softmax_scale, shadow=shadow, tiers=tiers), loader)

    def new_query(self, row: int) -> torch.Tensor:
        """Query of a sequence, [1, num_heads, head_size] float32, scale applied."""
        query = self.query[row : row + 1].float()
        return query if self.q_scale is None else query * self.q_scale

    def sequence(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a sequence, float32, scales applied."""
        cache = self.kv_cache
        if cache.dtype.itemsize == 1:  # float8 cannot be indexed
            cache = cache.view(torch.uint8)
        key, value = gather_sequence(cache, self.block_table[row], int(self.seq_lens[row]))
        key, value = (tensor.contiguous().view(self.kv_cache.dtype).float() for tensor in (key, value))
        if self.scales is not None:
            key, value = key * self.scales[0], value * self.scales[1]
        return key, value


def make_case(shape: Shape, threshold: float | None = None) -> Case:
    """Fill a cache of permuted pages whose unwritten memory, block 0 included, is NaN; None places the thresholds."""
    generator = torch.Generator(DEVICE).manual_seed(shape.seed)
    group_shape = shape.num_kv_heads, shape.block_size, 2 * shape.head_size
    kv_dtype = shape.kv_dtype or shape.dtype
    width = max(1, *(-(-length // shape.block_size) for length in shape.lens)) + 1
    num_blocks = 1 + sum(-(-length // shape.block_size) for length in shape.lens)
    content = group_shape[0] * group_shape[1] * group_shape[2]
    code_bytes = group_shape[0] * group_shape[1] * shape.code_bytes
    page = padded_page_bytes(content * kv_dtype.itemsize, shape.num_kv_heads, shape.head_size, code_bytes=code_bytes)
    stride = page // kv_dtype.itemsize
    memory = torch.full((num_blocks * stride,), torch.nan, dtype=torch.float32, device=DEVICE).to(kv_dtype)
    inner = {
        "NHD": (group_shape[2], group_shape[0] * group_shape[2]),
        "HND": (content // group_shape[0], group_shape[2]),
    }
    kv_cache = memory.as_strided((num_blocks, *group_shape), (stride, *inner[shape.layout], 1))
    value_sum = value_sum_view(kv_cache)
    value_sum.fill_(torch.nan)

    order = (torch.randperm(num_blocks - 1, generator=generator, device=DEVICE) + 1).int()
    block_table = torch.full((len(shape.lens), width), 2**31 - 1, dtype=torch.int32, device=DEVICE)
    first = 0
    for row, length in enumerate(shape.lens):
        num_pages = -(-length // shape.block_size)
        block_table[row, :num_pages] = order[first : first + num_pages]
        first += num_pages
        tokens = torch.randn(length, shape.num_kv_heads, 2 * shape.head_size, generator=generator, device=DEVICE)
        pages = torch.full((num_pages * shape.block_size, *tokens.shape[1:]), torch.nan, device=DEVICE)
        pages[:length] = tokens
        blocks = block_table[row, :num_pages].long()
        stored = pages.view(num_pages, shape.block_size, *tokens.shape[1:]).transpose(1, 2).to(kv_dtype)
        kv_cache.view(_storable(kv_dtype))[blocks] = stored.view(_storable(kv_dtype))
        # the tail of a page that this step's token fills is still to be written
        num_closed = max(0, length - 1) // shape.block_size
        sums = stored[:num_closed, ..., shape.head_size :].float().sum(2).cumsum(0)
        value_sum[blocks[:num_closed]] = sums
    query = torch.randn(len(shape.lens), shape.num_heads, shape.head_size, generator=generator, device=DEVICE)
    scales = None
    if kv_dtype.itemsize == 1:
        scales = torch.tensor([0.7], device=DEVICE), torch.tensor([1.3], device=DEVICE)
    case = Case(
        shape,
        query.to(shape.query_dtype or shape.dtype),
        kv_cache,
        value_sum,
        block_table,
        torch.tensor(shape.lens, dtype=torch.int32, device=DEVICE),
        torch.zeros(shape.num_heads, NUM_COEFFICIENTS, device=DEVICE),
        scales,
        None if shape.query_dtype is None else torch.tensor(0.6, device=DEVICE),
    )
    if threshold is None:
        place_thresholds(case, generator)
    else:
        case.set_threshold(threshold)
    return case


def reference(case: Case, row: int, **changes: Any) -> Any:
    """The reference's result for a sequence, float32."""
    shape = replace(case.shape, **changes)
    key, value = case.sequence(row)
    query = case.new_query(row)
    options = {"softmax_scale": case.softmax_scale, "logits_soft_cap": shape.soft_cap, "sinks": case.sinks}
    if shape.lens[row] <= shape.max_dense_len:
        return dense_attention(query, key, value, **options)
    return top_theta_attention(
        query,
        key,
        value,
        threshold=thresholds(case)[row : row + 1],
        target_k=0,
        compensation=Compensation("exact" if shape.exact else "none", shape.value_mean),
        **options,
    )


def check(case: Case, output: torch.Tensor, counters: Counters) -> None:
    """Compare with the reference: rows read exactly, lost mass, then the output."""
    shape = case.shape
    rows_read = torch.zeros(shape.num_kv_heads, dtype=torch.int64, device=DEVICE)
    lost_mass = torch.zeros(shape.num_heads, dtype=torch.float64, device=DEVICE)
    histogram = torch.zeros_like(counters.lost_mass_histogram)
    at_an_edge = torch.zeros_like(lost_mass, dtype=torch.int64)
    worst = allowed = 0.0
    for row, length in enumerate(shape.lens):
        if length == 0:
            assert not output[row].any()
            continue
        result = reference(case, row)
        survivors = result.survivors[0].view(shape.num_kv_heads, -1, length).any(1)
        is_dense = length <= shape.max_dense_len
        if shape.value_mean and not is_dense:  # the open page is read for the mean
            survivors[:, length // shape.block_size * shape.block_size :] = True
        rows_read += survivors.sum(1)
        lost = reference(case, row, exact=True).lost_mass[0]
        lost_mass += lost
        if not is_dense:
            edges = torch.tensor(INNER_EDGES, device=DEVICE)
            at_an_edge += ((lost[:, None] / edges - 1).abs() < 1e-3).any(dim=1)
            histogram.scatter_add_(1, torch.bucketize(lost, edges)[:, None], torch.ones_like(histogram[:, :1]))
        assert bool(output[row].isfinite().all()), f"the output of sequence {row} is not finite"
        worst = max(worst, float((output[row].float() - result.output[0]).abs().max()))
        allowed = max(allowed, 2 * error_of_dtype(case, row, result))
    assert counters.value_rows_read.tolist() == rows_read.tolist()
    # weights may be summed as they are rounded
    rounded = 1e-3 if shape.dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(counters.lost_mass, lost_mass, rtol=rounded, atol=rounded / 10 * len(shape.lens))
    # rounding may move what lies at an edge from one bucket to the next
    misplaced = (counters.lost_mass_histogram - histogram).abs().sum(dim=1)
    assert bool((misplaced <= 2 * at_an_edge).all()), (misplaced, at_an_edge)
    assert counters.lost_mass_histogram.sum(dim=1).tolist() == histogram.sum(dim=1).tolist()
    assert counters.totals.tolist() == [
        sum(length > 0 for length in shape.lens),
        sum(0 < length <= shape.max_dense_len for length in shape.lens),
        sum(shape.lens),
        1,
        0,
    ]
    assert worst <= allowed + 1e-3, f"error {worst}, allowed {allowed} + 1e-3"
    if shape.value_mean:
        check_closed_pages(case)


def check_closed_pages(case: Case) -> None:
    """The tail of every full page is the sum of the values up to its end."""
    block_size = case.shape.block_size
    for row, length in enumerate(case.shape.lens):
        num_full = length // block_size
        if not num_full:
            continue
        _, value = replace(case, scales=None).sequence(row)
        sums = value[: num_full * block_size].unflatten(0, (num_full, block_size)).sum(1).cumsum(0)
        stored = case.value_sum[case.block_table[row, :num_full].long()]
        torch.testing.assert_close(stored, sums, rtol=1e-4, atol=1e-2)


def _storable(dtype: torch.dtype) -> torch.dtype:
    """float8 tensors cannot be indexed; their bytes can."""
    return torch.uint8 if dtype.itemsize == 1 else dtype


def thresholds(case: Case) -> torch.Tensor:
    """[num_seqs, num_heads] float32."""
    calibrated = (1, 2**31 - 1) if case.shape.slope else case.length_range
    log_lengths = case.seq_lens.clamp(*calibrated).double().log()
    *terms, slope = case.coefficients.double().unbind(dim=1)
    theta = log_lengths[:, None] ** torch.arange(len(terms), device=DEVICE) @ torch.stack(terms)
    for row, length in enumerate(case.shape.lens if case.shape.slope else ()):
        if length > case.shape.max_dense_len:
            scores = scores_of(case, row)[None].double()
            theta[row] += slope * anchor_lse(scores, case.seq_lens[row : row + 1], sinks=case.sinks)[0]
    return theta.float()


def scores_of(case: Case, row: int) -> torch.Tensor:
    """Scores of a sequence's new token, [num_heads, seq_len] float32."""
    key, _ = case.sequence(row)
    options = {"softmax_scale": case.softmax_scale, "logits_soft_cap": case.shape.soft_cap}
    return causal_scores(case.new_query(row), key, **options)[0]


def place_thresholds(case: Case, generator: torch.Generator) -> None:
    """Choose coefficients whose constant term lies in a gap of all the scores that a head will compare with it."""
    shape = case.shape
    curves = 0.02 * torch.randn(shape.num_heads, shape.degree, generator=generator, device=DEVICE)
    case.coefficients[:, 1 : 1 + shape.degree] = curves
    case.coefficients[:, 3] = shape.slope
    offsets = thresholds(case)
    rows = [row for row, length in enumerate(shape.lens) if length > shape.max_dense_len]
    if rows:
        scores = [scores_of(case, row) - offsets[row][:, None] for row in rows]
        case.coefficients[:, 0] = in_a_gap(scores, shape.target_k)


def error_of_dtype(case: Case, row: int, result: Any) -> float:
    """What PyTorch itself errs by when it multiplies weights and values in the query's dtype."""
    shape = case.shape
    key, value = case.sequence(row)
    scores = causal_scores(case.new_query(row), key, softmax_scale=case.softmax_scale, logits_soft_cap=shape.soft_cap)[
        0
    ]
    weights = scores.exp().div(scores.exp().sum(-1, keepdim=True)) * result.survivors[0]
    if not shape.exact:
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    value = value.repeat_interleave(shape.num_heads // shape.num_kv_heads, dim=1)
    rough = torch.einsum("hn,nhd->hd", weights.to(shape.dtype), value.to(shape.dtype)).float()
    exact = torch.einsum("hn,nhd->hd", weights, value)
    rounded = result.output[0].to(shape.dtype).float()
    return float((rough - exact).abs().max() + (rounded - result.output[0]).abs().max())
