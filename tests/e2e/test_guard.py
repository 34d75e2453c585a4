"""The guard of a live server: a text of which too much is lost, and one of which less is, again.

The floor is high, so that after a little code the first layer loses most of the softmax. After a long row of random
digits, where the same floor is a smaller weight, no layer does.
"""

from __future__ import annotations

import argparse
import inspect
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from transformers import AutoTokenizer

from tests.e2e.generate import ENVIRONMENT
from tests.e2e.ports import free_port
from tests.e2e.server import Server, running
from tests.e2e.test_server import metrics
from vllm_toptheta.backend.guard import FIRST_PATIENCE, RELAXATION
from vllm_toptheta.backend.guard_monitor import WINDOW_STEPS

pytestmark = [pytest.mark.e2e, pytest.mark.soak, pytest.mark.timeout(900)]

LIMIT = 0.25  # guard_share
LONG = 1500  # tokens


@pytest.fixture(scope="module")
def guarded(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A plain `vllm serve`."""
    port = free_port()
    options = {"toptheta": {"weight_floor": 5, "max_lost_mass": 0.5, "guard_share": LIMIT, "min_context": 0}}
    command = ["vllm", "serve", str(model), "--attention-backend", "toptheta", "--port", str(port)]
    command += ["--additional-config", json.dumps(options), "--served-model-name", "smollm2-135m-instruct"]
    command += ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", "8"]
    with running(command, port, tmp_path_factory.mktemp("guarded"), ENVIRONMENT) as server:
        yield server


class Stretch(NamedTuple):
    """What the guard has seen at the end of an answer, and the metrics of that answer.

    Attributes:
        lost_mass: Mean over the answer's tokens and heads, by layer.
        share_above: Of the last window's tokens, by layer.
        lowered_by: Of the thresholds, by layer.
        alarms: So far, by layer.
    """

    lost_mass: dict[int, float]
    share_above: dict[int, float]
    lowered_by: dict[int, float]
    alarms: dict[int, float]


def decode(server: Server, prompt: list[int]) -> Stretch:
    """Decode a little more than a window of tokens."""
    before = metrics(server.get("/metrics").text)
    server.post("/v1/completions", prompt=prompt, max_tokens=WINDOW_STEPS + 4, temperature=0, ignore_eos=True)
    stats = server.stats()
    after = metrics(server.get("/metrics").text)
    layers = [state["layer"] for state in stats["guarded"]]

    def per_layer(name: str) -> dict[int, float]:
        return {layer: after[name, str(layer)] for layer in layers}

    sums, counts = (
        {layer: total - before[name, str(layer)] for layer, total in per_layer(name).items()}
        for name in ("toptheta_lost_mass_sum", "toptheta_lost_mass_count")
    )
    return Stretch(
        lost_mass={layer: sums[layer] / counts[layer] for layer in layers},
        share_above={state["layer"]: state["share_above"] for state in stats["guarded"]},
        lowered_by=per_layer("toptheta_guard_lowered_by"),
        alarms=per_layer("toptheta_guard_alarms_total"),
    )


def decode_until(done: Callable[[Stretch], bool], server: Server, prompt: list[int], *, most: int) -> list[Stretch]:
    """Decode stretches up to one that satisfies `done`."""
    stretches = [decode(server, prompt)]
    while not done(stretches[-1]):
        assert len(stretches) < most, stretches[-1]
        stretches.append(decode(server, prompt))
    return stretches


def test_lost_mass_returns_into_range_and_thresholds_return_later(guarded: Server, model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    code = tokenizer(inspect.getsource(argparse), truncation=True, max_length=300)["input_ids"]
    chance = random.Random(0)  # noqa: S311 - nothing is secret
    digits = [chance.choice(tokenizer("0123456789")["input_ids"]) for _ in range(LONG)]

    quiet = [decode(guarded, digits) for _ in range(2)][-1]
    assert len(quiet.lowered_by) == 30
    assert set(quiet.lowered_by.values()) == {0.0} == set(quiet.alarms.values())
    assert max(quiet.share_above.values()) <= LIMIT

    first = decode_until(lambda seen: any(seen.alarms.values()), guarded, code, most=4)[-1]
    alarmed = [layer for layer, alarms in first.alarms.items() if alarms]
    for layer in alarmed:
        assert first.lost_mass[layer] > quiet.lost_mass[layer]
        assert first.share_above[layer] > LIMIT
        assert first.lowered_by[layer] == RELAXATION[1]

    # thresholds are lowered until every layer is in range
    settled = decode_until(lambda seen: max(seen.share_above.values()) <= LIMIT, guarded, code, most=10)[-1]
    for layer in alarmed:
        assert settled.lost_mass[layer] < first.lost_mass[layer]
    lowered = {layer: by for layer, by in settled.lowered_by.items() if by}
    assert set(alarmed) <= set(lowered)

    def has_returned(seen: Stretch) -> bool:
        return any(seen.lowered_by[layer] < by for layer, by in lowered.items())

    # not at once, yet after a calm while, and without another alarm
    back = decode_until(has_returned, guarded, digits, most=FIRST_PATIENCE + 3)
    assert len(back) >= FIRST_PATIENCE - 1
    assert back[-1].alarms == back[0].alarms
    assert all(back[-1].lowered_by[layer] <= by for layer, by in lowered.items())
    log = guarded.log.read_text()
    assert all(f"toptheta: in layer {layer}, " in log for layer in alarmed)
    assert "thresholds are lowered by 0.5" in log
