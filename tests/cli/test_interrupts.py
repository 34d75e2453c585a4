"""Ctrl-C and SIGTERM: one line that says what is kept, an exit code, and nothing half done."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.calibration.tiny_model import save_model_dir, write_text
from tests.cli.running import Run, runner
from vllm_toptheta import cli, store
from vllm_toptheta.calibration.state import Checkpoint

MAIN = sys.modules[cli.main.__module__]  # the package's name for it is that of the function
HANDLERS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def _signals_are_not_ignored() -> Iterator[None]:
    """Tests that run in the background of a shell inherit that SIGINT is ignored, and the command respects that."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in HANDLERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `toptheta` with these arguments; return exit code, stdout and stderr."""

    run_main = runner(monkeypatch, capsys)

    def run_and_restore(*arguments: object) -> tuple[int, str, str]:
        before = [signal.getsignal(number) for number in HANDLERS]
        found = run_main(*arguments)
        assert [signal.getsignal(number) for number in HANDLERS] == before
        return found

    return run_and_restore


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        (("calibrate", "tiny"), "the finished passes are kept, and the same command goes on there"),
        (("tune", "tiny"), "the finished sequences are kept, and the same command goes on there"),
        (("eval", "decode", "tiny"), "are kept where --output was given"),
        (("eval", "perplexity", "tiny"), "nothing is kept, and the same command starts anew"),
        (("eval", "tasks", "tiny"), "nothing is kept"),
        (("report", "tiny"), "nothing is kept"),
        (("bench", "record", "tiny"), "nothing is kept"),
        ((), "nothing is kept"),
    ],
)
@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_is_one_line(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    kept: str,
    number: signal.Signals,
    expected: int,
) -> None:
    cleaned = []

    def work() -> None:
        try:
            os.kill(os.getpid(), number)
        finally:
            cleaned.append(signal.getsignal(number))

    monkeypatch.setattr(MAIN, "app", work)
    code, out, err = run(*arguments)
    assert (code, out) == (expected, "")
    assert err.startswith("interrupted: ")
    assert kept in err
    assert err.count("\n") == 1
    assert cleaned == [signal.SIG_DFL]  # a second one ends whatever hangs


def test_a_signal_that_is_ignored_stays_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        monkeypatch.setattr(MAIN, "app", lambda: sys.exit(os.kill(os.getpid(), signal.SIGINT)))
        assert run("calibrate")[0] == 0
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", HANDLERS)
def test_a_calibration_goes_on_where_it_was_interrupted(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    model, text = save_model_dir(tmp_path / "tiny"), write_text(tmp_path / "words.txt", 200)
    arguments = ("calibrate", model, "--text", text, "--k", 8, "--max-length", 200, "--sequences", 2)
    assert run(*arguments, "--out", tmp_path / "whole")[0] == 0
    save = Checkpoint.save

    def save_once(checkpoint: Checkpoint, passes_done: int, arrays: dict[str, object]) -> None:
        save(checkpoint, passes_done, arrays)  # type: ignore[arg-type]
        os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", save_once)
        code, _, err = run(*arguments, "--out", tmp_path / "out")
    assert code == 128 + number
    assert "Traceback" not in err
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == [".tiny.calibration"]
    assert run(*arguments, "--out", tmp_path / "out")[0] == 0
    whole, resumed = (store.load(tmp_path / name / "tiny").manifest for name in ("whole", "out"))
    assert resumed.tensors == whole.tensors
