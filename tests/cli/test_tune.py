"""The command `toptheta tune`, as a user types it, and what `toptheta thresholds` shows of its store."""

from pathlib import Path

import pytest

from tests.calibration.tiny_model import write_text
from tests.cli.running import Run, runner
from tests.cli.test_main import imported
from vllm_toptheta import store
from vllm_toptheta.evaluation import read_tuned, tuned_file


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `toptheta` with these arguments; returns exit code, stdout and stderr."""
    return runner(monkeypatch, capsys)


@pytest.fixture
def tune(run: Run, folder: Path, tmp_path: Path) -> Run:
    """Runs `toptheta tune` on the tiny model."""
    text = write_text(tmp_path / "held-out.txt", 900, seed=7)
    sizes = (
        "--dtype",
        "float32",
        "--lengths",
        200,
        "--sequences",
        4,
        "--window",
        32,
        "--floors",
        "0.05,0.3,1",
        "--device",
        "cpu",
    )

    def run_tune(*arguments: object) -> tuple[int, str, str]:
        out = ("--out", tmp_path / "stores", "--model-id", "acme/tiny")
        return run("tune", folder / "tiny", "--text", f"prose={text}", *sizes, *out, *arguments)

    return run_tune


def test_help_imports_nothing_heavy() -> None:
    assert imported("tune", "--help") == ""


def test_a_store_with_the_evidence(tune: Run, run: Run, tmp_path: Path) -> None:
    code, out, err = tune(
        "--max-kl", 0.05, "--presets", "--equal-rows", 0.3, "--json", tmp_path / "more" / "tuned.json"
    )
    assert code == 0, err
    folder = tmp_path / "stores" / "acme--tiny"
    evidence = store.load(folder).manifest.evidence("values")
    assert evidence is not None
    assert [promise.preset for promise in evidence.promises] == [None, "high", "exact", "fast"]
    assert evidence.served.max_kl == 0.05
    # where files lay is nobody's business
    assert evidence.command.startswith("toptheta tune tiny --text prose=held-out.txt --dtype float32 ")
    assert str(tmp_path) not in evidence.command
    assert evidence.line in out
    assert f"wrote {folder} and acme--tiny.tune-values.json; peak memory " in out
    assert f"toptheta report {folder} --out report.html" in out
    assert {file.name for file in (tmp_path / "stores").iterdir()} == {"acme--tiny", "acme--tiny.tune-values.json"}
    record = tuned_file(folder, "values")
    assert record.read_bytes() == (tmp_path / "more" / "tuned.json").read_bytes()
    tuned = read_tuned(record)
    assert tuned.evidence == evidence
    assert [(one.variant.method, one.equal_rows) for one in tuned.ladder.lengths[0].comparisons] == [
        *[("top_theta", None)] * 3,
        ("top_k", "floor:0.3"),
    ]
    served = f"floor:{evidence.served.weight_floor:g}"
    (confirmed,) = [one for one in tuned.confirmations[0].lengths[0].comparisons if one.variant.target == served]
    assert confirmed.change_percent == evidence.served.measured[0].change_percent

    code, shown, err = run("thresholds", "show", folder)
    assert code == 0, err
    assert "quality in mode values" in shown
    assert f"sha256 {evidence.text[0].sha256}" in shown
    assert evidence.weights_sha256 is not None
    for word in (evidence.weights_sha256, evidence.command, "nothing", "KL to dense attention within 0.05"):
        assert word in shown, word
    assert "not kept: exact, perplexity within 0.05 %: 4 sequences let expect of 4 that with floor:0.05 at" in shown
    one = evidence.served.worst
    assert f"{one.kl_divergence:.6f} +- {one.kl_error:.6f}" in shown
    code, listed, _ = run("thresholds", "list", "--thresholds", tmp_path / "stores")
    assert code == 0
    assert "values: KL to dense attention within 0.05" in listed

    before = store.load(folder).manifest.quality
    code, out, err = tune("--max-kl", 0.05, "--mode", "shadow", "--heavy", 0.01)
    assert code == 0, err
    assert "--mode shadow --shadow-values on --heavy 0.01" in out
    assert [one.mode for one in store.load(folder).manifest.quality or ()] == ["values", "shadow"]
    assert (store.load(folder).manifest.quality or ())[:1] == before


def test_tasks_are_tried_with_the_floors_that_are_kept(tune: Run, run: Run, tmp_path: Path) -> None:
    code, out, err = tune("--max-kl", 0.05, "--lengths", 400, "--tasks", "needle,key-value", "--questions", 4)
    assert code == 0, err
    assert "needle, 400 tokens" in err
    folder = tmp_path / "stores" / "acme--tiny"
    evidence = store.load(folder).manifest.evidence("values")
    assert evidence is not None
    assert read_tuned(tuned_file(folder, "values")).evidence == evidence
    probes = evidence.served.probes or ()
    assert [(one.task, one.length, one.num_questions) for one in probes] == [("needle", 400, 4), ("key-value", 400, 4)]
    code, shown, err = run("thresholds", "show", folder)
    assert code == 0, err
    for printed in (out, shown):
        assert "recall with the floors that are kept: shown, not promised" in printed
        # its weights are random
        assert printed.count("tells nothing of this model at this length") == 2
    assert {file.name for file in (tmp_path / "stores").iterdir()} == {"acme--tiny", "acme--tiny.tune-values.json"}


def test_refusals_leave_no_store(tune: Run, run: Run, folder: Path, tmp_path: Path) -> None:
    for arguments, words in (
        (("--sequences", 50), "error: text: the texts have "),
        (("--heavy", 0.1), "error: --heavy: keys are heavy in mode shadow only"),
        (
            ("--mode", "shadow", "--equal-rows", 1),
            "error: equal_rows: what copies read is not compared with exact top-k",
        ),
        (("--model-id", "../up"), "error: --model-id: got "),
        (
            ("--tasks", "needle", "--engine", "vllm", "--device", "auto"),
            "error: --tasks: --engine vllm measures windows of texts only, and ",
        ),
        (("--engine", "vllm"), "error: --device: vLLM runs on the device that it was built for"),
        (("--questions", 9), "error: --questions: there are no questions without --tasks"),
        (("--tasks", "needle", "--questions", 1), "error: --questions: 1 questions of each task and length. Ask for 4"),
        (("--tasks", "human-eval"), "error: --tasks: no task that floors are tried on: 'human-eval'. Choose needle, "),
        # before anything is measured
        (("--tasks", "needle", "--max-loss", 1e-5), "error: lengths: the text is too short, or the length too small"),
    ):
        code, out, err = tune(*arguments)
        assert (code, out) == (2, "")
        assert words in err
        assert not list((tmp_path / "stores").glob("*"))
    code, _, err = run("tune", folder / "tiny", "--out", tmp_path)
    assert code == 2
    assert "--text: nothing to measure on" in err


def test_a_promise_that_is_not_kept_shows_what_was_measured(tune: Run, tmp_path: Path) -> None:
    code, out, err = tune("--max-loss", 1e-5)
    assert code == 2
    assert "error: max_loss: perplexity within 1e-05 %: 4 sequences let expect of 4 that with floor:0.05 at 200" in err
    for floor in ("0.05", "0.3", "1"):
        assert f"floor:{floor} " in out
    assert not list((tmp_path / "stores").glob("*"))


def test_another_run_in_the_way_is_named_and_can_be_forgotten(tune: Run, tmp_path: Path) -> None:
    other = tmp_path / "stores" / ".acme--tiny.tune-values" / "choosing"
    other.mkdir(parents=True)
    (other / "arguments.json").write_text("{}")
    code, _, err = tune("--max-kl", 0.05)
    assert code == 2
    assert "start anew with --no-resume" in err
    code, out, err = tune("--max-kl", 0.001, "--no-resume")
    assert code == 0, err
    assert "larger ones (--floors) may keep the promise too" not in out
    code, out, err = tune("--max-kl", 1)
    assert code == 0, err
    assert "larger ones (--floors) may keep the promise too" in out


def test_a_record_that_cannot_be_written_leaves_the_measurements_and_no_store(tune: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = tune("--max-kl", 1, "--json", tmp_path / "file" / "tuned.json")
    assert code == 2
    assert "--json: cannot be written: " in err
    assert [file.name for file in (tmp_path / "stores").iterdir()] == [".acme--tiny.tune-values"]
