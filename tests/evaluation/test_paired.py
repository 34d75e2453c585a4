import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_toptheta.evaluation.paired import compare_perplexities, compare_shares, mean_and_error


def test_the_standard_error_is_paired() -> None:
    dense, sparse = [3.0, 1.0, 2.0], [3.02, 1.01, 2.03]  # the texts differ far more than the changes do
    change, error = compare_perplexities(dense, sparse, [7, 7, 7])
    assert change == pytest.approx(100 * (math.exp(0.02) - 1))
    assert error == pytest.approx(100 * math.exp(0.02) * 0.01 / math.sqrt(3))
    assert compare_perplexities([1.0], [1.0], [5]) == (0.0, None)


def test_long_sequences_weigh_more() -> None:
    mean, error = mean_and_error([1.0, 4.0], [3.0, 1.0])
    assert mean == pytest.approx(1.75)
    # both sequences deviate by 2.25 token losses from what their number of tokens would have
    assert error == pytest.approx(math.sqrt(2 * 2 * 2.25**2) / 4)


def test_the_standard_error_covers_the_truth_as_often_as_it_should() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        tokens = generator.integers(20, 200, 60)
        values = 0.3 + generator.normal(size=60) / np.sqrt(tokens)
        mean, error = mean_and_error(values.tolist(), tokens.tolist())
        assert error is not None
        covered += abs(mean - 0.3) < 1.96 * error
    assert 0.91 < covered / 400 < 0.985


@settings(derandomize=True, database=None, deadline=None, max_examples=60)
@given(outcomes=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=9))
def test_mcnemar_counts_every_way_a_coin_could_fall(outcomes: list[tuple[bool, bool]]) -> None:
    dense, sparse = zip(*outcomes, strict=True)
    result = compare_shares(dense, sparse)
    discordant = [after - before for before, after in outcomes if before != after]
    observed = abs(sum(discordant))
    falls = [abs(sum(signs)) for signs in itertools.product([-1, 1], repeat=len(discordant))]
    assert result.p_value == pytest.approx(sum(fall >= observed for fall in falls) / len(falls))
    assert result.difference == pytest.approx((sum(sparse) - sum(dense)) / len(outcomes))
    assert (result.num_gained - result.num_lost) / len(outcomes) == pytest.approx(result.difference)
    assert (result.dense, result.sparse) == (sum(dense) / len(dense), sum(sparse) / len(sparse))


def test_the_interval_shrinks_with_tasks_and_leaves_out_zero_where_the_difference_is_clear() -> None:
    few, many = compare_shares([True] * 5, [True] * 5), compare_shares([True] * 500, [True] * 500)
    assert few.low < 0 < few.high
    assert many.high - many.low < 0.02 < few.high - few.low
    worse = compare_shares([True] * 90 + [False] * 10, [True] * 40 + [False] * 60)
    assert worse.high < 0
    assert worse.p_value < 1e-6


def test_the_interval_covers_the_truth_as_often_as_it_should() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(500):
        cell = generator.choice(4, size=80, p=[0.5, 0.12, 0.05, 0.33])  # both, sparse only, dense only, neither
        result = compare_shares(np.isin(cell, [0, 2]).tolist(), np.isin(cell, [0, 1]).tolist())
        covered += result.low <= 0.07 <= result.high
    assert 0.92 < covered / 500 < 0.985
