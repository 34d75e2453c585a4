"""Rows that verify drafts: each of their tokens is decoded by thresholds as if it were a sequence's last; no engine."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.config import VllmConfig

from tests.backend.cpu_harness import NUM_HEADS, UNWRITTEN, Harness, Step, asking
from tests.fuzzing import fuzz
from vllm_toptheta.backend import cpu, plugin
from vllm_toptheta.backend.plan import DenseRule
from vllm_toptheta.kernels.contract import Counters
from vllm_toptheta.limits import MAX_QUERY_LEN

NGRAM = {"method": "ngram", "num_speculative_tokens": 7, "prompt_lookup_max": 2}
COPIES = {"mode": "shadow", "shadow_values": True, "always_shadow": True}
MakeConfig = Callable[..., VllmConfig]


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin.register()
    monkeypatch.setattr(cpu, "get_tensor_model_parallel_rank", lambda: 0)


def harness_of(make_config: MakeConfig, lens: list[int], options: dict[str, Any] | None = None) -> Harness:
    config = make_config({"dense_layers": [0]} | (options or {}), block_size=16, speculative_config=NGRAM)
    return Harness(config, 16, lens)


def prompts(harness: Harness, contexts: list[int]) -> None:
    harness.run(Step(contexts, contexts, [True] * len(contexts)))


def counted(harness: Harness) -> Counters:
    counters: Counters = harness.layers[1].impl.layer_plan.counters.settled()
    return counters


@pytest.mark.parametrize(
    ("seq_lens", "query_lens"),
    [
        ([512, 700, 401, 900], [4, 1, 8, 2]),
        # their drafts fill one page, or two, or none, beside a prompt
        ([305, 160, 640, 300], [3, 8, 1, 60]),
    ],
)
def test_every_token_goes_by_its_own_threshold(
    make_config: MakeConfig, seq_lens: list[int], query_lens: list[int]
) -> None:
    harness = harness_of(make_config, seq_lens)
    prompts(harness, [length - new for length, new in zip(seq_lens, query_lens, strict=True)])
    step = Step(seq_lens, query_lens, [new > MAX_QUERY_LEN for new in query_lens])
    query, outputs = harness.run(step)
    for layer, output in enumerate(outputs):
        torch.testing.assert_close(output, harness.expected(step, query, layer), rtol=1e-4, atol=1e-5)
    lengths = [
        length - back
        for length, new in zip(seq_lens, query_lens, strict=True)
        if new <= MAX_QUERY_LEN
        for back in range(new)
    ]
    # tokens are counted, in one step
    assert counted(harness).totals.tolist() == [len(lengths), 0, sum(lengths), 1, 0]
    assert counted(harness).lost_mass_histogram.sum(dim=1).tolist() == [len(lengths)] * NUM_HEADS
    assert counted(harness).value_rows_read.max() < sum(lengths)


def test_more_tokens_than_are_verified_at_once_are_dense(make_config: MakeConfig) -> None:
    harness = harness_of(make_config, [512, 512])
    prompts(harness, [512 - MAX_QUERY_LEN, 511 - MAX_QUERY_LEN])
    step = Step([512, 512], [MAX_QUERY_LEN, 1 + MAX_QUERY_LEN], [False, False])
    query, outputs = harness.run(step)
    torch.testing.assert_close(outputs[1], harness.expected(step, query, 1), rtol=1e-4, atol=1e-5)
    assert counted(harness).totals.tolist()[:2] == [MAX_QUERY_LEN, 0]


def test_without_speculation_several_tokens_are_none_that_verify(make_config: MakeConfig) -> None:
    harness = Harness(make_config(block_size=16), 16, [512])
    prompts(harness, [508])
    harness.run(Step([512], [4], [False]))
    assert not counted(harness).totals.any()


def test_what_a_request_asks_for_holds_for_all_of_its_tokens(make_config: MakeConfig) -> None:
    harness = harness_of(make_config, [320, 400, 512], {"weight_floor": 2})
    prompts(harness, [317, 396, 511])
    asking(harness, ["dense", "floor:0.5", None])
    step = Step([320, 400, 512], [3, 4, 1], [False] * 3)
    query, outputs = harness.run(step)
    thresholds = torch.full((8, NUM_HEADS), -torch.inf)
    for token in range(4):
        thresholds[3 + token] = harness.threshold(step, query, 1, 1, token) + math.log(0.5 / 2)
    thresholds[7] = harness.threshold(step, query, 1, 2)
    expected = harness.reference(step, query, 1, thresholds)
    torch.testing.assert_close(outputs[1], expected.output, rtol=1e-4, atol=1e-5)
    # what others asked for is neither the server's nor the guard's
    assert counted(harness).totals.tolist() == [8, 0, 318 + 319 + 320 + 397 + 398 + 399 + 400 + 512, 1, 7]
    assert counted(harness).lost_mass_histogram.sum(dim=1).tolist() == [1] * NUM_HEADS
    torch.testing.assert_close(counted(harness).lost_mass, expected.lost_mass[7].double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("drafts", "min_tokens"), [(0, 600), (1, 1200), (3, 2400)])
def test_small_steps_are_dense_and_drafts_make_more_steps_small(
    make_config: MakeConfig, drafts: int, min_tokens: int
) -> None:
    for length, is_dense in ((min_tokens - 30, True), (min_tokens + 30, False)):
        harness = harness_of(make_config, [length])
        harness.builder.plan = replace(harness.builder.plan, automatic=DenseRule(0, 600))
        prompts(harness, [length - 1 - drafts])
        harness.run(Step([length], [1 + drafts], [False]))
        assert counted(harness).totals.tolist()[:2] == [1 + drafts, (1 + drafts) * is_dense]


def test_a_number_for_min_context_sends_all_steps_through_the_thresholds(make_config: MakeConfig) -> None:
    harness = harness_of(make_config, [300], {"min_context": 0})
    harness.builder.plan = replace(harness.builder.plan, automatic=harness.automatic)
    assert harness.automatic.min_step_tokens > 300
    prompts(harness, [296])
    harness.run(Step([300], [4], [False]))
    assert counted(harness).totals.tolist()[:2] == [4, 0]


# how many drafts a step verifies, and how many of them are refused
STEPS = st.lists(
    st.integers(0, 7).flatmap(lambda drafts: st.tuples(st.just(drafts), st.integers(0, drafts))),
    min_size=1,
    max_size=12,
)


@pytest.mark.parametrize(
    "options", [{"weight_floor": 2, "guard": "off"}, COPIES | {"guard": "off"}], ids=["values", "copies"]
)
def test_drafts_that_are_refused_leave_nothing_behind(make_config: MakeConfig, options: dict[str, Any]) -> None:
    """Tails of pages that they filled, and that others fill again, are as if all were made at once."""
    harness = harness_of(make_config, [400, 400], options)

    @fuzz(15)
    @given(context=st.integers(150, 240), steps=STEPS)
    def check(context: int, steps: list[tuple[int, int]]) -> None:
        harness.generator.manual_seed(0)
        for cache in harness.caches:
            cache.fill_(UNWRITTEN)
        prompts(harness, [context, 160])
        lengths = [context, 160]
        for drafts, refused in steps:
            # the other one's drafts are all accepted
            step = Step([lengths[0] + 1 + drafts, lengths[1] + 3], [1 + drafts, 3], [False, False])
            before = harness.generator.get_state()
            query, outputs = harness.run(step)
            if "mode" not in options:
                torch.testing.assert_close(outputs[1], harness.expected(step, query, 1), rtol=1e-4, atol=1e-5)
            harness.generator.set_state(before)
            harness.builder.has_connector, harness.builder.requests.arrived_rows = True, [0, 1]
            _, again = harness.run(step)
            harness.builder.has_connector = False
            for one, other in zip(outputs, again, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
            lengths = [lengths[0] + 1 + drafts - refused, lengths[1] + 3]

    check()
