"""The CPU kernels against the fp32 reference, on permuted pages with NaN in every slot that was not written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.cpu_case import decode
from tests.kernels.gaps import in_a_gap
from tests.kernels.paged import PagedSequences
from vllm_toptheta.kernels.cpu import values
from vllm_toptheta.kernels.cpu.cache import write_kv
from vllm_toptheta.limits import NUM_ANCHORS
from vllm_toptheta.reference import (
    Compensation,
    causal_scores,
    dense_attention,
    gather_sequence,
    relative_threshold,
    top_theta_attention,
)

# (num_heads, num_kv_heads, head_size)
SHAPES = {"mha": (2, 2, 64), "gqa 3": (9, 3, 64), "gqa 8": (8, 1, 80)}
# accumulation order differs between the kernel and the reference
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture(autouse=True, params=["compiled", "torch"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What decodes: Numba's code, or torch operations as where there is none."""
    name: str = request.param
    if name == "torch":
        monkeypatch.setattr(values, "compiled_for", lambda *cache: None)
    return name


def sequences(lens: list[int], shape: str, block_size: int, dtype: torch.dtype, seed: int = 42) -> Any:
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads, head_size = SHAPES[shape]
    paged = PagedSequences.allocate(
        lens,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        block_size=block_size,
        dtype=dtype,
        generator=generator,
    )
    paged.append(lens, generator)
    query = torch.randn(len(lens), num_heads, head_size, generator=generator).to(dtype)
    return paged, query


def threshold_between_scores(
    paged: PagedSequences, query: torch.Tensor, target_k: int, soft_cap: float | None
) -> torch.Tensor:
    """[num_heads], which about `target_k` scores of every sequence reach."""
    return in_a_gap([scores_of(paged, query, row, soft_cap) for row in range(len(query))], target_k)


def scores_of(paged: PagedSequences, query: torch.Tensor, row: int, soft_cap: float | None) -> torch.Tensor:
    """Scores of a sequence's new token, [num_heads, seq_len]."""
    key, _ = gather_sequence(paged.interleaved, paged.block_table[row], int(paged.seq_lens[row]))
    scale = query.shape[-1] ** -0.5
    return causal_scores(query[row : row + 1], key, softmax_scale=scale, logits_soft_cap=soft_cap)[0]


