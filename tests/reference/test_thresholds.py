import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_toptheta.reference import (
    keep_last,
    kth_largest_score,
    kth_largest_scores,
    score_threshold,
    select_survivors,
    thresholded_rows,
)

few_numbers = st.lists(st.integers(-4, 4), min_size=1, max_size=12)


@settings(derandomize=True, database=None, deadline=None, max_examples=100)
@given(row=few_numbers, num_hidden=st.integers(0, 3), target_ks=st.lists(st.integers(1, 14), min_size=1, max_size=4))
def test_kth_largest_equals_sorting(row: list[int], num_hidden: int, target_ks: list[int]) -> None:
    scores = torch.tensor([*row, *[-torch.inf] * num_hidden], dtype=torch.float32)
    ordered = sorted(row, reverse=True)
    expected = [ordered[k - 1] if k <= len(row) else -torch.inf for k in target_ks]
    assert kth_largest_scores(scores, target_ks).tolist() == expected
    assert kth_largest_score(scores, target_ks[0]).item() == expected[0]


@settings(derandomize=True, database=None, deadline=None, max_examples=100)
@given(row=few_numbers, target_k=st.integers(1, 12))
def test_threshold_at_the_kth_score_keeps_k_keys_and_its_ties(row: list[int], target_k: int) -> None:
    scores = torch.tensor([*row, -torch.inf])
    threshold = kth_largest_score(scores, target_k)
    survivors = select_survivors(scores, threshold)
    assert survivors.tolist() == [score >= threshold.item() for score in row] + [False]
    assert survivors.sum() >= min(target_k, len(row))


@settings(derandomize=True, database=None, deadline=None, max_examples=100)
@given(row=st.lists(st.booleans(), min_size=1, max_size=12), cap_k=st.integers(1, 14))
def test_cap_keeps_the_last(row: list[bool], cap_k: int) -> None:
    kept = keep_last(torch.tensor(row), cap_k).nonzero().flatten().tolist()
    assert kept == [j for j, survives in enumerate(row) if survives][-cap_k:]


def test_probability_becomes_a_score() -> None:
    scores = torch.tensor([[0.0, 1.0, 3.0, -torch.inf], [100.0, 100.0, 100.0, 100.0]], dtype=torch.float64)
    probabilities = scores.softmax(dim=-1)
    for j in range(3):
        torch.testing.assert_close(score_threshold(scores, probabilities[:, j]), scores[:, j])
    assert torch.all(score_threshold(scores, torch.zeros(2)) == -torch.inf)


@pytest.mark.parametrize("target_ks", [[], [4, 0]])
def test_k_below_one_is_refused(target_ks: list[int]) -> None:
    with pytest.raises(ValueError, match="^target_ks: "):
        kth_largest_scores(torch.zeros(3), target_ks)


def test_a_phase_is_one_of_three_and_a_prompt_has_a_length() -> None:
    lengths = torch.arange(1, 5)
    with pytest.raises(ValueError, match="^phase: 'all' is none of prefill, decode, both"):
        thresholded_rows(lengths, target_k=1, phase="all", num_prompt_tokens=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^num_prompt_tokens: "):
        thresholded_rows(lengths, target_k=1, phase="both", num_prompt_tokens=-1)
