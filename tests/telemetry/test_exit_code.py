"""A process whose engine died ends with another exit code than one that was asked to stop."""

from __future__ import annotations

import pytest

from vllm_toptheta.telemetry.exit_code import ENGINE_DIED, fail_when_engine_died


class Engine:
    """vLLM's client: once it is shut down, it looks like one whose engine has died."""

    def __init__(self, *, errored: bool) -> None:
        self.errored = errored
        self.timeouts: list[float | None] = []

    def shutdown(self, timeout: float | None = None) -> None:
        self.errored = True
        self.timeouts.append(timeout)


def test_an_engine_that_was_asked_to_stop() -> None:
    engine = Engine(errored=False)
    fail_when_engine_died(engine)
    engine.shutdown(timeout=60)
    engine.shutdown()
    assert engine.timeouts == [60, None]


def test_an_engine_that_died() -> None:
    engine = Engine(errored=True)
    fail_when_engine_died(engine)
    with pytest.raises(SystemExit) as caught:
        engine.shutdown(timeout=0)
    assert caught.value.code == ENGINE_DIED != 0
    engine.shutdown()
    assert engine.timeouts == [0, None]
