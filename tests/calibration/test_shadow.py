"""Shadow keys calibrated on tiny models: moments, margins, r, and going on where it stopped."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.calibration.families import FAMILIES, PARTLY_FULL, family_config
from tests.calibration.test_capture import random_attention, with_and_without_sinks
from tests.calibration.test_run import run
from tests.calibration.tiny_model import architecture, random_tokens, save_model_dir, tiny_model, write_text
from vllm_toptheta.calibration import CalibrationOptions, ShadowOptions
from vllm_toptheta.calibration.candidates import MARGIN_EDGES
from vllm_toptheta.calibration.fit import fit_scale
from vllm_toptheta.calibration.override import AttentionCall
from vllm_toptheta.calibration.relative import RelativeOverride
from vllm_toptheta.calibration.shadow import ShadowCalibration
from vllm_toptheta.errors import CalibrationError
from vllm_toptheta.reference import causal_scores, relative_threshold, top_theta_attention
from vllm_toptheta.store.shadow import SHADOW_NAMES

OPTIONS = {"num_channels": 8, "weight_floor": 1.0}
LENGTH = 320


def make_shadow(*, model: Any = None, num_sequences: int = 2, **shadow: Any) -> ShadowCalibration:
    model = model or tiny_model()
    options = {"max_length": LENGTH, "num_sequences": num_sequences, "shadow": {**OPTIONS, **shadow}}
    return ShadowCalibration(
        model,
        [random_tokens(LENGTH, seed) for seed in range(num_sequences)],
        architecture=architecture(model),
        options=CalibrationOptions.create((), **options),
    )


def finished(**options: Any) -> ShadowCalibration:
    job = make_shadow(**options)
    for run_pass in job.passes:
        run_pass()
    return job


@pytest.fixture(scope="module")
def job() -> ShadowCalibration:
    return finished()


def held_share(job: ShadowCalibration, steps_less: int = 0) -> np.ndarray[Any, Any]:
    """What a head's own shadows find of its survivors' mass, `[num_layers, num_heads]`."""
    histogram = job.arrays["shadow_shortfalls"]
    held = histogram.cumsum(axis=-1) / np.maximum(histogram.sum(axis=-1, keepdims=True), 1)
    place = np.maximum(np.searchsorted(MARGIN_EDGES.numpy(), job.margins) - steps_less, 0)
    return np.take_along_axis(held, place[..., None], -1)[..., 0]


@pytest.mark.parametrize("candidate_mass", [0.9, 0.99, 1.0])
def test_margins_hold_the_mass_that_is_asked_for_and_no_more(candidate_mass: float) -> None:
    job = finished(candidate_mass=candidate_mass)
    assert (held_share(job) >= candidate_mass).all()
    positive = job.margins > 0
    assert positive.any()
    assert (held_share(job, steps_less=1)[positive] < candidate_mass).all()


def test_tensors_are_those_of_the_store(job: ShadowCalibration) -> None:
    tensors = job.tensors()
    assert {name: tensors[name].shape for name in SHADOW_NAMES} == {
        "shadow_encoder": (4, 2, 16, 8),
        "shadow_decoder": (4, 2, 8, 16),
        "shadow_key_mean": (4, 2, 16),
        "shadow_margin": (4, 4),
        "shadow_scale_coefficients": (4, 4, 2),
        "shadow_candidate_share": (4, 2),
    }
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float32)}
    share = tensors["shadow_candidate_share"]
    assert ((share > 0) & (share < 1)).all()
    scale = np.exp(tensors["shadow_scale_coefficients"] @ [1.0, np.log(300)])
    assert ((scale > 0) & (scale < 1)).all()
    assert job.section().candidate_share == pytest.approx(share.mean(), abs=1e-4)


def test_a_lower_floor_needs_more_candidates(job: ShadowCalibration) -> None:
    assert finished(weight_floor=0.1).section().candidate_share > job.section().candidate_share


@with_and_without_sinks
def test_every_layer_attends_by_relative_thresholds(sinks: torch.Tensor | None) -> None:
    query, key, value = random_attention(200)
    call = AttentionCall(3, query, key, value, softmax_scale=0.25, soft_cap=5.0, sinks=sinks)
    seen: list[tuple[AttentionCall, torch.Tensor]] = []
    output = RelativeOverride(2.0, lambda *attended: seen.append(attended)).attend(call)
    scores = causal_scores(query, key, softmax_scale=0.25, logits_soft_cap=5.0)
    thresholds = relative_threshold(scores, torch.arange(1, 201), 2.0, sinks=sinks)
    ((observed, used),) = seen
    assert observed is call
    torch.testing.assert_close(used, thresholds)
    expected = top_theta_attention(
        query, key, value, threshold=thresholds, target_k=0, softmax_scale=0.25, logits_soft_cap=5.0, sinks=sinks
    )
    torch.testing.assert_close(output, expected.output, rtol=1e-4, atol=1e-5)


def test_moments_are_those_of_all_sequences_without_the_first_keys() -> None:
    model = tiny_model()
    keys: list[torch.Tensor] = []
    attention = model.model.layers[0].self_attn
    attention.k_proj.register_forward_hook(lambda module, inputs, output: keys.append(output[0].detach()))
    job = make_shadow(model=model)
    for run_pass in job.passes[:2]:
        run_pass()
    # means are those before the rotation only where it does nothing, but traces do not change by it
    arrays, num_keys = job.arrays, 2 * (LENGTH - 16)
    second_moment = np.trace(arrays["shadow_key_squares"][0] / num_keys, axis1=-2, axis2=-1) + np.square(
        arrays["shadow_key_mean"][0]
    ).sum(-1)
    expected = torch.cat([key[16:] for key in keys]).unflatten(-1, (2, 16)).square().sum(-1).mean(0)
    np.testing.assert_allclose(second_moment, expected.numpy(), rtol=1e-4)
    assert arrays["shadow_num_keys"].tolist() == [num_keys] * 4


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_going_on_after_any_pass_gives_the_same_to_the_bit(job: ShadowCalibration, stop: int) -> None:
    first, second = make_shadow(), make_shadow()
    assert len(first.passes) == 2 + 1 + 1
    for run_pass in first.passes[:stop]:
        run_pass()
    for name, array in second.arrays.items():
        array[...] = first.arrays[name]
    for run_pass in second.passes[stop:]:
        run_pass()
    for name, tensor in job.tensors().items():
        np.testing.assert_array_equal(second.tensors()[name], tensor)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_calibrated(family: str) -> None:
    job = finished(model=tiny_model(family_config(family)), num_sequences=1)
    tensors = job.tensors()
    full = (1, 3) if family in PARTLY_FULL else (0, 1, 2, 3)
    assert (held_share(job)[list(full)] >= 0.99).all()
    for name in SHADOW_NAMES:
        assert [bool(tensors[name][layer].any()) for layer in range(4)] == [layer in full for layer in range(4)]
        assert np.isfinite(tensors[name]).all()


def test_a_model_without_full_attention_is_refused() -> None:
    config = family_config("gemma2")
    config.layer_types = ["sliding_attention"] * 4
    job = finished(model=tiny_model(config), num_sequences=1)
    with pytest.raises(CalibrationError, match="no layer can be calibrated"):
        job.tensors()


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
        make_shadow(num_channels=18)
    words = r"num_channels: shadow keys of 48 channels are not served with heads of 64\. Ask for 32 or 64, or"
    with pytest.raises(CalibrationError, match=words):
        ShadowOptions(num_channels=48).channels_of(64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 287}, "max_length: shadow keys need sequences of at least 288 tokens, max_length is 287"),
        ({"shadow": {"num_channels": 7}}, "shadow.num_channels: Input should be a multiple of 2"),
        ({"shadow": {"weight_floor": 0.0}}, "shadow.weight_floor: Input should be greater than 0"),
        ({"shadow": {"candidate_mass": 0.0}}, "shadow.candidate_mass: Input should be greater than 0"),
    ],
)
def test_options_that_cannot_work_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        CalibrationOptions.create((), **{"shadow": OPTIONS, **options})


@pytest.mark.parametrize("targets", [(), (8, 16)])
def test_a_store_carries_shadow_keys(tmp_path: Path, targets: tuple[int, ...]) -> None:
    model_dir = save_model_dir(tmp_path / "tiny")
    text = write_text(tmp_path / "words.txt", num_words=700)
    options: dict[str, Any] = {"targets": targets, "max_length": LENGTH, "num_sequences": 1}
    loaded = run(model_dir, text, tmp_path / "out", shadow=OPTIONS, **options)
    section = loaded.shadow.section
    assert (section.num_channels, section.weight_floor, section.block_size) == (8, 1.0, 16)
    assert (section.min_length, section.max_length, section.candidate_mass) == (145, LENGTH, 0.99)
    assert 0 < section.candidate_share < 1
    assert loaded.manifest.target_ks == targets
    assert loaded.manifest.calibration.shared_k == (8 if targets else None)
    if targets:
        alone = run(model_dir, text, tmp_path / "alone", **options)
        np.testing.assert_array_equal(loaded.calibrated.coefficients, alone.calibrated.coefficients)
