"""Whatever the thresholds say, outputs stay within the cached values, and only the sequence's own rows are read.

SECURITY.md claims it. An output is a mean of the sequence's own value rows with weights that are not negative and add
up to one, or to less where the lost mass is dropped. Thresholds choose which mean it is; that is all they can do.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels import cpu_case
from tests.kernels.cpu_case import Decoded
from tests.kernels.paged import PagedSequences
from vllm_toptheta.reference import gather_sequence

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 4, 2, 64, 16
ROUNDING = 1e-4
# what a store may make of its coefficients at any length, and what the backend itself uses
THRESHOLDS = st.sampled_from([-1e9, 1e9, 0.0, -0.0, 1e-45, 3.4e38, -3.4e38, float("-inf")]) | st.floats(
    -20, 20, width=32
)


def cached(lens: list[int], seed: int) -> tuple[PagedSequences, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    paged = PagedSequences.allocate(
        lens,
        num_kv_heads=NUM_KV_HEADS,
        head_size=HEAD_SIZE,
        block_size=BLOCK_SIZE,
        dtype=torch.float32,
        generator=generator,
    )
    paged.append(lens, generator)
    return paged, torch.randn(len(lens), NUM_HEADS, HEAD_SIZE, generator=generator)


def decode(paged: PagedSequences, query: torch.Tensor, threshold: torch.Tensor, compensation: str) -> Decoded:
    has_denominator, has_mean = "sdc" in compensation, "vmc" in compensation
    return cpu_case.decode(query, paged, threshold, denominator_compensation=has_denominator, value_mean=has_mean)


@pytest.mark.parametrize("compensation", ["sdc+vmc", "sdc", "none"])
@settings(max_examples=40, derandomize=True, database=None, deadline=None)
@given(
    lens=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    thresholds=st.lists(THRESHOLDS, min_size=NUM_HEADS, max_size=NUM_HEADS),
    seed=st.integers(0, 1000),
)
def test_outputs_stay_within_the_cached_values(
    compensation: str, lens: list[int], thresholds: list[float], seed: int
) -> None:
    paged, query = cached(lens, seed)
    result = decode(paged, query, torch.tensor(thresholds), compensation)
    assert torch.isfinite(result.output).all()
    assert ((result.lost_mass >= 0) & (result.lost_mass <= 1 + ROUNDING)).all()
    for row, length in enumerate(lens):
        assert (result.value_rows_read[row] <= length).all()
        # [tokens, kv heads, head size]; zero belongs to the range where lost mass is dropped
        _, value = gather_sequence(paged.interleaved, paged.block_table[row], length)
        low, high = value.amin(dim=0), value.amax(dim=0)
        if compensation != "sdc+vmc":
            low, high = low.clamp(max=0), high.clamp(min=0)
        output = result.output[row].view(NUM_KV_HEADS, -1, HEAD_SIZE)
        assert (output >= low[:, None] - ROUNDING).all()
        assert (output <= high[:, None] + ROUNDING).all()


@settings(max_examples=40, derandomize=True, database=None, deadline=None)
@given(thresholds=st.lists(THRESHOLDS, min_size=NUM_HEADS, max_size=NUM_HEADS), seed=st.integers(0, 1000))
def test_no_other_sequence_is_read(thresholds: list[float], seed: int) -> None:
    """A sequence's output and counters are the same whoever else is in the batch and whatever their rows hold."""
    paged, query = cached([40, 55], seed)
    threshold = torch.tensor(thresholds)
    before = decode(paged, query, threshold, "sdc+vmc")
    blocks = -(-55 // BLOCK_SIZE)
    paged.kv_cache[paged.block_table[1, :blocks].long()] = 1e30
    after = decode(paged, query, threshold, "sdc+vmc")
    # up to the order of additions, which depends on how many rows the longest sequence reads
    torch.testing.assert_close(after.output[0], before.output[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(after.value_rows_read[0], before.value_rows_read[0])
    assert not torch.equal(after.output[1], before.output[1])
