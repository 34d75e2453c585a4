"""The CPU kernels against the fp32 reference, on permuted pages with NaN in every slot that was not written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.cpu_case import decode
from tests.kernels.paged import PagedSequences
from vllm_toptheta.kernels.cpu.cache import write_kv
from vllm_toptheta.reference import Compensation, causal_scores, dense_attention, gather_sequence, top_theta_attention

# (num_heads, num_kv_heads, head_size)
SHAPES = {"mha": (2, 2, 64), "gqa 3": (9, 3, 64), "gqa 8": (8, 1, 80)}
# accumulation order differs between the kernel and the reference
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}


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
    """[num_seqs, num_heads]: halfway between the k-th and the next score, so that rounding moves no survivor."""
    rows = []
    for row, length in enumerate(paged.seq_lens.tolist()):
        key, _ = gather_sequence(paged.interleaved, paged.block_table[row], length)
        scale = query.shape[-1] ** -0.5
        scores = causal_scores(query[row : row + 1], key, softmax_scale=scale, logits_soft_cap=soft_cap)[0]
        ranked = scores.sort(dim=-1, descending=True).values
        k = min(target_k, length)
        rows.append((ranked[:, k - 1] + ranked[:, min(k, length - 1)]) / 2 if k < length else ranked[:, -1] - 1)
    return torch.stack(rows)


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
            threshold=threshold[row : row + 1],
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


@pytest.mark.parametrize("threshold", [None, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_that_keeps_everything_is_dense(threshold: float | None, dtype: torch.dtype) -> None:
    paged, query = sequences([1, 31, 32, 100], "gqa 3", 32, dtype)
    limit = None if threshold is None else torch.full(query.shape[:2], threshold)
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
    result = decode(query, paged, torch.full(query.shape[:2], torch.inf), denominator_compensation=exact)
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
