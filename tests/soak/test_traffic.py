"""Prompts and what their clients do."""

from __future__ import annotations

from collections import Counter
from itertools import islice

from vllm_toptheta.soak.traffic import SHORTEST, Behaviour, make_prompts, requests

TEXT = list(range(5000))


def test_lengths_grow_from_the_shortest_to_the_longest() -> None:
    prompts = make_prompts(TEXT, count=20, longest=3000, max_tokens=40, seed=1)
    lengths = [len(prompt.token_ids) for prompt in prompts]
    assert (lengths[0], lengths[-1]) == (SHORTEST, 3000)
    assert lengths == sorted(lengths)
    assert [prompt.index for prompt in prompts] == list(range(20))
    assert all(10 <= prompt.max_tokens <= 40 for prompt in prompts)


def test_every_third_begins_alike() -> None:
    prompts = make_prompts(TEXT, count=12, longest=1000, max_tokens=4, seed=1)
    for prompt in prompts[::3]:
        half = len(prompt.token_ids) // 2
        assert prompt.token_ids[:half] == tuple(TEXT[:half])
    assert sum(prompt.token_ids[:4] == (0, 1, 2, 3) for prompt in prompts) == 4


def test_prompts_ask_for_each_choice_in_turn() -> None:
    prompts = make_prompts(TEXT, count=7, longest=100, max_tokens=4, seed=1, choices=["dense", "floor:2"])
    assert [prompt.choice for prompt in prompts] == [None, "dense", "floor:2", None, "dense", "floor:2", None]
    assert {prompt.choice for prompt in make_prompts(TEXT, count=7, longest=100, max_tokens=4, seed=1)} == {None}


def test_a_seed_makes_the_same_requests() -> None:
    prompts = make_prompts(TEXT, count=5, longest=100, max_tokens=4, seed=1)
    one, same, other = (list(islice(requests(prompts, seed=seed), 50)) for seed in (7, 7, 8))
    assert one == same != other


def test_every_behaviour_comes_up_and_most_clients_stay() -> None:
    prompts = make_prompts(TEXT, count=5, longest=100, max_tokens=4, seed=1)
    behaviours = Counter(behaviour for _, behaviour, _ in islice(requests(prompts, seed=0), 1000))
    assert set(behaviours) == set(Behaviour)
    assert behaviours[Behaviour.WHOLE] + behaviours[Behaviour.STREAM] > 700
