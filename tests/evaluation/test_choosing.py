"""What a few sequences let expect of a floor."""

import math

import pytest

from tests.quality_factory import make_length
from vllm_toptheta.evaluation.choosing import expect
from vllm_toptheta.evaluation.paired import upper_bound
from vllm_toptheta.store import MeasuredLength


def floor(kl: float, change: float = 0.0, error: float = 0.2, **fields: float) -> MeasuredLength:
    return make_length(num_sequences=4, kl_divergence=kl, change_percent=change, change_error=error, **fields)


def expect_at_one_length(*floors: MeasuredLength, num_sequences: int = 4) -> list[MeasuredLength]:
    return [one for (one,) in expect([[one] for one in floors], num_sequences, confidence=0.95)]


def test_kl_beyond_rounding_is_the_change_to_expect() -> None:
    expected = expect_at_one_length(floor(0.0006, -0.3), floor(0.0010, 0.3), floor(0.0046, -0.1))
    assert [one.change_percent for one in expected] == pytest.approx([0, 0.04, 0.40], abs=1e-3)
    # the promise of a KL is of all of it
    assert [one.kl_divergence for one in expected] == [0.0006, 0.0010, 0.0046]


def test_a_change_that_is_surely_larger_counts() -> None:
    _, expected = expect_at_one_length(floor(0.0006), floor(0.0010, 2.0))
    # t of 3 degrees of freedom is 2.353, which the bound approximates by 2.347
    assert expected.change_percent == pytest.approx(2.0 - 2.347 * 0.2, abs=1e-3)
    _, expected = expect_at_one_length(floor(0.0006), floor(0.0010, -2.0))
    assert expected.change_percent == pytest.approx(0.04, abs=1e-3)


def test_all_floors_tell_the_spread_together() -> None:
    expected = expect_at_one_length(floor(0.001, error=0.1), floor(0.002, error=0.3))
    assert {one.change_error for one in expected} == {math.sqrt((0.01 + 0.09) / 2)}


def test_more_sequences_have_smaller_errors() -> None:
    few, many = (expect_at_one_length(floor(0.001, kl_error=0.0002), num_sequences=number)[0] for number in (4, 16))
    assert (many.num_sequences, many.num_tokens) == (16, 4 * few.num_tokens)
    assert (many.change_error, many.kl_error) == (few.change_error / 2, few.kl_error / 2)
    assert many.change_bound == upper_bound(many.change_percent, many.change_error, 16, confidence=0.95)
    assert many.kl_bound == upper_bound(0.001, 0.0001, 16, confidence=0.95)


def test_lengths_are_judged_each_by_itself() -> None:
    low, high = expect(
        [
            [floor(0.001, length=2048), floor(0.003, length=8192)],
            [floor(0.002, length=2048), floor(0.005, length=8192)],
        ],
        8,
        confidence=0.95,
    )
    assert [one.length for one in low] == [one.length for one in high] == [2048, 8192]
    assert [one.change_percent for one in (*low, *high)] == pytest.approx([0, 0, 0.1, 0.2], abs=1e-3)
