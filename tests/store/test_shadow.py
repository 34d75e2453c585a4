"""Shadow keys in a store: written, read, refused, and looked up by target and layer."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.store_factory import make_draft, make_tensors
from vllm_toptheta import errors
from vllm_toptheta.store import ThresholdStore, io, load, save
from vllm_toptheta.store.shadow import SHADOW_NAMES

MakeStore = Callable[..., ThresholdStore]


def test_shadow_keys_load_as_they_were_saved(tmp_path: Path) -> None:
    draft = make_draft(num_channels=8)
    tensors = make_tensors(draft)
    save(tmp_path / "acme--tiny", draft, tensors)
    shadow = pickle.loads(pickle.dumps(load(tmp_path / "acme--tiny"))).shadow  # noqa: S301
    assert shadow.section == draft.shadow
    for layer in range(3):
        projection = shadow.projection(layer)
        for name, array in zip(SHADOW_NAMES, vars(projection).values(), strict=False):
            np.testing.assert_array_equal(array, tensors[name][layer], strict=True)
    assert projection.encoder.shape == (2, 16, 8)
    for name, array in zip(SHADOW_NAMES[3:], (shadow.margin, shadow.log_scale, shadow.candidate_share), strict=True):
        np.testing.assert_array_equal(array, tensors[name], strict=True)
    assert not load(tmp_path / "acme--tiny").shadow.margin.flags.writeable
    with pytest.raises(IndexError):
        shadow.projection(3)


def test_r_is_a_power_of_the_clamped_length(tmp_path: Path) -> None:
    draft = make_draft(num_channels=8, target_ks=(8, 32))
    tensors = make_tensors(draft)
    tensors["shadow_scale_coefficients"][...] = np.float32([0.5, -1.0])
    tensors["shadow_scale_coefficients"][0] = np.float32([1e9, 1e9])
    shadow = save(tmp_path / "acme--tiny", draft, tensors).shadow
    lengths = [[1, 200], [512, 5000]]
    scale = shadow.exp_threshold_scale(lengths)
    assert (scale.shape, scale.dtype) == ((2, 2, 3, 4), np.float32)
    np.testing.assert_allclose(scale[..., 1, 0], np.exp(0.5) / np.clip(lengths, 145, 1024), rtol=1e-5)
    np.testing.assert_allclose(scale[..., 0, :], 1e6, rtol=1e-5)
    assert shadow.exp_threshold_scale(100).shape == (3, 4)


def test_a_store_without_them_says_so(make_store: MakeStore) -> None:
    store = make_store()
    assert store.manifest.shadow is None
    assert "shadow" not in (store.folder / "manifest.yaml").read_text()
    with pytest.raises(errors.ShadowMissing, match="came without shadow keys. Calibrate the model again, with --mode"):
        _ = store.shadow


@pytest.mark.parametrize(
    ("name", "number", "error"),
    [
        ("shadow_encoder", np.nan, errors.TensorNotFinite),
        ("shadow_decoder", 1e10, errors.TensorValues),
        ("shadow_key_mean", -np.inf, errors.TensorNotFinite),
        ("shadow_margin", -0.5, errors.TensorValues),
        ("shadow_scale_coefficients", -np.inf, errors.TensorNotFinite),
        ("shadow_scale_coefficients", 1e30, errors.TensorValues),
        ("shadow_candidate_share", 1.01, errors.TensorValues),
    ],
)
def test_impossible_numbers_are_refused(
    tmp_path: Path, name: str, number: float, error: type[errors.TensorsInvalid]
) -> None:
    draft = make_draft(num_channels=8)
    tensors = make_tensors(draft)
    tensors[name].flat[-1] = number
    with pytest.raises(errors.TensorsInvalid) as caught:
        save(tmp_path / "acme--tiny", draft, tensors)
    assert type(caught.value) is error
    assert caught.value.field == name


def test_tensors_and_manifest_must_agree(tmp_path: Path) -> None:
    draft = make_draft(num_channels=8)
    with pytest.raises(errors.TensorNames, match="missing tensors .*shadow_candidate_share"):
        save(tmp_path / "acme--tiny", draft, make_tensors(make_draft()))
    with pytest.raises(errors.TensorNames, match="unexpected ones .*shadow_candidate_share"):
        save(tmp_path / "acme--tiny", make_draft(), make_tensors(draft))
    with pytest.raises(errors.TensorShape, match=r"shape \[3, 2, 16, 8\]; expected \[3, 2, 16, 10\]"):
        save(tmp_path / "acme--tiny", make_draft(num_channels=10), make_tensors(draft))
    half = make_tensors(draft)
    half["shadow_encoder"] = half["shadow_encoder"].astype(np.float16)
    with pytest.raises(errors.TensorDtype):
        save(tmp_path / "acme--tiny", draft, half)


def test_what_no_reader_would_take_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draft = make_draft(num_channels=8)
    monkeypatch.setattr(io, "MAX_TENSORS_BYTES", 4096)
    with pytest.raises(errors.StoreTooLarge, match="Calibrate fewer ks, or shadow keys of fewer channels"):
        save(tmp_path / "acme--tiny", draft, make_tensors(draft))
    assert not (tmp_path / "acme--tiny").exists()
