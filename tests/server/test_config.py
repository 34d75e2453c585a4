"""The configuration file: what it may say, and how it says no."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_toptheta.errors import SettingsError
from vllm_toptheta.server.config import MAX_BYTES, ServerConfig


def write(folder: Path, text: str) -> Path:
    file = folder / "serve.yaml"
    file.write_text(text)
    return file


def test_model_options_and_flags(tmp_path: Path) -> None:
    config = ServerConfig.load(write(tmp_path, "model: acme/tiny\nweight_floor: 2.5\nvllm:\n  port: 1\n"))
    assert (config.model, config.options, config.vllm) == ("acme/tiny", {"weight_floor": 2.5}, {"port": 1})


def test_relative_paths_start_at_the_file(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, "model: models/tiny\nthresholds: stores\n")
    monkeypatch.chdir(model)
    config = ServerConfig.load(file)
    assert (config.model, config.options["thresholds"]) == (str(model), str(tmp_path / "stores"))


def test_a_path_of_the_environment_is_no_part_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOPTHETA_THRESHOLDS", "elsewhere")
    assert ServerConfig.load(write(tmp_path, "weight_floor: 2.5\n")).options == {"weight_floor": 2.5}


@pytest.mark.parametrize(
    ("text", "field", "words"),
    [
        ("weightfloor: 3", "weightfloor", "unknown option.*known options are.*weight_floor"),
        ("weight_floor: -1", "weight_floor", "greater than or equal to 0, got -1"),
        ("dense_layers: [0, x]", r"dense_layers\.1", "valid integer"),
        ("model: 7", "model", "valid string"),
        ("vllm: [port]", "vllm", "dictionary"),
        ("vllm: {--port: 1}", r"vllm\.--port\.\[key\]", "pattern"),
        ("vllm: {port: }", "vllm", "port has no value; a bare flag is true"),
        ("- weight_floor", None, "root must be a mapping"),
        ("weight_floor: 1\nweight_floor: 2", None, "repeated"),
        ("model: &a x", None, "anchors"),
        ("model: !!python/name:os.system x", None, "tags"),
    ],
)
def test_mistakes(tmp_path: Path, text: str, field: str | None, words: str) -> None:
    file = write(tmp_path, text + "\n")
    with pytest.raises(SettingsError, match=f"^{file}: {field + ': ' if field else ''}.*{words}"):
        ServerConfig.load(file)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nowhere\.yaml: cannot be read: No such file.*--config"):
        ServerConfig.load(tmp_path / "nowhere.yaml")
    with pytest.raises(SettingsError, match="larger than"):
        ServerConfig.load(write(tmp_path, "#" * (MAX_BYTES + 1)))
    (tmp_path / "serve.yaml").write_bytes(b"model: \xff\n")
    with pytest.raises(SettingsError, match="not a YAML mapping"):
        ServerConfig.load(tmp_path / "serve.yaml")
