"""A model is what its checkpoint and its config.json both say, or it is not loaded: nothing is filled up at random."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.calibration.families import FAMILIES, family_config
from tests.calibration.tiny_model import save_model_dir, tiny_config, tiny_model, write_text
from vllm_toptheta import cli
from vllm_toptheta.calibration.model import load_model
from vllm_toptheta.errors import CalibrationError, CheckpointError

Tensors = dict[str, torch.Tensor]
KEY = "model.layers.1.self_attn.k_proj.weight"  # [32, 64]


def change_tensors(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def rename(tensors: Tensors) -> None:
    tensors["model.layers.1.self_attn.key.weight"] = tensors.pop(KEY)


def drop_layers(tensors: Tensors) -> None:
    for name in list(tensors):
        if name.startswith(("model.layers.1.", "model.layers.2.")):
            del tensors[name]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model_dir(tmp_path / "tiny")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop(KEY), f"it lacks {KEY}. "),
        (lambda tensors: tensors.pop("lm_head.weight"), "it lacks lm_head.weight. "),
        (drop_layers, "it lacks model.layers.1.input_layernorm.weight, .* and 15 more. "),
        (rename, f"it lacks {KEY}; it has, and the model has not model.layers.1.self_attn.key.weight. "),
        (
            lambda tensors: tensors.update({"model.layers.1.self_attn.k_proj.bias": torch.zeros(32)}),
            "it has, and the model has not model.layers.1.self_attn.k_proj.bias. ",
        ),
        (
            lambda tensors: tensors.update({KEY: torch.zeros(64, 64)}),
            rf"it has in another shape {KEY} \[64, 64\] instead of \[32, 64\]. ",
        ),
    ],
    ids=["missing", "head missing", "many missing", "renamed", "left over", "reshaped"],
)
def test_tensors_that_are_not_the_models_are_named(
    change: Callable[[Tensors], object],
    said: str,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # to where `caplog` listens
    change_tensors(folder, change)
    with pytest.raises(CheckpointError, match=f"not that of config.json: {said}Give a directory") as caught:
        load_model(folder)
    assert caught.value.file == folder
    assert "LOAD REPORT" not in caplog.text  # it says the same, over a screen


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_hidden_layers": 5}, "it lacks model.layers.4.input_layernorm.weight, .* and 6 more"),
        ({"num_hidden_layers": 3}, "the model has not model.layers.3.input_layernorm.weight, .* and 6 more"),
        ({"num_key_value_heads": 4}, r"model.layers.0.self_attn.k_proj.weight \[32, 64\] instead of \[64, 64\]"),
    ],
    ids=str,
)
def test_a_config_of_another_model_is_refused(fields: dict[str, int], said: str, folder: Path) -> None:
    change_config(folder, **fields)
    with pytest.raises(CheckpointError, match=said):
        load_model(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_saves_is_loaded(family: str, tmp_path: Path) -> None:
    model = tiny_model(family_config(family))
    loaded = load_model(save_model_dir(tmp_path / "tiny", model))
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_tied_head_may_be_missing_or_there(tmp_path: Path) -> None:
    folder = save_model_dir(tmp_path / "tiny", tiny_model(tiny_config(tie_word_embeddings=True)))
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    load_model(folder)
    change_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] * 1}))
    load_model(folder)


def test_rotary_frequencies_of_older_checkpoints_are_harmless(folder: Path) -> None:
    old = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in range(4)}
    change_tensors(folder, lambda tensors: tensors.update(old))
    load_model(folder)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = save_model_dir(tmp_path / "tiny")
    (folder / "model.safetensors").unlink()
    tiny_model().save_pretrained(folder, max_shard_size="100KB")
    load_model(folder)
    return folder


def test_a_missing_shard_is_named(shards: Path) -> None:
    shard = sorted(shards.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CalibrationError, match=shard.name):
        load_model(shards)


def test_a_shard_without_its_tensors_is_refused(shards: Path) -> None:
    shard = sorted(shards.glob("model-*.safetensors"))[1]
    lost = min(load_file(shard))
    save_file({}, shard, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"it lacks .*{lost}"):
        load_model(shards)


def test_a_damaged_shard_is_named(shards: Path) -> None:
    shard = sorted(shards.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="the weights are damaged: .*Download") as caught:
        load_model(shards)
    assert caught.value.file == shard


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": "t5"}, "ValueError: Unrecognized configuration class"),
        ({"hidden_size": "64"}, "Field 'hidden_size' expected int"),
    ],
)
def test_what_transformers_says_is_kept_short(fields: dict[str, str], said: str, folder: Path) -> None:
    change_config(folder, **fields)
    with pytest.raises(CalibrationError, match=f"transformers cannot load it: .*{said}") as caught:
        load_model(folder)
    assert len(caught.value.message) < 400
    assert "\n" not in caught.value.message


def test_the_command_writes_nothing_and_exits_with_2(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change_tensors(folder, rename)
    words, out = write_text(tmp_path / "words.txt", num_words=100), tmp_path / "out"
    command = ["toptheta", "calibrate", folder, "--out", out, "--text", words, "--k", 8, "--max-length", 200]
    monkeypatch.setattr(sys, "argv", [*map(str, command), "--sequences", "1"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert f"it lacks {KEY}" in " ".join(capsys.readouterr().err.split())
    assert not out.exists()