@pytest.mark.parametrize("compensation", ["sdc+vmc", "sdc", "none", "vmc"])
@pytest.mark.parametrize("soft_cap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [16, 32, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_decode(shape: str, block_size: int, dtype: torch.dtype, soft_cap: float | None, compensation: str) -> None:
    paged, query = sequences([1, 16, 63, 200, 129], shape, block_size, dtype)
    threshold = threshold_between_scores(paged, query, 20, soft_cap)
    scale = query.shape[-1] ** -0.5
    exact, value_mean = "sdc" in compensation, "vmc" in compensation
    result = decode(
        query, paged, threshold, logits_soft_cap=soft_cap, denominator_compensation=exact, value_mean=value_mean
    )
    for row, length in enumerate(paged.seq_lens.tolist()):
        key, value = gather_sequence(paged.interleaved, paged.block_table[row], length)
        expected = top_theta_attention(
            query[row : row + 1],
            key,
            value,
            threshold=threshold,
            target_k=0,
            softmax_scale=scale,
            logits_soft_cap=soft_cap,
            compensation=Compensation("exact" if exact else "none", value_mean),
        )
        torch.testing.assert_close(result.output[row : row + 1], expected.output, **TOLERANCE)
        survivors = expected.survivors[0].view(*expected.value_rows_read.shape[1:], -1, length).any(1)
        if value_mean:  # the open page is read for the mean
            survivors[:, length // block_size * block_size :] = True
        assert result.value_rows_read[row].tolist() == survivors.sum(1).tolist()
        if exact:
            torch.testing.assert_close(result.lost_mass[row : row + 1], expected.lost_mass, **TOLERANCE)


@pytest.mark.parametrize("soft_cap", [None, 5.0])
@pytest.mark.parametrize(("shape", "weight_floor"), [("mha", 0.5), ("gqa 3", 3.0), ("gqa 8", 20.0)])
def test_relative_thresholds_keep_every_key_of_the_floor_s_weight(
    shape: str, weight_floor: float, soft_cap: float | None
) -> None:
    paged, query = sequences([144, 145, 200, 700], shape, 16, torch.float32)
    query *= 4.0  # scores of the size of a real model's
    num_keys = paged.seq_lens
    # ln n as the sequence's offset, since the step has one coefficient for all lengths
    offset = -num_keys.float().log()
    result = decode(
        query,
        paged,
        torch.full(query.shape[1:2], weight_floor).log(),
        slope=1.0,
        max_dense_len=NUM_ANCHORS,
        threshold_offset=offset,
        logits_soft_cap=soft_cap,
        value_mean=False,
    )
    for row, length in enumerate(num_keys.tolist()):
        scores = scores_of(paged, query, row, soft_cap)
        theta = relative_threshold(scores[None], num_keys[row : row + 1], weight_floor)[0]
        kept = scores >= theta[:, None] if length > NUM_ANCHORS else torch.ones_like(scores, dtype=torch.bool)
        assert bool(kept[scores.softmax(dim=1) >= weight_floor / length * (1 + 1e-5)].all())
        lost = scores.softmax(dim=1).where(~kept, 0.0).sum(dim=1)
        torch.testing.assert_close(result.lost_mass[row], lost, rtol=1e-3, atol=1e-5)
        read = kept.unflatten(0, (paged.kv_cache.shape[1], -1)).any(dim=1).sum(dim=1)
        assert int((result.value_rows_read[row] - read).abs().max()) <= 1  # a score at the threshold itself
        assert length > NUM_ANCHORS or int(result.value_rows_read[row].min()) == length


@pytest.mark.parametrize("threshold", [None, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_that_keeps_everything_is_dense(threshold: float | None, dtype: torch.dtype) -> None:
    paged, query = sequences([1, 31, 32, 100], "gqa 3", 32, dtype)
    limit = None if threshold is None else torch.full(query.shape[1:2], threshold)
    result = decode(query, paged, limit)
    for row, length in enumerate(paged.seq_lens.tolist()):
        key, value = gather_sequence(paged.interleaved, paged.block_table[row], length)
        expected = dense_attention(query[row : row + 1], key, value, softmax_scale=0.125)
        torch.testing.assert_close(result.output[row : row + 1], expected.output, **TOLERANCE)
    assert result.value_rows_read.tolist() == [[length] * 3 for length in paged.seq_lens.tolist()]
    assert result.lost_mass.max() < 1e-6


@pytest.mark.parametrize("exact", [True, False])
def test_decode_without_survivors_is_the_mean_value(exact: bool) -> None:
    paged, query = sequences([5, 48, 90], "gqa 3", 16, torch.float32)
    result = decode(query, paged, torch.full(query.shape[1:2], torch.inf), denominator_compensation=exact)
    for row, length in enumerate(paged.seq_lens.tolist()):
        _, value = gather_sequence(paged.interleaved, paged.block_table[row], length)
        expected = value.mean(0).repeat_interleave(3, dim=0)
        torch.testing.assert_close(result.output[row], expected, **TOLERANCE)
    assert bool((result.lost_mass == 1).all())
    assert result.value_rows_read[:, 0].tolist() == [5, 0, 10]  # only the open page, for the mean


def test_decode_in_a_sliding_window_reads_nothing_outside() -> None:
    window = 20
    paged, query = sequences([7, 20, 75], "gqa 3", 16, torch.float32)
    result = decode(query, paged, None, sliding_window=window)
    for row, length in enumerate(paged.seq_lens.tolist()):
        key, value = gather_sequence(paged.interleaved, paged.block_table[row], length)
        expected = top_theta_attention(
            query[row : row + 1],
            key[-window:],
            value[-window:],
            threshold=-torch.inf,
            target_k=0,
            softmax_scale=0.125,
            compensation=Compensation(value_mean=False),
        )
        torch.testing.assert_close(result.output[row : row + 1], expected.output, **TOLERANCE)
        assert result.value_rows_read[row].tolist() == expected.value_rows_read[0].tolist()


def test_padding_slots_are_not_written() -> None:
    paged, _ = sequences([16], "mha", 16, torch.float32)
    before = paged.interleaved
    key = torch.ones(3, 2, 64)
    write_kv(key, key, paged.kv_cache, torch.tensor([-1, 16 * int(paged.block_table[0, 0]) + 5, -1]))
    changed = ~torch.isclose(before, paged.interleaved, equal_nan=True)
    assert changed.nonzero()[:, [0, 2]].unique(dim=0).tolist() == [[int(paged.block_table[0, 0]), 5]]


@settings(deadline=None, max_examples=60, derandomize=True, database=None)
@given(
    steps=st.lists(st.lists(st.integers(0, 40), min_size=3, max_size=3), min_size=1, max_size=6),
    block_size=st.sampled_from([16, 32]),
)
def test_value_sums_do_not_depend_on_how_the_tokens_came(steps: list[list[int]], block_size: int) -> None:
    generator = torch.Generator().manual_seed(3)
    totals = torch.tensor(steps).cumsum(0)
    paged = PagedSequences.allocate(
        [max(1, length) for length in totals[-1].tolist()],
        num_kv_heads=2,
        head_size=64,
        block_size=block_size,
        dtype=torch.bfloat16,
        generator=generator,
    )
    for lens in totals.tolist():
        if paged.seq_lens.tolist() != lens:
            paged.append(lens, generator)
    for row, length in enumerate(paged.seq_lens.tolist()):
        _, value = gather_sequence(paged.interleaved, paged.block_table[row], length)
        for page in range(length // block_size):
            expected = value[: (page + 1) * block_size].float().sum(0)
            actual = paged.value_sum[paged.block_table[row, page]]
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


def test_closing_a_page_twice_changes_nothing() -> None:
    paged, _ = sequences([64], "mha", 16, torch.float32)
    before = paged.value_sum.clone()
    paged.write_tails(torch.tensor([40]))
    torch.testing.assert_close(paged.value_sum, before, rtol=1e-6, atol=1e-6, equal_nan=True)
