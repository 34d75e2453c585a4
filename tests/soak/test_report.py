"""What a soak's report calls a failure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from vllm_toptheta.soak.client import HELD, Outcome
from vllm_toptheta.soak.memory import Memory, ProcessMemory
from vllm_toptheta.soak.report import Endings, Load, SoakConfig, SoakReport, Stop, soak_table
from vllm_toptheta.soak.texts import Texts

CLEAN = Endings(finished=9, left=1)
REFUSED = Endings(finished=3, error=2, closed=4)
BROKEN = Endings(finished=3, broken=1, details=["broken: silence"])


def memory(growth: float) -> Memory:
    one = ProcessMemory(name="all", first_mib=1000, last_mib=1000 + 10 * growth, mib_per_minute=growth)
    return Memory(minutes=10, samples=600, processes=[one])


def stop(**changes: Any) -> Stop:
    fields = {"signal": "SIGTERM", "seconds": 3.0, "exit_code": 0, "orphans": 0, "in_flight": CLEAN, "later": CLEAN}
    return Stop.model_validate(fields | changes)


def report(load: Endings = CLEAN, held: float = 0.0, different: tuple[str, ...] = (), **changes: Any) -> SoakReport:
    texts = Texts(compared=10, tokens=99, equal=10, near_ties=0, different=list(different), largest_gap=0.0)
    fields: dict[str, Any] = {"memory": memory(0.5), "stops": [stop()]} | changes
    return SoakReport(
        config=SoakConfig(),
        device="a CPU",
        command="toptheta serve model",
        versions={"vllm": "0.32"},
        environment={"VLLM_CPU_KVCACHE_SPACE": "1"},
        prompt_tokens=(16, 3000),
        load=Load(seconds=600, endings=load, preemptions=3, held={HELD[0]: held}),
        texts={"as served": texts, "dense": texts.model_copy(update={"different": []})},
        **fields,
    )


def test_endings_are_counted(make_outcome: Callable[..., Outcome]) -> None:
    outcomes = [
        make_outcome(),
        make_outcome(ending="closed", detail="cut"),
        make_outcome(ending="closed", detail="cut"),
    ]
    endings = Endings.of(outcomes)
    assert (endings.finished, endings.closed, endings.total) == (1, 2, 3)
    assert endings.details == ["closed: cut"]


def test_a_clean_run_passes() -> None:
    assert report().failures() == []
    assert report(memory=None, stops=[]).failures() == []
    # a server that is stopped or killed may turn requests away
    assert (
        report(stops=[stop(later=REFUSED), stop(signal="SIGKILL of Worker", exit_code=1, in_flight=REFUSED)]).failures()
        == []
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"load": REFUSED}, "under load: 2 error, 4 closed"),
        ({"load": BROKEN}, "broken: silence"),
        ({"held": 2.0}, f"{HELD[0]} stays at 2"),
        ({"different": ("prompt 3, token 4",)}, "as served: 1 texts differ from the quiet server's: prompt 3"),
        ({"memory": memory(2.5)}, "memory grows by 2.50 MiB per minute"),
        ({"stops": [stop(in_flight=BROKEN)]}, "SIGTERM: 1 broken"),
        ({"stops": [stop(later=BROKEN)]}, "SIGTERM: 1 broken"),
        ({"stops": [stop(after=REFUSED)]}, "SIGTERM: 2 error, 4 closed"),
        ({"stops": [stop(exit_code=None)]}, "SIGTERM: the server did not end"),
        ({"stops": [stop(orphans=2)]}, "2 processes outlived the server"),
        ({"stops": [stop(signal="SIGKILL of Worker")]}, "SIGKILL of Worker: the server ended with exit code 0"),
    ],
)
def test_failures(changes: dict[str, Any], words: str) -> None:
    (failure,) = report(**changes).failures()
    assert words in failure


def test_the_table_says_all_of_it() -> None:
    console = Console(width=200, record=True, file=None, quiet=False)
    with console.capture() as captured:
        console.print(soak_table(report(stops=[stop(after=CLEAN), stop(signal="SIGKILL of Worker", exit_code=1)])))
    text = captured.get()
    for words in ("10 requests of 16 to 3000 tokens", "preemptions: 3", "SIGKILL of Worker", "+0.50 MiB", "passed"):
        assert words in text
