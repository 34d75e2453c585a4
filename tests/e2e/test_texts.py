"""What the engine tests compare with: texts, and counters between two reports."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.generate import since
from tests.e2e.texts import ROUNDING, assert_same_text
from tests.telemetry.ranks import counted, rank


def output(text: str, *, gap: float = 1.0) -> dict[str, Any]:
    """A text whose best tokens are all `gap` nats ahead of the next."""
    return {"token_ids": [ord(token) for token in text], "top2": [[-0.1, -0.1 - gap]] * len(text)}


def test_a_near_tie_is_excused_once_most_is_compared() -> None:
    near = ROUNDING / 2
    assert_same_text([output("abcdefghij")], [output("abcdefghij")])
    assert_same_text([output("abcdefghij", gap=near)], [output("abcdefghix", gap=near)])
    with pytest.raises(AssertionError, match="prompt 0, token 9"):
        assert_same_text([output("abcdefghij")], [output("abcdefghix")])
    with pytest.raises(AssertionError, match="1 of 10 tokens compared"):
        assert_same_text([output("abcdefghij", gap=near)], [output("xbcdefghij", gap=near)])
    with pytest.raises(AssertionError, match="0 of 0 tokens compared"):
        assert_same_text([], [])


def test_statistics_of_a_call_are_what_the_workers_counted_during_it() -> None:
    first = counted(
        0, [0, 1], [[100, 100], [30, 10]], 0.25, num_short=1, keys_read=[[100, 100], [60, 50]],
        copies_read=[[0, 0], [20, 30]],
    )  # fmt: skip
    second = counted(0, [0, 1], [[20, 40]] * 3, 0.125, num_asked=1, keys_read=[[50, 70]] * 3, copies_read=[[5, 6]] * 3)
    alone = rank(second, requests={"dense": 1})
    earlier = rank(first, requests={"floor": 2})
    for earlier_sum, later in zip(first.settled(), second.settled(), strict=True):
        earlier_sum.add_(later)
    now = rank(first, requests={"floor": 2, "dense": 1})
    assert since(earlier, now) == alone
    assert since(None, now) == now
    assert since(None, None) is None
