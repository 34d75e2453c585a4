from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import Gemma2Config, MistralConfig

from tests.calibration.tiny_model import save_model_dir, tiny_config, tiny_model, write_text
from vllm_toptheta import store
from vllm_toptheta.calibration import CalibrationOptions, calibrate, thresholds
from vllm_toptheta.calibration.data import read_text
from vllm_toptheta.calibration.model import hidden_states as model_hidden_states
from vllm_toptheta.calibration.run import default_model_id
from vllm_toptheta.errors import CalibrationError, ModelConfigError, StoreNotWritable, TensorNotFinite


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model_dir(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("texts") / "words.txt", num_words=600)


def run(model_dir: Path, text: Path, out: Path, **overrides: Any) -> store.ThresholdStore:
    chosen = {"targets": (16, 8), "max_length": 200, "num_sequences": 2, **overrides}
    others = {name: chosen.pop(name) for name in ("model_id", "command", "resume") if name in chosen}
    options = CalibrationOptions.create(chosen.pop("targets"), **chosen)
    return store.load(calibrate(model_dir, [read_text(text)], out=out, options=options, progress=False, **others))


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
    assert loaded.calibrated.row_count.sum(axis=1).tolist() == [2 * 192, 2 * 184]
    assert loaded.calibrated.coefficients[0].any()


def test_the_same_arguments_give_the_same_tensors(model_dir: Path, text: Path, tmp_path: Path) -> None:
    first, second = (run(model_dir, text, tmp_path / name) for name in ("first", "second"))
    assert first.manifest.tensors == second.manifest.tensors
    other = run(model_dir, text, tmp_path / "other", seed=1)
    assert first.manifest.tensors != other.manifest.tensors


def test_beta_moves_the_thresholds_by_standard_deviations(model_dir: Path, text: Path, tmp_path: Path) -> None:
    plain = run(model_dir, text, tmp_path / "plain")
    raised = run(model_dir, text, tmp_path / "raised", beta=1.0)
    np.testing.assert_array_equal(plain.calibrated.score_mean, raised.calibrated.score_mean)
    difference = (raised.curve(8).threshold(100) - plain.curve(8).threshold(100)) / plain.calibrated.score_std[
        :, :, 0
    ].mean()
    assert (difference > 0).all()
    assert difference.mean() == pytest.approx(1.0, rel=0.2)


def test_what_compensations_need_is_recorded(model_dir: Path, text: Path, tmp_path: Path) -> None:
    loaded = run(model_dir, text, tmp_path)
    assert loaded.manifest.thresholds.measurement == store.Measurement(num_sequences=1)
    for k in (8, 16):
        curve = loaded.curve(k)
        assert (curve.expected("offline_sum", 200) > 0).all()
        scale = curve.expected("exp_threshold_scale", 200)
        assert ((scale > 0) & (scale < 1)).all()
    assert (loaded.curve(8).expected("offline_sum", 200) > loaded.curve(16).expected("offline_sum", 200)).all()


def test_a_part_of_the_rows_gives_nearly_the_same_thresholds(model_dir: Path, text: Path, tmp_path: Path) -> None:
    whole = run(model_dir, text, tmp_path / "whole")
    part = run(model_dir, text, tmp_path / "part", row_fraction=0.5)
    assert part.calibrated.row_count.sum() < 0.6 * whole.calibrated.row_count.sum()
    assert part.manifest.calibration.row_fraction == 0.5
    difference = part.curve(8).threshold(150) - whole.curve(8).threshold(150)
    assert np.abs(difference).mean() < 0.2 * whole.calibrated.score_std[:, :, 0].mean()


def test_thresholds_after_the_softmax_are_probabilities(model_dir: Path, text: Path, tmp_path: Path) -> None:
    after = run(model_dir, text, tmp_path, placement="post_softmax", dense_layers=range(4))
    assert after.manifest.placement == "post_softmax"
    thresholds = after.curve(8).threshold([50, 200])
    assert ((thresholds > 0) & (thresholds < 1 / 8)).all()


