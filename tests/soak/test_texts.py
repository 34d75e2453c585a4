"""Texts under load against those of the quiet server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from vllm_toptheta.soak.client import Outcome
from vllm_toptheta.soak.texts import AS_SERVED, compare, compare_by_choice

Make = Callable[..., Outcome]


def test_equal_as_far_as_it_goes(make_outcome: Make) -> None:
    quiet = {0: make_outcome("abcd")}
    texts = compare([make_outcome("abcd"), make_outcome("ab", ending="left"), make_outcome("")], quiet, 0.005)
    assert (texts.compared, texts.equal, texts.tokens, texts.different) == (2, 2, 6, [])


def test_only_the_first_difference_counts_and_only_if_it_is_no_near_tie(make_outcome: Make) -> None:
    quiet = {0: make_outcome("abcd", [1.0, 0.001, 1.0, 1.0])}
    texts = compare([make_outcome("axyz", [1.0, 0.004, 2.0, 2.0])], quiet, 0.005)
    assert (texts.equal, texts.near_ties, texts.different, texts.largest_gap) == (0, 1, [], 0.004)


def test_a_gap_in_either_run_makes_a_difference(make_outcome: Make) -> None:
    quiet = {0: make_outcome("abcd", [1.0, 1.0, 0.2, 1.0])}
    texts = compare([make_outcome("abxd", [1.0, 1.0, 0.001, 1.0])], quiet, 0.005)
    assert texts.different == ["prompt 0, token 2: 0.2000 nats apart"]


def test_what_is_asked_for_is_compared_apart(make_outcome: Make) -> None:
    served = make_outcome("ab")
    dense = [make_outcome(text, prompt=replace(served.prompt, index=1, choice="dense")) for text in ("cd", "cx", "cd")]
    found = compare_by_choice([dense[0], served, dense[1]], {0: served, 1: dense[2]}, 0.005)
    assert list(found) == [AS_SERVED, "dense"]
    assert [(texts.compared, texts.equal, len(texts.different)) for texts in found.values()] == [(1, 1, 0), (2, 1, 1)]
