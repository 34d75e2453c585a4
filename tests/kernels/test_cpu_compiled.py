"""What Numba compiles: bits that do not depend on threads, exponentials, and where it is not used."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tests.kernels.cpu_case import decode
from tests.kernels.paged import PagedSequences
from vllm_toptheta.kernels.contract import Counters, DecodeStep, Layer, LayerCache, LayerCall, LayerThresholds
from vllm_toptheta.kernels.cpu import compiled, decode_step, numba_decode, values
from vllm_toptheta.kernels.cpu.batch import prepare_decode
from vllm_toptheta.kernels.cpu.scratch import CpuScratch


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def paged() -> PagedSequences:
    lens = [700, 1, 300, 2_000]
    generator = torch.Generator().manual_seed(0)
    made = PagedSequences.allocate(
        lens, num_kv_heads=3, head_size=64, block_size=16, dtype=torch.bfloat16, generator=generator
    )
    made.append(lens, generator)
    return made


def test_threads_change_no_bit(paged: PagedSequences, threads: None) -> None:
    query = 4 * torch.randn(4, 9, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = []
    for number in (1, 2):
        torch.set_num_threads(number)
        found.append(decode(query, paged, torch.zeros(9), slope=1.0, log_slope=-1.0, max_dense_len=144))
    for one, other in zip(*found, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    assert 0 < float(found[0].lost_mass.max()) < 1


def test_torch_keeps_its_number_of_threads() -> None:
    # in a process whose threads Numba has not started yet
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "from vllm_toptheta.kernels.cpu import compiled\n"
        "compiled.warm_up(torch.bfloat16)\n"
        "import numba; print(torch.get_num_threads(), numba.get_num_threads())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1 1\n"


def test_a_window_sees_what_torch_operations_see(paged: PagedSequences, monkeypatch: pytest.MonkeyPatch) -> None:
    query = torch.randn(4, 9, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    ours = decode(query, paged, None, sliding_window=90)
    monkeypatch.setattr(values, "compiled_for", lambda *cache: None)
    theirs = decode(query, paged, None, sliding_window=90)
    torch.testing.assert_close(ours.output, theirs.output, rtol=1e-4, atol=2e-5)
    assert ours.value_rows_read.tolist() == theirs.value_rows_read.tolist()
    assert ours.keys_read.tolist() == theirs.keys_read.tolist() == [[90] * 3, [1] * 3, [90] * 3, [90] * 3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_output_is_rounded_as_torch_rounds(paged: PagedSequences, dtype: torch.dtype) -> None:
    query = torch.randn(4, 9, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    layer, step = Layer(0.125), prepare_decode(DecodeStep(paged.block_table, paged.seq_lens.int()), 16)
    cache = LayerCache(paged.kv_cache)
    # every other row, so that it is not dense
    exact, rounded = torch.empty(4, 9, 64), torch.empty(8, 9, 64, dtype=dtype)[::2]
    for output in (exact, rounded):
        compiled.decode(step.prepared, LayerCall(query, output, cache, layer), CpuScratch())
    assert torch.equal(rounded, exact.to(dtype))
    assert not torch.equal(rounded.float(), exact)
    query[0, 0, 0] = torch.nan
    compiled.decode(step.prepared, LayerCall(query, rounded, cache, layer), CpuScratch())
    assert bool(rounded[0, 0].isnan().all())
    assert not bool(rounded[1:].isnan().any())


@pytest.mark.parametrize("window", [None, 90])
def test_counters_are_those_of_torch_operations(
    paged: PagedSequences, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    query = 4 * torch.randn(4, 9, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    coefficients = torch.tensor([[0.0, 0.0, 0.0, 0.6]]).repeat(9, 1)
    thresholds = LayerThresholds(coefficients, is_relative=True) if window is None else None
    offset = torch.tensor([0.0, 0.0, -1.0, 0.0])
    decoding = DecodeStep(paged.block_table, paged.seq_lens.int(), max_dense_len=144, threshold_offset=offset)
    step, found = prepare_decode(decoding, 16), []
    for _ in range(2):
        counters, scratch = Counters.allocate(9, 3, counts_keys=True), CpuScratch()
        layer = Layer(0.125, sliding_window=window, thresholds=thresholds, counters=counters)
        for _ in range(2):
            decode_step.decode(
                step, LayerCall(query, torch.empty(4, 9, 64), LayerCache.of(paged.kv_cache, layer), layer), scratch
            )
        scratch.settle(counters)
        found.append(counters)
        monkeypatch.setattr(values, "compiled_for", lambda *cache: None)
    ours, theirs = found
    torch.testing.assert_close(ours.lost_mass, theirs.lost_mass, rtol=1e-4, atol=1e-5)
    for name in ("value_rows_read", "keys_read", "lost_mass_histogram", "totals"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    if window is None:
        assert ours.lost_mass_histogram.sum(dim=1).tolist() == [4] * 9
        assert float(ours.lost_mass.min()) > 0


def test_exponentials() -> None:
    for x in (0.0, -1e-7, -0.1, -0.34657, -0.34658, -1.0, -10.3, -50.0, -86.0):
        assert numba_decode._exp(np.float32(x)) == pytest.approx(math.exp(np.float32(x)), rel=5e-7)
    assert numba_decode._exp(np.float32(-200.0)) == numba_decode._exp(np.float32(-np.inf)) == 0


def test_other_caches_and_no_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    values.compiled_for.cache_clear()
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        assert values.compiled_for(dtype, 64, 16) is compiled
    assert values.compiled_for(torch.float8_e4m3fn, 64, 16) is None
    assert values.compiled_for(torch.bfloat16, 40, 16) is values.compiled_for(torch.bfloat16, 64, 24) is None
    values.compiled_for.cache_clear()
    monkeypatch.setitem(sys.modules, "vllm_toptheta.kernels.cpu.compiled", None)
    assert values.compiled_for(torch.bfloat16, 64, 16) is None
    values.compiled_for.cache_clear()


def test_where_nothing_can_be_kept_it_is_compiled_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(function: object, **options: object) -> str:
        if options.pop("cache", False):
            raise RuntimeError("cannot cache function: no locator available")
        return f"compiled with {options}"

    monkeypatch.setattr(numba_decode, "njit", refuse)
    assert numba_decode._compiled(len) == f"compiled with {{'parallel': True, 'fastmath': {numba_decode._FAST}}}"


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_size", "block_size"),
    [(9, 3, 64, 32), (10, 1, 48, 16), (34, 2, 96, 48), (2, 2, 16, 128), (8, 1, 256, 32)],
    ids=["two vectors", "one more than are summed at once", "three turns", "no group", "wide heads"],
)
def test_shapes_equal_torch_operations(
    dtype: torch.dtype,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    block_size: int,
    has_sinks: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lens = [1_100, 3, 200, 512, 513]
    generator = torch.Generator().manual_seed(0)
    paged = PagedSequences.allocate(
        lens, num_kv_heads=num_kv_heads, head_size=head_size, block_size=block_size, dtype=dtype, generator=generator
    )
    paged.append(lens, generator)
    query = 3 * torch.randn(len(lens), num_heads, head_size, generator=generator).to(dtype)
    options: dict[str, Any] = {"slope": 1.0, "log_slope": -1.0, "max_dense_len": 144, "logits_soft_cap": 20.0}
    options["sinks"] = torch.linspace(-2.0, 8.0, num_heads, dtype=dtype) if has_sinks else None
    ours = decode(query, paged, torch.zeros(num_heads), **options)
    monkeypatch.setattr(values, "compiled_for", lambda *cache: None)
    theirs = decode(query, paged, torch.zeros(num_heads), **options)
    torch.testing.assert_close(ours.output, theirs.output, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours.lost_mass, theirs.lost_mass, rtol=1e-3, atol=1e-4)
    # a score at its threshold may fall on either side
    assert (ours.value_rows_read - theirs.value_rows_read).abs().max() <= 1
    assert 0 < int(ours.value_rows_read[0].sum()) < lens[0] * num_kv_heads
