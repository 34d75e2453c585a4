"""Who stands in which row: requests come, go, are preempted and come back, in any order and under ids used before."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from vllm_toptheta.backend.levels import COMMON, DENSE, MAX_ECHO, Levels
from vllm_toptheta.backend.requests import RequestLevels
from vllm_toptheta.errors import SettingsError
from vllm_toptheta.store import ThresholdCurve


def curve(label: str, k: int) -> ThresholdCurve:
    return ThresholdCurve(k, np.full((2, 4, 2), k, np.float32), k + 1, 4096, label=label)


LEVELS = Levels(curve("k:128", 128), (curve("k:64", 64), curve("k:32", 40)), min_context=50)
ROWS = 6


def new_request(req_id: str, asked: Any = None, *, resumed: bool = False) -> SimpleNamespace:
    return SimpleNamespace(
        req_id=req_id,
        prompt_token_ids=[1, 2],
        prefill_token_ids=[1, 2, 3] if resumed else [1, 2],
        sampling_params=SimpleNamespace(extra_args=None if asked is None else {"toptheta": asked, "other": 1}),
    )


@pytest.mark.parametrize(
    ("asked", "level"),
    [
        *(("dense", DENSE), ("k:64", 2), (64, 2), ("64", 2), ("k:32", 3), ("32", 3)),
        *(("k:128", COMMON), (128, COMMON)),
    ],
)
def test_what_can_be_asked_for(asked: Any, level: int) -> None:
    assert LEVELS.parse(asked) == level
    assert LEVELS.parse(LEVELS.label(level)) == level


@pytest.mark.parametrize("asked", ["k:100", 100, 64.0, "sparse", "", [64], ["dense"], "Dense", -1, None, "9" * 10_000])
def test_anything_else_is_answered_with_what_can(asked: Any) -> None:
    with pytest.raises(SettingsError) as caught:
        LEVELS.parse(asked)
    message = str(caught.value)
    assert message.startswith("vllm_xargs.toptheta: a request can ask for dense, k:128, k:64, k:32, not for ")
    assert len(message) < 90 + MAX_ECHO


def test_where_nothing_can_be_asked_for_the_reason_is_given() -> None:
    with pytest.raises(SettingsError, match="vllm_xargs.toptheta: switched off"):
        Levels(curve("k:128", 128), refusal="switched off").parse("dense")


def test_a_dense_model_can_be_asked_for_what_it_does() -> None:
    levels = Levels(None)
    assert levels.labels == ["dense"]
    assert levels.parse("dense") == DENSE
    with pytest.raises(SettingsError, match="can ask for dense, not for 64"):
        levels.parse(64)


def test_rules_and_coefficients() -> None:
    assert LEVELS.rules().tolist() == [
        [0, 128, 129, 4096],
        [1, 2**31 - 1, 1, 1],
        [2, 64, 65, 4096],
        [3, 50, 41, 4096],  # min_context is more than what the target needs
    ]
    coefficients = LEVELS.coefficients(1, slice(1, 3))
    assert coefficients.shape == (4, 2, 2)
    assert coefficients[:, 0, 0].tolist() == [128.0, -torch.inf, 64.0, 40.0]
    assert coefficients[DENSE, :, 1].tolist() == [0.0, 0.0]


def test_a_wish_that_nobody_checked_is_decoded_densely() -> None:
    requests = RequestLevels(LEVELS, ROWS)
    requests.step([new_request("a", "k:7")], {"a"}, ["a"])
    assert requests.rules[0, 0] == DENSE


def test_requests_are_counted_when_they_come_and_not_when_they_are_resumed() -> None:
    requests = RequestLevels(LEVELS, ROWS)
    requests.step([new_request("a", "dense"), new_request("b", 64), new_request("c")], {"a", "b", "c"}, ["a", "b", "c"])
    requests.step([], {"b", "c"}, ["c"])
    requests.step([new_request("a", "dense", resumed=True), new_request("d", 128)], {"a", "b", "c", "d"}, ["d", "a"])
    assert requests.rules[:2, 0].tolist() == [COMMON, DENSE]
    assert requests.counts == {"dense": 1, "k:64": 1, "k:128": 1}


def test_rules_made_in_inference_mode_are_written_outside_of_it() -> None:
    with torch.inference_mode():
        requests = RequestLevels(LEVELS, ROWS)
    requests.step([new_request("a", "dense")], {"a"}, ["a"])
    assert requests.rules[0, 0] == DENSE


def test_nothing_is_written_while_nobody_asks() -> None:
    requests = RequestLevels(LEVELS, ROWS)
    requests.rules.fill_(-7)
    for step in range(3):
        requests.step([new_request(str(step))], {"0", "1", "2"}, ["2", "1", "0"][:step])
    assert (requests.rules == -7).all()


class Batches(RuleBasedStateMachine):
    """A scheduler that does whatever a scheduler may do; `forgets` is how vLLM's V2 runner treats preemption."""

    running = Bundle("running")
    waiting = Bundle("waiting")

    def __init__(self) -> None:
        super().__init__()
        self.requests = RequestLevels(LEVELS, ROWS)
        self.address = self.requests.rules.data_ptr()
        self.known: dict[str, Any] = {}  # as the runner knows them
        self.new: list[SimpleNamespace] = []
        self.rows: list[str] = []

    @rule(
        target=running,
        number=st.integers(0, 9),
        asked=st.sampled_from([None, None, "dense", "k:64", 128, "k:32"]),
    )
    def add(self, number: int, asked: Any) -> tuple[str, Any]:
        """Also under the id of one that is known, which was aborted in between."""
        self.new.append(new_request(f"r{number}", asked))
        self.known[f"r{number}"] = asked
        return f"r{number}", asked

    @rule(request=consumes(running))
    def finish(self, request: tuple[str, Any]) -> None:
        self.known.pop(request[0], None)

    @rule(target=waiting, request=consumes(running))
    def preempt_and_forget(self, request: tuple[str, Any]) -> tuple[str, Any]:
        self.known.pop(request[0], None)
        return request

    @rule(target=running, request=consumes(waiting))
    def resume(self, request: tuple[str, Any]) -> tuple[str, Any]:
        self.new.append(new_request(*request, resumed=True))
        self.known[request[0]] = request[1]
        return request

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        """Some of the running requests, reordered; those that are new are always among them."""
        new = [request for request in self.new if request.req_id in self.known]
        first = list(dict.fromkeys(request.req_id for request in new))[:ROWS]
        others = [req_id for req_id in self.known if req_id not in first]
        chosen = first + others[: data.draw(st.integers(0, ROWS - len(first)))]
        self.rows = data.draw(st.permutations(chosen))
        self.requests.step(new, self.known.keys(), self.rows)
        self.new = []
        levels = [
            LEVELS.parse(self.known[req_id]) if self.known[req_id] is not None else COMMON for req_id in self.rows
        ]
        expected = LEVELS.rules()[levels + [COMMON] * (ROWS - len(levels))]
        assert torch.equal(self.requests.rules, expected)
        assert self.requests._asked.keys() <= self.known.keys()  # nothing is kept of those that are gone

    @invariant()
    def it_stays_where_it_is(self) -> None:
        assert self.requests.rules.data_ptr() == self.address


TestBatches = Batches.TestCase
TestBatches.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
