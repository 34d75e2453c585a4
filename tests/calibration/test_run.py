from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import Gemma2Config, MistralConfig

from tests.calibration.tiny_model import (
    architecture,
    random_tokens,
    save_model_dir,
    tiny_config,
    tiny_model,
    write_text,
)
from vllm_toptheta import store
from vllm_toptheta.calibration import calibrate
from vllm_toptheta.calibration.accumulate import Moments, length_buckets
from vllm_toptheta.calibration.data import load_sequences, read_text
from vllm_toptheta.calibration.model import load_model, load_tokenizer
from vllm_toptheta.calibration.run import collect_moments, default_model_id
from vllm_toptheta.errors import CalibrationError, ModelConfigError
from vllm_toptheta.evaluation.quality import evaluate_sequences


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model_dir(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("texts") / "words.txt", num_words=600)


def run(model_dir: Path, text: Path, out: Path, **overrides: Any) -> store.ThresholdStore:
    options = {"target_ks": (16, 8), "max_length": 200, "num_sequences": 2, "progress": False}
    return store.load(calibrate(model_dir, [text], out=out, **{**options, **overrides}))


def collect(**overrides: Any) -> Moments:
    model = tiny_model()
    options = {
        "architecture": architecture(model),
        "target_ks": [8, 16],
        "bucket_edges": length_buckets(9, 120, 5),
        "top_k_at_calibration": True,
        "dense_layers": (0, 1),
    }
    return collect_moments(model, [random_tokens(120)], **{**options, **overrides})


def test_a_store_is_written_that_says_how_it_was_made(model_dir: Path, text: Path, tmp_path: Path) -> None:
    loaded = run(model_dir, text, tmp_path, model_id="org/Tiny", beta=0.5, seed=7, command="toptheta calibrate tiny")
    manifest = loaded.manifest
    assert loaded.folder.name == "org--Tiny"
    assert manifest.model.id == "org/Tiny"
    assert manifest.architecture == store.read_architecture(model_dir)
    assert manifest.target_ks == (8, 16)
    assert [(target.min_length, target.max_length) for target in manifest.targets] == [(9, 200), (17, 200)]
    assert manifest.dense_layers == (0, 1)
    assert manifest.placement == "pre_softmax"
    provenance = manifest.calibration
    assert [source.name for source in provenance.text] == ["words.txt"]
    assert (provenance.num_sequences, provenance.max_length, provenance.seed) == (2, 200, 7)
    assert (provenance.beta, provenance.command) == (0.5, "toptheta calibrate tiny")
    assert {"torch", "transformers", "vllm-toptheta"} <= provenance.versions.keys()
    assert loaded.row_count.sum(axis=1).tolist() == [2 * 192, 2 * 184]
    assert loaded.coefficients[0].any()


def test_the_same_arguments_give_the_same_tensors(model_dir: Path, text: Path, tmp_path: Path) -> None:
    first, second = (run(model_dir, text, tmp_path / name) for name in ("first", "second"))
    assert first.manifest.tensors == second.manifest.tensors
    other = run(model_dir, text, tmp_path / "other", seed=1)
    assert first.manifest.tensors != other.manifest.tensors


def test_beta_moves_the_thresholds_by_standard_deviations(model_dir: Path, text: Path, tmp_path: Path) -> None:
    plain = run(model_dir, text, tmp_path / "plain")
    raised = run(model_dir, text, tmp_path / "raised", beta=1.0)
    np.testing.assert_array_equal(plain.score_mean, raised.score_mean)
    difference = (raised.curve(8).threshold(100) - plain.curve(8).threshold(100)) / plain.score_std[:, :, 0].mean()
    assert (difference > 0).all()
    assert difference.mean() == pytest.approx(1.0, rel=0.2)


def test_top_k_at_calibration_changes_deeper_layers_only() -> None:
    sparse, dense = collect(), collect(top_k_at_calibration=False)
    np.testing.assert_array_equal(sparse.row_count, dense.row_count)
    # layer 2 is the first sparse one: its own scores come from dense layers
    np.testing.assert_allclose(sparse.mean[:3], dense.mean[:3], rtol=1e-5, atol=1e-5)
    assert np.abs(sparse.mean[3] - dense.mean[3]).max() > 1e-3


def test_every_layer_of_every_pass_is_announced() -> None:
    announced: list[None] = []
    collect(on_layer=lambda: announced.append(None))
    assert len(announced) == 2 * 4
    announced.clear()
    collect(top_k_at_calibration=False, on_layer=lambda: announced.append(None))
    assert len(announced) == 4


@pytest.mark.parametrize("config_type", [Gemma2Config, MistralConfig])
def test_layers_with_a_sliding_window_are_recorded_as_dense(config_type: Any, text: Path, tmp_path: Path) -> None:
    options = tiny_config().to_dict()
    del options["model_type"], options["architectures"]
    model = tiny_model(config_type(**{**options, "sliding_window": 50, "pad_token_id": 0}))
    model_dir = save_model_dir(tmp_path / "windowed", model)
    if config_type is MistralConfig:
        with pytest.raises(CalibrationError, match="no layer can be calibrated"):
            run(model_dir, text, tmp_path)
    else:
        loaded = run(model_dir, text, tmp_path / "out", dense_layers=(1,))
        assert loaded.manifest.dense_layers == (0, 1, 2)
        assert loaded.coefficients.any(axis=(1, 2, 3)).tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_ks": (8, 200)}, "k 200 needs rows of more than 200 tokens, but max_length is 200"),
        ({"target_ks": ()}, "different k"),
        ({"target_ks": (8, 8)}, "different k"),
        ({"target_ks": (0, 8)}, "different k"),
        ({"num_sequences": 0}, "at least 1"),
        ({"num_sequences": 10_000}, "tokens, but 10000 sequences of 200 need 2000000"),
        ({"dense_layers": (0, 4)}, "no layer 4 in a model of 4"),
        ({"model_id": "not a model"}, "id: String should match"),
        ({"seed": -1}, "seed: Input should be greater"),
    ],
)
def test_options_that_cannot_work_are_named(
    model_dir: Path, text: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(CalibrationError, match=message):
        run(model_dir, text, tmp_path, **options)


def test_a_folder_that_is_no_model_is_named(text: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelConfigError, match=r"config\.json"):
        run(tmp_path, text, tmp_path)


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("/models/SmolLM2-135M", "SmolLM2-135M"),
        ("/hub/models--HuggingFaceTB--SmolLM2-135M/snapshots/0123", "HuggingFaceTB/SmolLM2-135M"),
    ],
)
def test_the_model_id_is_read_off_the_folder(folder: str, expected: str) -> None:
    assert default_model_id(Path(folder)) == expected


def test_thresholds_keep_about_k_scores_of_the_calibration_text(model_dir: Path, text: Path, tmp_path: Path) -> None:
    loaded = run(model_dir, text, tmp_path, dense_layers=())
    sequences = load_sequences([read_text(text)], load_tokenizer(model_dir), num_sequences=2, max_length=200, seed=0)
    for comparison in evaluate_sequences(load_model(model_dir), sequences, loaded, target_ks=(8, 16)):
        assert comparison.mean_survivors == pytest.approx(comparison.target_k, rel=0.4)
