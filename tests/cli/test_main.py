"""The command `toptheta`: what it prints, where, and how fast it is up."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.cli.running import Run, runner
from tests.store_factory import make_store


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `toptheta` with these arguments; return exit code, stdout and stderr."""
    return runner(monkeypatch, capsys)


@pytest.fixture
def stores(tmp_path: Path) -> Path:
    make_store(tmp_path / "acme--tiny")
    make_store(tmp_path / "acme--long", model_id="acme/long", max_length=4096, dense_layers=())
    return tmp_path


def break_store(folder: Path) -> None:
    with (folder / "thresholds.safetensors").open("ab") as stream:
        stream.write(b"\0")


PROBE = """
import sys
sys.argv = ["toptheta", *{arguments}]
from vllm_toptheta.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
print(",".join(sorted({{"torch", "vllm", "transformers", "triton", "numpy"}} & sys.modules.keys())))
"""


def imported(*arguments: object) -> str:
    """Return which of the heavy packages a command imports."""
    script = PROBE.format(arguments=[str(argument) for argument in arguments])
    process = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return process.stdout.splitlines()[-1]


def test_help_imports_nothing_heavy() -> None:
    assert imported("--help") == ""
    assert imported("thresholds", "--help") == ""


def test_thresholds_commands_import_no_torch(stores: Path) -> None:
    assert imported("thresholds", "validate", stores / "acme--tiny") == "numpy"


def test_help_answers_within_a_second() -> None:
    command = [
        sys.executable,
        "-c",
        "import sys; sys.argv[1:] = ['--help']; from vllm_toptheta.cli import main; main()",
    ]
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1.0  # the best of three: the machine may be busy with other things


def test_list(run: Run, stores: Path) -> None:
    code, out, err = run("thresholds", "list", "--thresholds", stores)
    assert (code, err) == (0, "")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "acme" in line]
    assert rows == [
        ["acme--long", "acme/long", "8, 32", "up to 4096", "none", "none", "none"],
        ["acme--tiny", "acme/tiny", "8, 32", "up to 1024", "0", "none", "none"],
    ]


def test_list_prints_what_is_valid_and_fails(run: Run, stores: Path) -> None:
    break_store(stores / "acme--long")
    code, out, err = run("thresholds", "list", "--thresholds", stores)
    assert code == 2
    assert "acme--tiny" in out
    assert "acme--long" not in out
    assert err.startswith("error: ")
    assert "sha256" in err


def test_list_takes_the_environment(run: Run, stores: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOPTHETA_THRESHOLDS", str(stores / "acme--tiny"))
    code, out, _ = run("thresholds", "list")
    assert code == 0
    assert "acme--tiny" in out


@pytest.mark.parametrize("by_name", [True, False])
def test_show(run: Run, stores: Path, by_name: bool) -> None:
    named = ("acme/long", "--thresholds", stores) if by_name else (stores / "acme--long",)
    code, out, err = run("thresholds", "show", *named)
    assert (code, err) == (0, "")
    for text in (
        "acme/long",
        "3 layers, 4 query heads, 2 kv heads, head size 16",
        "k:8 from 9 to 4096 tokens",
        "stories.txt",
    ):
        assert text in out
    assert "theta, layer 0, k:32" in out
    assert [word for word in ("512", "2048", "4096") if f"n = {word}" in out] == ["512", "2048", "4096"]


def test_show_says_what_shadow_keys_read(run: Run, tmp_path: Path) -> None:
    for name, num_channels in (("with", 8), ("without", None)):
        make_store(tmp_path / name, num_channels=num_channels)
        _, out, _ = run("thresholds", "show", tmp_path / name)
        line = next(line for line in out.splitlines() if line.startswith("shadow keys:"))
        assert ("for weight_floor 3 from 145 to 1024 tokens; 25.0% of keys" in line) == (name == "with")
        assert line.endswith("none") == (name == "without")


def test_show_of_shadow_keys_alone_prints_no_theta(run: Run, tmp_path: Path) -> None:
    make_store(tmp_path / "acme--tiny", num_channels=8, calibrated=False)
    code, out, err = run("thresholds", "show", tmp_path / "acme--tiny")
    assert (code, err) == (0, "")
    assert "8 channels" in out
    assert "targets:" not in out
    assert "theta, layer" not in out
    code, out, err = run("thresholds", "show", tmp_path / "acme--tiny", "--k", 8)
    assert (code, out) == (2, "")
    assert "calibrated are none. Calibrate with --k 8" in err


def test_show_prints_theta(run: Run, tmp_path: Path) -> None:
    per_layer = np.array([1.25, 2.5, 3.5], np.float32)[:, np.newaxis, np.newaxis, np.newaxis]
    make_store(tmp_path / "acme--tiny", coefficients=per_layer, degree=0)
    _, out, _ = run("thresholds", "show", tmp_path / "acme--tiny", "--layer", 2, "--k", 16)
    assert "theta, layer 2, k:16" in out
    rows = [line.split("│")[1:-1] for line in out.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row] for row in rows] == [[str(head), "3.500", "3.500"] for head in range(4)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer", "3"], "--layer: no layer 3. Choose one from 0 to 2."),
        (["--k", "64"], "no thresholds for k 64; calibrated are 8, 32."),
    ],
)
def test_show_refuses_what_is_not_there(run: Run, stores: Path, arguments: list[str], message: str) -> None:
    code, out, err = run("thresholds", "show", stores / "acme--tiny", *arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_show_without_thresholds_prints_the_calibrate_command(run: Run, stores: Path) -> None:
    code, out, err = run("thresholds", "show", "acme/other", "--thresholds", stores)
    assert (code, out) == (2, "")
    assert "toptheta calibrate acme/other --text FILE... --k 32,64,128,256 --out" in err
    assert "Traceback" not in err


def test_validate(run: Run, stores: Path) -> None:
    code, out, err = run("thresholds", "validate", stores / "acme--tiny", stores / "acme--long")
    assert (code, err) == (0, "")
    assert out.count("valid: ") == 2


def test_validate_prints_every_failure(run: Run, stores: Path) -> None:
    break_store(stores / "acme--long")
    folders = [stores / "acme--long", stores / "acme--tiny", stores / "nowhere"]
    code, out, err = run("thresholds", "validate", *folders)
    assert code == 2
    assert out == f"valid: {stores / 'acme--tiny'}\n"
    assert [line.split(":")[0] for line in err.splitlines()] == ["error", "error"]


def test_validate_against_a_model(run: Run, stores: Path) -> None:
    config = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    model = stores / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config))
    assert run("thresholds", "validate", stores / "acme--tiny", "--model", model)[0] == 0
    (model / "config.json").write_text(json.dumps({**config, "head_dim": 32}))
    code, out, err = run("thresholds", "validate", stores / "acme--tiny", "--model", model)
    assert (code, out) == (2, "")
    assert "architecture.head_size: calibrated on a model with 16, but this model has 32" in err
    code, _, err = run("thresholds", "validate", stores / "acme--tiny", "--model", stores)
    assert code == 2
    assert "config.json: cannot be read" in err
