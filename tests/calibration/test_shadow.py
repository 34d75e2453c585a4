"""Shadow keys calibrated on tiny models: moments, margins, r, and going on where it stopped."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.calibration.families import FAMILIES, WINDOWED, family_config
from tests.calibration.test_job import finished, make_job
from tests.calibration.test_run import run
from tests.calibration.tiny_model import random_tokens, save_model_dir, tiny_model, write_text
from vllm_toptheta.calibration import ShadowOptions
from vllm_toptheta.calibration.fit import fit_scale
from vllm_toptheta.calibration.job import CalibrationJob
from vllm_toptheta.calibration.screening import MARGIN_EDGES
from vllm_toptheta.errors import CalibrationError
from vllm_toptheta.store.shadow import SHADOW_NAMES

OPTIONS = {"num_channels": 8, "num_sink": 2, "num_recent": 8}


def shadow_job(targets: Any = ("k:8", "k:16"), **options: Any) -> CalibrationJob:
    sequences = [random_tokens(160, seed) for seed in range(2)]
    return finished(targets, **{"sequences": sequences, "shadow": OPTIONS, **options})


@pytest.fixture(scope="module")
def job() -> CalibrationJob:
    return shadow_job()


def held_share(job: CalibrationJob, steps_less: int = 0) -> np.ndarray[Any, Any]:
    """What a head's own shadows find of its survivors' mass, `[num_targets, num_layers, num_heads]`."""
    assert job.shadow is not None
    histogram = job.shadow.arrays["shadow_shortfalls"]
    held = histogram.cumsum(axis=-1) / np.maximum(histogram.sum(axis=-1, keepdims=True), 1)
    place = np.maximum(np.searchsorted(MARGIN_EDGES.numpy(), job.shadow.margins) - steps_less, 0)
    return np.take_along_axis(held, place[..., None], -1)[..., 0]


@pytest.mark.parametrize("candidate_mass", [0.9, 0.99, 1.0])
def test_margins_hold_the_mass_that_is_asked_for_and_no_more(candidate_mass: float) -> None:
    job = shadow_job(shadow={**OPTIONS, "candidate_mass": candidate_mass})
    assert job.shadow is not None
    assert (held_share(job) >= candidate_mass).all()
    positive = job.shadow.margins > 0
    assert positive.any()
    assert (held_share(job, steps_less=1)[positive] < candidate_mass).all()


def test_tensors_are_those_of_the_store(job: CalibrationJob) -> None:
    assert job.shadow is not None
    tensors = job.shadow.tensors()
    assert {name: tensors[name].shape for name in SHADOW_NAMES} == {
        "shadow_encoder": (4, 2, 16, 8),
        "shadow_decoder": (4, 2, 8, 16),
        "shadow_key_mean": (4, 2, 16),
        "shadow_margin": (4, 4, 2),
        "shadow_scale_coefficients": (4, 4, 2, 2),
        "shadow_candidate_share": (4, 2, 2),
    }
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float32)}
    share = tensors["shadow_candidate_share"]
    assert ((share > 0) & (share < 1)).all()
    assert (share[..., 0] < share[..., 1]).all()
    scale = np.exp(tensors["shadow_scale_coefficients"] @ [1.0, np.log(120)])
    assert ((scale > 0) & (scale < 1)).all()
    section = job.shadow.section([2, 3])
    assert section.candidate_share == pytest.approx(share[2:].mean(axis=(0, 1)), abs=1e-4)


def test_moments_are_those_of_all_sequences_without_the_first_keys() -> None:
    model = tiny_model()
    keys: list[torch.Tensor] = []
    attention = model.model.layers[0].self_attn
    attention.k_proj.register_forward_hook(lambda module, inputs, output: keys.append(output[0].detach()))
    job = make_job(("k:8",), model=model, sequences=[random_tokens(100, seed) for seed in range(2)], shadow=OPTIONS)
    for run_pass in job.passes[:2]:
        run_pass()
    assert job.shadow is not None
    # means are those before the rotation only where it does nothing, but traces do not change by it
    arrays = job.shadow.arrays
    second_moment = np.trace(arrays["shadow_key_squares"][0] / 196, axis1=-2, axis2=-1) + np.square(
        arrays["shadow_key_mean"][0]
    ).sum(-1)
    expected = torch.cat([key[2:] for key in keys]).unflatten(-1, (2, 16)).square().sum(-1).mean(0)
    np.testing.assert_allclose(second_moment, expected.numpy(), rtol=1e-4)
    assert arrays["shadow_num_keys"].tolist() == [196] * 4


def test_shadow_keys_change_no_threshold(job: CalibrationJob) -> None:
    without = shadow_job(shadow=None)
    assert without.shadow is None
    assert len(job.passes) == len(without.passes) + 2
    for name, tensor in {**without.tensors, **without.expectations()}.items():
        np.testing.assert_array_equal({**job.tensors, **job.expectations()}[name], tensor)


@pytest.mark.parametrize("stop", [1, 3, 5, 6, 8])
def test_going_on_after_any_pass_gives_the_same_to_the_bit(job: CalibrationJob, stop: int) -> None:
    options: dict[str, Any] = {"sequences": [random_tokens(160, seed) for seed in range(2)], "shadow": OPTIONS}
    first, second = (make_job(("k:8", "k:16"), **options) for _ in range(2))
    assert len(first.passes) == 2 * 2 + 2 + 2
    for run_pass in first.passes[:stop]:
        run_pass()
    for name, array in second.arrays.items():
        array[...] = first.arrays[name]
    for run_pass in second.passes[stop:]:
        run_pass()
    assert job.shadow is not None
    assert second.shadow is not None
    for name, tensor in job.shadow.tensors().items():
        np.testing.assert_array_equal(second.shadow.tensors()[name], tensor)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_calibrated(family: str) -> None:
    job = shadow_job((8, 16), model=tiny_model(family_config(family)), dense_layers=())
    assert job.shadow is not None
    tensors = job.shadow.tensors()
    full = (1, 3) if family in WINDOWED else (0, 1, 2, 3)
    assert (held_share(job)[:, list(full)] >= 0.99).all()
    for name in SHADOW_NAMES:
        assert [bool(tensors[name][layer].any()) for layer in range(4)] == [layer in full for layer in range(4)]
        assert np.isfinite(tensors[name]).all()


def test_r_makes_the_unread_mass_right_on_average_at_every_length() -> None:
    generator = np.random.default_rng(0)
    lengths = np.sort(generator.integers(100, 4000, 500))
    unread_mass = generator.uniform(0.01, 0.3, (2, 3, 500)).astype(np.float32)
    noise = generator.lognormal(1.0, 1.0, unread_mass.shape)
    estimate = (unread_mass * (lengths / 100) ** 0.7 * noise).astype(np.float32)
    unread_mass[..., 400::2] = estimate[..., 400::2] = 0.0  # rows that stay dense
    found = fit_scale(unread_mass, estimate, lengths)
    assert found.shape == (2, 3, 2)
    missing = np.exp(found[..., :1] + found[..., 1:] * np.log(lengths)) * estimate
    error = missing / (1 - unread_mass + missing) - unread_mass
    np.testing.assert_allclose(error.sum(-1), 0, atol=1e-3)
    np.testing.assert_allclose((error * np.log(lengths)).sum(-1), 0, atol=1e-2)
    np.testing.assert_allclose(found[..., 1], -0.7, atol=0.25)


def test_rows_and_heads_without_a_say_decide_nothing_about_r() -> None:
    generator = np.random.default_rng(0)
    lengths = np.arange(100, 160)
    unread_mass = generator.uniform(0.01, 0.3, (4, 60)).astype(np.float32)
    estimate = (unread_mass * 5).astype(np.float32)
    expected = fit_scale(unread_mass[:, 1:], estimate[:, 1:], lengths[1:])
    unread_mass[:, 0], estimate[:, 0] = 1.0, 50.0  # no candidate: lost whatever r is
    found = fit_scale(unread_mass, estimate, lengths)
    np.testing.assert_allclose(
        found[..., 0] + found[..., 1] * np.log(130), expected[..., 0] + expected[..., 1] * np.log(130), rtol=1e-4
    )
    assert fit_scale(np.zeros((2, 9), np.float32), np.zeros((2, 9), np.float32), lengths[:9]).tolist() == [[-30, 0]] * 2
    # one that always overestimates by far, and one that does by as much the other way
    extreme = fit_scale(unread_mass[:2, 1:], np.stack([1e6 * estimate[0, 1:], 1e-6 * estimate[1, 1:]]), lengths[1:])
    np.testing.assert_allclose(
        extreme[:, 0] + extreme[:, 1] * np.log(130),
        expected[:2, 0] + expected[:2, 1] * np.log(130) + np.log([1e-6, 1e6]),
        rtol=1e-3,
    )


def test_channels_follow_the_head_size() -> None:
    chosen = {size: ShadowOptions().channels_of(size) for size in (8, 16, 32, 48, 64, 80, 96, 128, 192, 256)}
    assert chosen == {8: 4, 16: 8, 32: 32, 48: 32, 64: 32, 80: 32, 96: 32, 128: 64, 192: 64, 256: 128}
    assert ShadowOptions(num_channels=16).channels_of(16) == 16
    with pytest.raises(CalibrationError, match="num_channels: 18 channels of keys with 16 numbers"):
        make_job(shadow={**OPTIONS, "num_channels": 18})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"placement": "post_softmax"}, "placement: shadow keys are compared with thresholds before the softmax"),
        ({"shadow": {"num_sink": 70, "num_recent": 10}}, "max_length: 70 first and 10 last keys"),
        ({"shadow": {"num_channels": 7}}, "shadow.num_channels: Input should be a multiple of 2"),
        ({"shadow": {"candidate_mass": 0.0}}, "shadow.candidate_mass: Input should be greater than 0"),
    ],
)
def test_options_that_cannot_work_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        make_job(sequences=[random_tokens(160)], **{"shadow": OPTIONS, **options})


def test_a_store_carries_shadow_keys(tmp_path: Path) -> None:
    model_dir = save_model_dir(tmp_path / "tiny")
    text = write_text(tmp_path / "words.txt", num_words=300)
    loaded = run(model_dir, text, tmp_path / "out", shadow=OPTIONS)
    section = loaded.shadow.section
    assert (section.num_channels, section.num_sink, section.num_recent, section.block_size) == (8, 2, 8, 16)
    assert section.candidate_mass == 0.99
    assert all(0 < share < 1 for share in section.candidate_share)
    assert loaded.shadow.margin("k:8").shape == (4, 4)
    assert loaded.shadow.projection(3).encoder.shape == (2, 16, 8)
    again = run(model_dir, text, tmp_path / "again", shadow=OPTIONS)
    assert again.manifest.tensors == loaded.manifest.tensors
