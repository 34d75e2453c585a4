"""Who stands in which row: requests come, go, are preempted and come back, in any order and under ids used before."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from vllm_toptheta.backend.request_choices import COMMON, KEEP_ALL, MAX_ECHO, RequestChoices, is_lossy
from vllm_toptheta.backend.requests import RequestOffsets
from vllm_toptheta.errors import SettingsError
from vllm_toptheta.selection import ServedThresholds
from vllm_toptheta.store import ThresholdCurve

CHOICES = RequestChoices(ServedThresholds.relative(3.0), any_floor=True)
LOWER = math.log(1.5) - math.log(3.0)
ROWS = 6


def new_request(req_id: str, asked: Any = None, *, resumed: bool = False) -> SimpleNamespace:
    return SimpleNamespace(
        req_id=req_id,
        prompt_token_ids=[1, 2],
        prefill_token_ids=[1, 2, 3] if resumed else [1, 2],
        sampling_params=SimpleNamespace(extra_args=None if asked is None else {"toptheta": asked, "other": 1}),
    )


@pytest.mark.parametrize(
    ("asked", "offset"),
    [
        *(("dense", KEEP_ALL), ("floor:0", KEEP_ALL), ("floor:0.0", KEEP_ALL)),
        *(("floor:3", COMMON), ("floor:3.0", COMMON), ("floor:1.5", LOWER), ("floor:15e-1", LOWER)),
        ("floor:1000", math.log(1000) - math.log(3.0)),
        # blanks and the case of letters do not count
        *((" dense", KEEP_ALL), ("Dense\n", KEEP_ALL), ("FLOOR:1.5 ", LOWER), ("floor: 3", COMMON)),
    ],
)
def test_what_can_be_asked_for(asked: Any, offset: float) -> None:
    assert CHOICES.parse(asked) == offset


@pytest.mark.parametrize(
    "asked",
    [
        *("floor:", "floor:x", "floor:-1", "floor:nan", "floor:inf", "floor:1e9", "floor: 1 2", "floor", "3", 3, 3.0),
        *("k:100", "sparse", "", " ", [64], ["dense"], "den se", -1, None, True, pytest.param("9" * 10_000, id="long")),
    ],
)
def test_anything_else_is_answered_with_what_can(asked: Any) -> None:
    with pytest.raises(SettingsError) as caught:
        CHOICES.parse(asked)
    message = str(caught.value)
    assert message.startswith("vllm_xargs.toptheta: a request can ask for dense, floor:3, floor:0 to 1000, not for ")
    assert len(message) < 120 + MAX_ECHO
    # what is cut says so
    assert message.endswith("... (10002 characters)." if len(repr(asked)) > MAX_ECHO else f"{asked!r}.")


def test_promises_of_the_store_have_names() -> None:
    choices = RequestChoices(ServedThresholds.relative(3.0), any_floor=True, presets={"high": 1.5, "fast": 3.0})
    assert (choices.parse("high"), choices.parse("fast"), choices.parse("floor:1.5")) == (LOWER, COMMON, LOWER)
    assert choices.parse(" High") == LOWER
    assert choices.kind(choices.parse("high")) == "floor"
    with pytest.raises(SettingsError, match="can ask for dense, floor:3, high, fast, floor:0 to 1000, not for 'exact'"):
        choices.parse("exact")
    for dense in (None, ServedThresholds.relative(3.0)):
        refusing = RequestChoices(dense, any_floor=dense is None, presets={"high": 1.5})
        with pytest.raises(SettingsError, match="not for 'high'"):
            refusing.parse("high")


def test_calibrated_thresholds_have_no_floor_to_choose() -> None:
    curve = ThresholdCurve(128, np.full((2, 4, 2), 1.0, np.float32), 129, 4096, label="k:128")
    choices = RequestChoices(ServedThresholds.calibrated(curve), any_floor=True)
    assert (choices.parse("dense"), choices.parse("k:128")) == (KEEP_ALL, COMMON)
    assert choices.parse("K:128.0") == COMMON
    assert choices.kinds == ["dense", "k:128"]
    with pytest.raises(SettingsError, match="can ask for dense, k:128, not for 'floor:2'"):
        choices.parse("floor:2")


UNVERIFIED = RequestChoices(ServedThresholds.relative(3.0), any_floor=True, lossy_refusal=None)


@pytest.mark.parametrize(
    ("asked", "offset"),
    [("lossy", COMMON), (" Lossy floor:3", COMMON), ("lossy floor:1.5", LOWER), ("lossy  floor: 1.5\n", LOWER)],
)
def test_answers_that_are_not_verified(asked: str, offset: float) -> None:
    assert (UNVERIFIED.parse(asked), is_lossy(asked)) == (offset, True)
    assert UNVERIFIED.kinds == ["dense", "floor", "lossy"]
    with pytest.raises(SettingsError, match="toptheta: no answer of this server is verified, .* Leave lossy out"):
        CHOICES.parse(asked)


@pytest.mark.parametrize("asked", ["lossy dense", "lossy floor:0", "lossy lossy", "lossy sparse", "lossyfloor:1"])
def test_what_says_nothing_about_answers(asked: str) -> None:
    with pytest.raises(SettingsError, match="can ask for dense, floor:3, floor:0 to 1000, lossy, not for"):
        UNVERIFIED.parse(asked)


@pytest.mark.parametrize("asked", [None, 3, ["lossy"], "", "floor:1.5", "dense lossy"])
def test_everything_else_is_verified(asked: Any) -> None:
    assert not is_lossy(asked)


def test_a_wish_for_an_unverified_answer_that_nobody_checked_is_verified() -> None:
    requests = RequestOffsets(CHOICES, ROWS)
    requests.step([new_request("a", "lossy")], {"a"}, ["a"])
    assert (requests.lossy_rows, requests.counts) == ([], {"dense": 1})


def test_where_nothing_can_be_asked_for_the_reason_is_given() -> None:
    refusing = RequestChoices(ServedThresholds.relative(3.0), any_floor=True, refusal="switched off")
    with pytest.raises(SettingsError, match="vllm_xargs.toptheta: switched off"):
        refusing.parse("dense")
    assert refusing.kinds == refusing.labels == []


def test_a_dense_model_can_be_asked_for_what_it_does() -> None:
    choices = RequestChoices(None, any_floor=True)
    assert choices.labels == choices.kinds == ["dense"]
    assert choices.parse("dense") == KEEP_ALL
    with pytest.raises(SettingsError, match="can ask for dense, not for 'floor:2'"):
        choices.parse("floor:2")


def test_a_wish_that_nobody_checked_is_decoded_densely() -> None:
    requests = RequestOffsets(CHOICES, ROWS)
    requests.step([new_request("a", "floor:-7")], {"a"}, ["a"])
    assert requests.offsets[0] == KEEP_ALL


def test_requests_are_counted_when_they_come_and_not_when_they_are_resumed() -> None:
    requests = RequestOffsets(CHOICES, ROWS)
    new = [new_request("a", "dense"), new_request("b", "floor:1.5"), new_request("c")]
    requests.step(new, {"a", "b", "c"}, ["a", "b", "c"])
    requests.step([], {"b", "c"}, ["c"])
    new = [new_request("a", "dense", resumed=True), new_request("d", "floor:3")]
    requests.step(new, {"a", "b", "c", "d"}, ["d", "a"])
    assert requests.offsets[:2].tolist() == [COMMON, KEEP_ALL]
    # as few counts as there are kinds, whatever floors are asked for
    assert requests.counts == {"dense": 1, "floor": 2}


def test_offsets_made_in_inference_mode_are_written_outside_of_it() -> None:
    with torch.inference_mode():
        requests = RequestOffsets(CHOICES, ROWS)
    requests.step([new_request("a", "dense")], {"a"}, ["a"])
    assert requests.offsets[0] == KEEP_ALL


def test_nothing_is_written_while_nobody_asks() -> None:
    requests = RequestOffsets(CHOICES, ROWS)
    requests.offsets.fill_(-7)
    for step in range(3):
        requests.step([new_request(str(step))], {"0", "1", "2"}, ["2", "1", "0"][:step])
    assert (requests.offsets == -7).all()


class Batches(RuleBasedStateMachine):
    """A scheduler that does whatever a scheduler may do; `forgets` is how vLLM's V2 runner treats preemption."""

    running = Bundle("running")
    waiting = Bundle("waiting")

    def __init__(self) -> None:
        super().__init__()
        self.requests = RequestOffsets(UNVERIFIED, ROWS)
        self.address = self.requests.offsets.data_ptr()
        self.known: dict[str, Any] = {}  # as the runner knows them
        self.new: list[SimpleNamespace] = []
        self.rows: list[str] = []

    @rule(
        target=running,
        number=st.integers(0, 9),
        asked=st.sampled_from([None, None, "dense", "floor:1.5", "floor:3", "floor:7", "lossy", "lossy floor:7"]),
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
        resumed = data.draw(st.sets(st.sampled_from(self.rows))) if self.rows else set()
        self.requests.step(new, self.known.keys(), self.rows, resumed)
        arrived = resumed.union(request.req_id for request in new)
        assert self.requests.arrived_rows == [row for row, req_id in enumerate(self.rows) if req_id in arrived]
        self.new = []
        offsets = [
            UNVERIFIED.parse(self.known[req_id]) if self.known[req_id] is not None else COMMON for req_id in self.rows
        ]
        expected = torch.tensor(offsets + [COMMON] * (ROWS - len(offsets)))
        assert torch.equal(self.requests.offsets, expected)
        lossy = [row for row, req_id in enumerate(self.rows) if is_lossy(self.known[req_id])]
        assert self.requests.lossy_rows == lossy
        # nothing is kept of those that are gone
        assert self.requests._asked.keys() | self.requests._lossy <= self.known.keys()

    @invariant()
    def it_stays_where_it_is(self) -> None:
        assert self.requests.offsets.data_ptr() == self.address


TestBatches = Batches.TestCase
TestBatches.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
