"""`toptheta thresholds import` and `export`: what they print, where, and what they leave behind."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.calibration.tiny_model import save_model_dir, write_text
from tests.evaluation.tiny_store import tiny_store
from tests.interchange.paper_file import th_lines, write_lines
from vllm_toptheta import cli, store
from vllm_toptheta.calibration.model import load_model

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `toptheta thresholds` with these arguments; return exit code, stdout and stderr."""

    def run_main(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["toptheta", "thresholds", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        printed = capsys.readouterr()
        return int(caught.value.code or 0), printed.out, printed.err

    return run_main


def test_import_says_what_is_missing(run: Run, tmp_path: Path) -> None:
    model = save_model_dir(tmp_path / "tiny")
    file = write_lines(tmp_path / "th.txt", th_lines(layers=range(4)))
    out = tmp_path / "out"
    code, printed, told = run(
        *("import", file, "--model", model, "--placement", "pre_softmax", "--out", out),
        *("--model-id", "acme/tiny", "--dense-layers", "0,1"),
    )
    assert code == 0
    assert printed == f"wrote {out / 'acme--tiny'}\n"
    assert told.count("note: ") == 4
    manifest = store.load(out / "acme--tiny").manifest
    assert manifest.dense_layers == (0, 1)
    assert manifest.calibration.command.startswith("toptheta thresholds import th.txt --model tiny --placement")
    code, printed, _ = run("show", out / "acme--tiny")
    assert code == 0
    assert "th.txt" in printed
    assert "None" not in printed


def test_import_refuses_with_a_line_number(run: Run, tmp_path: Path) -> None:
    model = save_model_dir(tmp_path / "tiny")
    file = write_lines(tmp_path / "th.txt", ["L0_H0:40 1.0 3 8", "nonsense"])
    code, _, told = run("import", file, "--model", model, "--placement", "pre_softmax", "--out", tmp_path / "out")
    assert code == 2
    assert f"error: {file}: line 2: expected " in told
    config = tmp_path / "config.json"
    code, _, told = run("import", config, "--model", model, "--placement", "pre_softmax", "--out", tmp_path / "out")
    assert code == 2
    assert "relative to the largest score of each row" in told


def test_export_says_what_is_lost(run: Run, tmp_path: Path) -> None:
    model = save_model_dir(tmp_path / "tiny")
    tiny_store(tmp_path / "stores" / "org--tiny", load_model(model), only_layers=(2, 3))
    texts = [write_text(tmp_path / f"{name}.txt", 300, seed) for seed, name in enumerate("ab")]
    out = tmp_path / "skip_softmax.json"
    code, printed, told = run(
        *("export", model, "--text", *texts, "--out", out, "--thresholds", tmp_path / "stores"),
        *("--length", 400, "--sequences", 1),
    )
    assert code == 0, told
    assert printed == f"wrote {out}\n"
    assert told.count("lost: ") == 6
    config = json.loads(out.read_text())["sparse_attention_config"]
    assert [f"lost: {line}" for line in told.splitlines() if line.startswith("lost: ")] == [
        f"lost: {line}" for line in config["comment"][1:]
    ]
