"""The guarantee of relative thresholds: no key whose softmax weight reaches weight_floor / n is ever skipped."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_toptheta.limits import NUM_ANCHORS, NUM_FIRST_ANCHORS, NUM_LAST_ANCHORS
from vllm_toptheta.reference import anchor_lse, is_anchor, relative_threshold, select_survivors


@st.composite
def rows(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of the last rows of a sequence, `[2, 3, n]` float64, flat, peaked or both by turns; and their lengths."""
    seq_len = draw(st.integers(NUM_ANCHORS + 2, 1200))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    scores = torch.randn(2, 3, seq_len, generator=generator, dtype=torch.float64)
    scores *= draw(st.sampled_from([0.0, 0.1, 1.0, 4.0, 30.0]))
    scores += draw(st.sampled_from([-200.0, 0.0, 200.0]))
    if draw(st.booleans()):  # all of the weight far from the anchors
        scores[..., seq_len // 3 : seq_len // 2] += draw(st.sampled_from([3.0, 20.0]))
    scores[0, :, -1] = -torch.inf  # the row before does not see the last key
    return scores, torch.tensor([seq_len - 1, seq_len])


@given(rows=rows(), weight_floor=st.floats(0.01, 100.0), sink=st.none() | st.floats(-250.0, 250.0))
@settings(deadline=None, max_examples=200)
def test_a_key_of_the_floor_s_weight_survives(
    rows: tuple[torch.Tensor, torch.Tensor], weight_floor: float, sink: float | None
) -> None:
    scores, num_keys = rows
    sinks = None if sink is None else sink + torch.tensor([-3.0, 0.0, 3.0])
    survivors = select_survivors(scores, relative_threshold(scores, num_keys, weight_floor, sinks=sinks))
    columns = scores
    if sinks is not None:
        columns = torch.cat([scores, sinks.double()[None, :, None].expand(2, -1, 1)], dim=-1)
    weights = columns.softmax(dim=-1)[..., : scores.shape[-1]]
    limit = weight_floor / num_keys[:, None, None]
    assert not bool((~survivors & (weights >= limit * (1 + 1e-9))).any())
    dropped = weights.where(~survivors, 0.0)
    assert bool((dropped.sum(dim=-1) <= weight_floor * (1 - survivors.sum(dim=-1) / num_keys[:, None]) + 1e-9).all())
    assert bool((dropped.square().sum(dim=-1) <= weight_floor / num_keys[:, None] * (1 + 1e-9)).all())


@given(rows=rows(), sink=st.floats(-50.0, 50.0))
@settings(deadline=None, max_examples=200)
def test_anchors_bound_the_denominator_from_below(rows: tuple[torch.Tensor, torch.Tensor], sink: float) -> None:
    scores, num_keys = rows
    assert bool((anchor_lse(scores, num_keys) <= scores.logsumexp(dim=-1) + 1e-9).all())
    sinks = torch.full((3,), sink, dtype=torch.float64)
    exact = torch.logaddexp(scores.logsumexp(dim=-1), sinks)
    assert bool((anchor_lse(scores, num_keys, sinks=sinks) <= exact + 1e-9).all())
    windowed = scores.clone()
    windowed[..., : scores.shape[-1] - 200] = -torch.inf
    assert bool((anchor_lse(windowed, num_keys) <= windowed.logsumexp(dim=-1) + 1e-9).all())


def test_which_keys_are_anchors() -> None:
    anchors = is_anchor(torch.tensor([100, NUM_ANCHORS, 1000]), 1000)
    assert anchors[0].nonzero().flatten().tolist() == list(range(100))
    assert anchors[1].nonzero().flatten().tolist() == list(range(NUM_ANCHORS))
    expected = [*range(NUM_FIRST_ANCHORS), *range(1000 - NUM_LAST_ANCHORS, 1000)]
    assert anchors[2].nonzero().flatten().tolist() == expected


def test_the_form_of_the_threshold() -> None:
    scores = torch.zeros(1, 1, 1000, dtype=torch.float64)
    theta = relative_threshold(scores, torch.tensor([1000]), 3.0)
    assert float(theta) == pytest.approx(math.log(NUM_ANCHORS) + math.log(3 / 1000))
    assert float(relative_threshold(scores, torch.tensor([1000]), 0.0)) == -math.inf


@pytest.mark.parametrize("weight_floor", [-1.0, math.nan, math.inf])
def test_a_floor_that_is_none(weight_floor: float) -> None:
    with pytest.raises(ValueError, match="weight_floor"):
        relative_threshold(torch.zeros(1, 1, 4), torch.tensor([4]), weight_floor)
