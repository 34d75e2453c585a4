"""The command `toptheta calibrate`, on a tiny model."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

from tests.calibration.tiny_model import save_model_dir, tiny_config, tiny_model, write_text
from tests.cli.running import Run, runner
from vllm_toptheta import cli, store

SMALL = ("--max-length", 200, "--sequences", 1)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `toptheta calibrate` on a tiny model; return exit code, stdout and stderr."""
    model = save_model_dir(tmp_path / "tiny")
    capsys.readouterr()
    return runner(monkeypatch, capsys, "calibrate", model, "--out", tmp_path / "out")


def assert_served(out: str, words: str) -> None:
    """The command that was printed last is accepted by the check of the server."""
    *_, line = out.splitlines()
    hint = line.removeprefix("serve it: ")
    assert words in hint
    _, *arguments = shlex.split(hint)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["toptheta", *arguments, "--check"])
        with pytest.raises(SystemExit) as caught:
            cli.main()
    assert not caught.value.code


def test_the_command_that_is_printed_is_accepted_by_the_server(run: Run, tmp_path: Path) -> None:
    save_model_dir(tmp_path / "tiny", tiny_model(tiny_config(head_dim=64)))
    words = write_text(tmp_path / "words.txt", num_words=600)
    arguments = ("--text", words, *SMALL, "--max-length", 300, "--model-id", "acme/other name")
    assert run(*arguments, "--mode", "shadow")[0] == 2  # no hub id
    code, out, err = run(*arguments[:-1], "acme/other", "--mode", "shadow", "--k", "8,16")
    assert code == 0, err
    assert "--target k:16" in out
    assert_served(out, "--mode shadow")


def test_what_no_server_takes_is_said(run: Run, tmp_path: Path) -> None:
    words = write_text(tmp_path / "words.txt", num_words=100)
    _, out, _ = run("--text", words, "--k", "8", "--placement", "post_softmax", *SMALL)
    assert "not served: " in out
    assert "serving compares scores before the softmax" in out


def test_targets_and_texts_of_all_kinds(run: Run, tmp_path: Path) -> None:
    words = write_text(tmp_path / "words.txt", num_words=100)
    lines = tmp_path / "lines.jsonl"
    lines.write_text(
        json.dumps({"body": write_text(tmp_path / "others.txt", num_words=100, seed=1).read_text()}) + "\n"
    )
    code, out, _ = run(
        *("--text", words, lines, "--text-field", "body", "--k", "16,8"),
        *("--dense-layers", "0", "--top-k", "each", "--dtype", "bfloat16", *SMALL),
    )
    assert code == 0
    assert f"wrote {tmp_path / 'out' / 'tiny'}" in out
    assert_served(out, "--target k:16")
    manifest = store.load(tmp_path / "out" / "tiny").manifest
    assert manifest.labels == ("k:8", "k:16")
    assert manifest.dense_layers == (0,)
    assert [text.name for text in manifest.calibration.text] == ["words.txt", "lines.jsonl"]
    assert manifest.calibration.dtype == "bfloat16"
    assert manifest.calibration.command.startswith("toptheta calibrate tiny --out out --text words.txt lines.jsonl")


def test_a_model_that_gpus_have_no_kernels_for_is_calibrated_with_a_warning(run: Run, tmp_path: Path) -> None:
    code, _, err = run("--text", write_text(tmp_path / "words.txt", num_words=100), "--k", 8, *SMALL)
    assert code == 0
    assert "will serve on CPUs only, because there are no GPU kernels for heads of " in err


def test_shadow_keys_are_calibrated_if_they_are_asked_for(run: Run, tmp_path: Path) -> None:
    words = write_text(tmp_path / "words.txt", num_words=600)
    options = ("--channels", 8, "--weight-floor", 2, "--candidate-mass", 0.95)
    code, _, err = run("--text", words, "--mode", "shadow", *options, *SMALL, "--max-length", 300)
    assert code == 0, err
    loaded = store.load(tmp_path / "out" / "tiny")
    assert loaded.calibrated is None
    section = loaded.shadow.section
    assert (section.num_channels, section.weight_floor) == (8, 2.0)
    assert section.candidate_mass == 0.95


def test_without_a_text_python_itself_is_read(run: Run, tmp_path: Path) -> None:
    code, _, _ = run("--k", 8, *SMALL)
    assert code == 0
    names = [text.name for text in store.load(tmp_path / "out" / "tiny").manifest.calibration.text]
    assert len(names) == 24
    assert all(name.endswith(".py") for name in names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--k", "many"), "--k: not whole numbers: 'many'"),
        (("--dense-layers", "first"), "--dense-layers: not whole numbers: 'first'"),
        (("--k", "8", "--device", "cuda:99"), "no device cuda:99"),
        (("--k", "8", "--text", "nowhere.txt"), "nowhere.txt: cannot be read"),
        (("--k", "500"), "k 500 needs rows of more than 500 tokens"),
        (
            ("--k", "8", "--mode", "shadow", "--max-length", "300", "--channels", "18"),
            "num_channels: 18 channels of keys with 16 numbers",
        ),
        (
            ("--mode", "shadow", "--max-length", "300", "--channels", "48"),
            "num_channels: 48 channels of keys with 16 numbers",
        ),
        (("--mode", "shadow"), "shadow keys need sequences of at least 288 tokens"),
    ],
)
def test_what_cannot_work_is_one_line(run: Run, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = run(*SMALL, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.splitlines()[-1].startswith("error: ")
