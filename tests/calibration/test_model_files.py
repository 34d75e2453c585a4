"""A directory that is not what transformers takes it for is refused, by every command that reads a model."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.calibration.test_checkpoint import KEY, change_config, change_tensors
from tests.calibration.tiny_model import save_model_dir
from vllm_toptheta.calibration.model import load_model, load_tokenizer
from vllm_toptheta.calibration.run import model_identity
from vllm_toptheta.errors import CalibrationError, CheckpointError, ModelConfigError, TopThetaError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 1000\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model_dir(tmp_path / "tiny")


def refused(folder: Path) -> TopThetaError:
    def load() -> None:
        load_tokenizer(folder)
        load_model(folder)

    with pytest.raises((CalibrationError, ModelConfigError)) as caught:
        load()
    assert caught.value.file is not None
    assert caught.value.remedy
    return caught.value


def dangle(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.parent / "nowhere")


def circle(file: Path) -> None:
    file.unlink()
    file.symlink_to(file)


def make_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def make_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pointer": (
        lambda file: file.write_bytes(POINTER),
        "a pointer of Git LFS, not the file itself. Run `git",
    ),
    "empty": (lambda file: file.write_bytes(b""), "empty|not JSON"),
    "dangling": (dangle, "a link to what is not there"),
    "circle": (circle, "a link to what is not there"),
    "folder": (make_folder, "not a regular file"),
    "pipe": (make_pipe, "not a regular file"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_file_that_is_none_is_named(folder: Path, name: str, damage: str) -> None:
    change, message = DAMAGES[damage]
    change(folder / name)
    error = refused(folder)
    assert error.file == folder / name
    assert any(part in str(error) for part in message.split("|"))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_file_that_may_not_be_read_is_named(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's refusal is a double: root, as whom containers run tests, reads everything."""
    open_file = Path.open

    def refuses(file: Path, *arguments: Any, **options: Any) -> Any:
        if file == folder / name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
        return open_file(file, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuses)
    error = refused(folder)
    assert error.file == folder / name
    assert "cannot be read: Permission denied" in str(error)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-100], "the weights are damaged"),
        (lambda content: content[:4], "the weights are damaged"),
        (lambda content: b"\xff" * 8 + content[8:], "the weights are damaged"),
        (lambda content: content[:8] + b"[" + content[9:], "the weights are damaged"),
    ],
)
def test_damaged_weights_are_named(folder: Path, change: Callable[[bytes], bytes], message: str) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))
    error = refused(folder)
    assert (type(error), error.file) == (CheckpointError, file)
    assert message in error.message


def test_weights_without_tensors_are_refused(folder: Path) -> None:
    save_file({}, folder / "model.safetensors")
    assert "not that of config.json" in str(refused(folder))


def test_whole_numbers_are_no_weights(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.update({KEY: torch.zeros(32, 32, dtype=torch.uint8)}))
    error = refused(folder)
    assert (error.file, error.field) == (folder / "model.safetensors", KEY)
    assert "quantization_config" in error.message


def test_a_folder_without_weights_or_tokenizer(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "no file named model.safetensors" in str(refused(folder))
    (folder / "tokenizer.json").unlink()
    assert "there is no tokenizer" in str(refused(folder))


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        ({"dtype": "fp9"}, "dtype", "no dtype 'fp9'"),
        ({"dtype": "nn"}, "dtype", "no dtype 'nn'"),
        ({"dtype": 5}, "dtype", "no dtype 5"),
        ({"torch_dtype": "fp9"}, "torch_dtype", "no dtype 'fp9'"),
        ({"quantization_config": "awq"}, "quantization_config", "expected an object, got 'awq'"),
        ({"quantization_config": [1]}, "quantization_config", "expected an object"),
        ({"quantization_config": {}}, "quantization_config.quant_method", "quantised by None"),
        ({"quantization_config": {"quant_method": 5}}, "quantization_config.quant_method", "quantised by 5"),
        ({"quantization_config": AWQ}, "quantization_config", "requires gptqmodel"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config", "requires optimum"),
        (
            {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}},
            "quantization_config.quant_method",
            "quantised by 'modelopt' .NVFP4.",
        ),
        ({"rope_parameters": {"rope_type": "fancy"}}, "rope_parameters.rope_type", "no rotary embedding 'fancy'"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "fancy"}}},
            "rope_parameters.full_attention.rope_type",
            "no rotary embedding 'fancy'",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters", "Missing required keys"),
        ({"hidden_act": "fancy"}, "hidden_act", "'fancy'"),
        ({"model_type": "fancy"}, "model_type", "`fancy`"),
        ({"vocab_size": "256"}, "vocab_size", "expected int, got str"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps", "expected float, got str"),
        ({"layer_types": ["full_attention"]}, "num_hidden_layers", "must be equal"),
        ({"pad_token_id": 1000}, None, "Padding_idx"),
        ({"hidden_size": 10**9}, None, "takes .* bytes, and the model has .* parameters"),
        ({"vocab_size": 10**12}, None, "takes .* bytes, and the model has .* parameters"),
    ],
    ids=str,
)
def test_fields_that_cannot_be_are_named(folder: Path, fields: dict[str, Any], field: str | None, message: str) -> None:
    change_config(folder, **fields)
    with pytest.raises((CalibrationError, ModelConfigError), match=message) as caught:
        load_model(folder)
    assert caught.value.field == field
    assert caught.value.file in (folder, folder / "config.json")
    assert caught.value.remedy
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("name", ["a space", "a@b", "a(1)", ".dot", "-dash", "a:b", "a\nb"])
def test_a_folder_whose_name_is_no_models_asks_for_one(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(CalibrationError, match="letters, digits and .*--model-id NAME or ORG/NAME") as caught:
        model_identity(tmp_path / name)
    assert (caught.value.file, caught.value.field) == (tmp_path / name, "--model-id")
    assert model_identity(tmp_path / name, "org/name").id == "org/name"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.gguf", "a GGUF file"),
        ("model.GGUF", "a GGUF file"),
        ("org/repo:Q4_K_M", "'Q4_K_M' names a GGUF file of a repository"),
        (
            "org/repo",
            "no such directory. A model of the hub has to be downloaded first .hf download org/repo.",
        ),
        ("/nowhere/at/all", "there is no such directory. Name the directory"),
    ],
)
def test_what_is_no_directory_is_named(name: str, message: str) -> None:
    with pytest.raises(ModelConfigError, match=message) as caught:
        model_identity(Path(name))
    assert caught.value.file == Path(name)


def test_a_file_in_the_place_of_a_directory_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ModelConfigError, match="a link to what is not there"):
        load_model(tmp_path / "dangling")
    with pytest.raises(ModelConfigError, match="a file, not a model directory"):
        load_model(folder / "model.safetensors")
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelConfigError, match="model in safetensors that it was made of"):
        load_model(tmp_path / "gguf")
