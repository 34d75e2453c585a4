"""`toptheta soak` in a short form: the long one is in docs/operations.md, its result under docs/results.

`max_growth` is left out of it: a server that has just started is still warming up.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.generate import ENVIRONMENT
from tests.e2e.ports import free_port
from vllm_toptheta.soak.report import SoakConfig
from vllm_toptheta.soak.run import soak

pytestmark = [pytest.mark.e2e, pytest.mark.soak, pytest.mark.timeout(900)]

# a dozen prompts fit, their answers do not: however fast the machine, some requests are preempted
SMALL_CACHE = ["--block-size", "16", "--num-gpu-blocks-override", "66", "--max-model-len", "1000"]
SHORT = SoakConfig(
    requests=30,
    concurrency=12,
    seconds=5,
    prompts=8,
    longest=300,
    max_tokens=120,
    choices=["dense", "floor:0.2"],
    max_growth=1e6,  # seconds of load say nothing of it
    kill="EngineCore",
)


def test_load_restart_and_death_of_the_engine(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    port = str(free_port())
    command = ["toptheta", "serve", str(model), "--port", port, "--dtype", "float32", "--enforce-eager"]
    command += ["--max-num-seqs", "16", "--shutdown-timeout", "60", *SMALL_CACHE]
    # a preempted sequence is read again as a prompt is, densely: with so low a floor, its text is the same
    command += ["--weight-floor", "0.1", "--min-context", "0"]
    # a guard that only warns, and does so: it must not change a text
    command += ["--guard", "warn", "--max-lost-mass", "0.002", "--guard-share", "0.01"]
    report = soak(SHORT, f"http://127.0.0.1:{port}", command, log=tmp_path / "log.txt")
    assert report.failures() == []
    assert report.load.endings.total >= SHORT.requests
    assert report.load.endings.left > 0
    assert report.load.preemptions
    assert sorted(report.texts) == ["as served", "dense", "floor:0.2"]
    assert sum(texts.compared for texts in report.texts.values()) > SHORT.requests
    assert all(texts.compared for texts in report.texts.values())
    stop, death = report.stops
    assert stop.exit_code == 0
    assert stop.in_flight.finished > 0
    assert stop.after is not None
    assert stop.after.finished >= 1
    assert death.exit_code == 1
    assert death.in_flight.error > 0
    assert death.seconds < 30
    log = (tmp_path / "log.txt").read_text()
    assert "with guard=relax, thresholds are lowered by 0.5" in log