@pytest.mark.parametrize("config_type", [Gemma2Config, MistralConfig])
def test_layers_with_a_sliding_window_are_recorded_as_dense(config_type: Any, text: Path, tmp_path: Path) -> None:
    options = tiny_config().to_dict()
    del options["model_type"], options["architectures"]
    model = tiny_model(config_type(**{**options, "sliding_window": 50, "pad_token_id": 0}))
    model_dir = save_model_dir(tmp_path / "windowed", model)
    if config_type is MistralConfig:
        with pytest.raises(CalibrationError, match="no layer can be calibrated"):
            run(model_dir, text, tmp_path / "out")
    else:
        loaded = run(model_dir, text, tmp_path / "out", dense_layers=(1,))
        assert loaded.manifest.dense_layers == (0, 1, 2)
        assert loaded.calibrated.coefficients.any(axis=(1, 2, 3)).tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": (8, 200)}, "k 200 needs rows of more than 200 tokens, but max_length is 200"),
        ({"targets": ()}, "targets: nothing to calibrate"),
        ({"targets": (8, 8)}, "different targets"),
        ({"num_sequences": 0}, "num_sequences: Input should be greater"),
        ({"row_fraction": 0.0}, "row_fraction: Input should be greater"),
        ({"num_sequences": 10_000}, "tokens, but 10000 sequences of 200 need 2000000"),
        ({"dense_layers": (0, 4)}, "no layer 4 in a model of 4"),
        ({"model_id": "not a model"}, "--model-id: got"),
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


def test_what_cannot_be_written_or_recorded_is_said_before_anything_is_run(
    model_dir: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_toptheta.calibration.run.Checkpoint.save", None)  # called after the first pass
    with pytest.raises(StoreNotWritable, match="holds other files"):
        run(model_dir, text, model_dir.parent)
    (tmp_path / "file").touch()
    with pytest.raises(StoreNotWritable, match="nothing may be written there|Not a directory"):
        run(model_dir, text, tmp_path / "file" / "out")
    with pytest.raises(CalibrationError, match="command: cannot be recorded"):
        run(model_dir, text, tmp_path / "out", command="toptheta" + " file.txt" * 1000)


def test_numbers_that_no_store_takes_are_the_models_fault(
    model_dir: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> None:
        raise TensorNotFinite("contains NaN or infinity", file="thresholds.safetensors", field="coefficients")

    monkeypatch.setattr(store, "save", refuse)
    with pytest.raises(CalibrationError, match="coefficients: contains NaN or infinity.*--dtype float32") as caught:
        run(model_dir, text, tmp_path / "out")
    assert caught.value.file == model_dir
    assert list((tmp_path / "out").iterdir()) == []  # the same passes would come to the same


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("/models/SmolLM2-135M", "SmolLM2-135M"),
        ("/hub/models--HuggingFaceTB--SmolLM2-135M/snapshots/0123", "HuggingFaceTB/SmolLM2-135M"),
    ],
)
def test_the_model_id_is_read_off_the_folder(folder: str, expected: str) -> None:
    assert default_model_id(Path(folder)) == expected


class Killed(BaseException):
    """Nothing catches it, like a signal."""


@pytest.mark.parametrize("passes", [1, 3])
def test_a_killed_calibration_goes_on_where_it_was(
    model_dir: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: int
) -> None:
    options: dict[str, Any] = {"targets": ("k:8", "k:16")}
    whole = run(model_dir, text, tmp_path / "whole", **options)
    done = 0

    def hidden_states(model: Any, tokens: Any) -> Any:
        nonlocal done
        if done == passes:
            raise Killed
        done += 1
        return model_hidden_states(model, tokens)

    with monkeypatch.context() as patch:
        patch.setattr(thresholds, "hidden_states", hidden_states)
        with pytest.raises(Killed):
            run(model_dir, text, tmp_path / "killed", **options)
    assert [entry.name for entry in (tmp_path / "killed").iterdir()] == [".tiny.calibration"]
    with pytest.raises(CalibrationError, match="other options"):
        run(model_dir, text, tmp_path / "killed", **options, seed=1)

    continued = []
    with monkeypatch.context() as patch:
        patch.setattr(
            thresholds, "hidden_states", lambda model, tokens: continued.append(model_hidden_states(model, tokens))
        )
        resumed = run(model_dir, text, tmp_path / "killed", **options)
    assert len(continued) == 2 + 2 - passes
    assert resumed.manifest.tensors == whole.manifest.tensors
    assert [entry.name for entry in (tmp_path / "killed").iterdir()] == ["tiny"]


def test_an_interrupted_calibration_can_be_forgotten(model_dir: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / ".tiny.calibration").write_bytes(b"damaged")
    with pytest.raises(CalibrationError, match="not the state"):
        run(model_dir, text, tmp_path)
    run(model_dir, text, tmp_path, resume=False)
    assert [entry.name for entry in tmp_path.iterdir()] == ["tiny"]


def test_targets_are_stored_by_their_labels(model_dir: Path, text: Path, tmp_path: Path) -> None:
    loaded = run(model_dir, text, tmp_path, targets=("k:16", 8))
    assert loaded.manifest.labels == ("k:8", "k:16")
    for label in loaded.manifest.labels:
        assert np.isfinite(loaded.curve_of(label).threshold([20, 200, 10_000])).all()
    assert loaded.manifest.calibration.shared_k == 8
    np.testing.assert_array_equal(loaded.curve(8).threshold(10_000), loaded.curve(8).threshold(200))
