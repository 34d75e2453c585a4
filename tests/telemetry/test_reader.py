"""How often the engine is asked, and what is served when it does not answer."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from tests.telemetry.ranks import Engine, counted, rank
from vllm_toptheta.telemetry import reader
from vllm_toptheta.telemetry.reader import STATS_RPC, NotServing, StatsReader, StatsUnavailable


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, in the list's only place."""
    now = [1000.0]
    monkeypatch.setattr(reader, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


class SlowEngine(Engine):
    """An engine that answers when it is let."""

    def __init__(self, answers: list[dict[str, Any] | None]) -> None:
        super().__init__(answers)
        self.may_answer = asyncio.Event()

    async def collective_rpc(self, method: str) -> list[dict[str, Any] | None]:
        answers = await super().collective_rpc(method)
        await self.may_answer.wait()
        return answers


def test_an_answer_is_served_again_for_a_while(clock: list[float]) -> None:
    engine = Engine([rank(counted(1, [0], [[5]], 0.1))])
    stats = StatsReader(engine)

    async def reads() -> None:
        first = await stats.read()
        clock[0] += reader.MAX_AGE / 2
        assert await stats.read() is first
        assert engine.questions == 1
        clock[0] += reader.MAX_AGE
        assert await stats.read() is not first
        assert engine.questions == 2

    asyncio.run(reads())


def test_many_at_once_ask_one_question() -> None:
    async def reads() -> int:
        engine = SlowEngine([rank(counted(1, [0], [[5]], 0.1))])
        stats = StatsReader(engine)
        waiting = [asyncio.create_task(stats.read()) for _ in range(20)]
        await asyncio.sleep(0)
        engine.may_answer.set()
        assert len({id(answer) for answer in await asyncio.gather(*waiting)}) == 1
        return engine.questions

    assert asyncio.run(reads()) == 1


def test_while_the_engine_is_busy_the_last_answer_is_served(clock: list[float]) -> None:
    async def reads() -> None:
        engine = SlowEngine([rank(counted(1, [0], [[5]], 0.1))])
        stats = StatsReader(engine, patience=0.02)
        with pytest.raises(StatsUnavailable, match="busy"):
            await stats.read()
        engine.may_answer.set()
        first = await stats.read()
        engine.may_answer.clear()
        clock[0] += 10
        assert await stats.read() is first
        assert engine.questions == 2
        engine.may_answer.set()
        await asyncio.sleep(0.02)
        # that question has been answered meanwhile, so its answer is fresh
        assert await stats.read() is not first
        assert engine.questions == 2

    asyncio.run(reads())


def test_a_reader_that_goes_away_leaves_the_question_to_others() -> None:
    async def reads() -> None:
        engine = SlowEngine([rank(counted(1, [0], [[5]], 0.1))])
        stats = StatsReader(engine)
        gone, stays = asyncio.create_task(stats.read()), asyncio.create_task(stats.read())
        await asyncio.sleep(0)
        gone.cancel()
        engine.may_answer.set()
        assert (await stays).decode_tokens == 1
        assert engine.questions == 1

    asyncio.run(reads())


@pytest.mark.parametrize(
    ("answers", "error", "words"),
    [
        ([None, None], NotServing, "--attention-backend toptheta"),
        (RuntimeError("dead"), StatsUnavailable, "does not answer"),
    ],
)
def test_no_statistics(answers: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        asyncio.run(StatsReader(Engine(answers)).read())


def test_a_failure_is_not_served_again() -> None:
    engine = Engine(RuntimeError("once"))
    stats = StatsReader(engine)

    async def reads() -> int:
        with pytest.raises(StatsUnavailable):
            await stats.read()
        engine.answers = [rank(counted(1, [0], [[5]], 0.1))]
        return (await stats.read()).decode_tokens

    assert asyncio.run(reads()) == 1


def test_all_replicas_are_asked_where_vllm_can() -> None:
    class Core:
        async def call_utility_all_async(self, method: str, *args: Any) -> list[Any]:
            assert (method, args) == ("collective_rpc", (STATS_RPC, None, (), None))
            return [[rank(counted(1, [0], [[5]], 0.1)), rank(counted(1, [1], [[5]], 0.1))] for _ in range(2)]

    client = SimpleNamespace(engine_core=Core())
    assert asyncio.run(StatsReader(client).read()).decode_tokens == 2


def test_the_arguments_are_those_of_vllms_engine() -> None:
    import inspect

    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.core_client import AsyncMPClient

    assert list(inspect.signature(EngineCore.collective_rpc).parameters) == [
        *("self", "method", "timeout", "args", "kwargs"),
    ]
    assert hasattr(AsyncMPClient, "call_utility_all_async")
