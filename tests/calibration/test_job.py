"""The passes of a calibration over tiny models."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.calibration.families import FAMILIES, WINDOWED, family_config
from tests.calibration.tiny_model import architecture, random_tokens, tiny_model
from vllm_toptheta.calibration import CalibrationOptions
from vllm_toptheta.calibration.allot import grid_ks
from vllm_toptheta.calibration.job import CalibrationJob
from vllm_toptheta.errors import CalibrationError
from vllm_toptheta.store import Expectations


def make_job(
    targets: Any = (8, 16), *, model: Any = None, sequences: list[Tensor] | None = None, **options: Any
) -> CalibrationJob:
    model = model or tiny_model()
    sequences = sequences or [random_tokens(120)]
    chosen = {"max_length": len(sequences[0]), "num_sequences": len(sequences), "top_k": "each", **options}
    return CalibrationJob(
        model,
        sequences,
        architecture=architecture(model),
        options=CalibrationOptions.create(targets, **chosen),
    )


def finished(targets: Any = (8, 16), **options: Any) -> CalibrationJob:
    job = make_job(targets, **options)
    for run_pass in job.passes:
        run_pass()
    return job


@cache
def long_job() -> CalibrationJob:
    """Every kind of target, on enough rows to be compared with what they aim at; heads differ in how flat they are."""
    model = tiny_model()
    for layer in model.model.layers:
        with torch.no_grad():
            layer.self_attn.q_proj.weight.view(4, 16, -1).mul_(torch.tensor([0.3, 0.6, 1.0, 1.0])[:, None, None])
    sequences = [random_tokens(400, seed) for seed in range(4)]
    labels = ("k:16", "k:32", "mass:0.9", "rows:32", "k:16@100^0.5", "survivors:24")
    return finished(labels, model=model, sequences=sequences, dense_layers=(0,))


def test_top_k_at_calibration_changes_deeper_layers_only() -> None:
    each, dense = finished(top_k="each").moments, finished(top_k="off").moments
    np.testing.assert_array_equal(each.row_count, dense.row_count)
    # layer 2 is the first sparse one: its own scores come from dense layers
    np.testing.assert_allclose(each.mean[:3], dense.mean[:3], rtol=1e-5, atol=1e-5)
    assert np.abs(each.mean[3] - dense.mean[3]).max() > 1e-3


def test_a_shared_pass_is_that_of_the_middle_k() -> None:
    shared, each = finished((8, 16, 32), top_k="shared"), finished((8, 16, 32), top_k="each")
    assert shared.shared_k == 16
    assert len(shared.passes) == 1 + 3
    assert len(each.passes) == 3 + 3
    np.testing.assert_allclose(shared.moments.mean[:, :, 1], each.moments.mean[:, :, 1], rtol=1e-5, atol=1e-5)
    assert np.abs(shared.moments.mean[3, :, 0] - each.moments.mean[3, :, 0]).max() > 1e-3


def test_passes_are_as_many_as_targets_need() -> None:
    sequences = [random_tokens(120, seed) for seed in range(5)]
    assert len(make_job(sequences=sequences).passes) == 5 * 2 + 2 * 2
    assert len(make_job(("k:8", "mass:0.9"), sequences=sequences).passes) == 5 * 2 + 2 + 2 * 2
    assert len(make_job(sequences=sequences, top_k="off", find_dense_layers=True).passes) == 2 + 5 + 2 * 2


@pytest.mark.parametrize("stop", range(8))
def test_going_on_after_any_pass_gives_the_same_to_the_bit(stop: int) -> None:
    options = {"targets": ("k:8", "mass:0.8"), "find_dense_layers": True, "row_fraction": 0.5}
    options["sequences"] = [random_tokens(120, seed) for seed in range(2)]
    whole, first, second = finished(**options), make_job(**options), make_job(**options)
    assert len(whole.passes) == 8
    for run_pass in first.passes[:stop]:
        run_pass()
    for name, array in second.arrays.items():
        array[...] = first.arrays[name]
    for run_pass in second.passes[stop:]:
        run_pass()
    for name, tensor in {**whole.tensors, **whole.expectations()}.items():
        np.testing.assert_array_equal({**second.tensors, **second.expectations()}[name], tensor)


def test_layers_that_lose_too_much_become_dense() -> None:
    probed = finished((8,), find_dense_layers=True, dense_layers=(3,)).arrays["probed"]
    assert 0 < probed.min() < probed.max() < 0.1
    chosen = make_job((8,), find_dense_layers=True, max_lost_mass=float(np.median(probed)), dense_layers=(3,))
    for run_pass in chosen.passes:
        run_pass()
    assert set(chosen.dense_layers) == {3} | set(np.flatnonzero(probed > np.median(probed)).tolist())


def test_layers_far_from_the_others_are_found_without_a_bound() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.mul_(0.2)
    job = finished((8,), model=model, find_dense_layers=True, dense_layers=())
    assert job.dense_layers == (1,)
    assert job.lost_mass_bound == pytest.approx(2 * np.median(job.arrays["probed"]))
    assert make_job((8,)).lost_mass_bound is None


def measured(name: str) -> np.ndarray[Any, Any]:
    """Of the sparse layers, `[num_layers, num_heads, num_targets, num_buckets]`."""
    job = long_job()
    return np.asarray(getattr(Expectations(**job.expectations()), name)[1:])


def test_a_constant_k_keeps_about_k() -> None:
    survivors = measured("survivors_mean")[..., -4:]
    for index, k in enumerate((16, 32)):
        assert survivors[:, :, index].mean() == pytest.approx(k, rel=0.2)


def test_every_head_has_as_many_survivors_as_are_wanted() -> None:
    survivors = measured("survivors_mean")[:, :, 5, -4:].mean(axis=-1)
    np.testing.assert_allclose(survivors, 24, rtol=0.25)
    assert survivors.mean() == pytest.approx(24, rel=0.1)


def test_a_share_of_the_mass_is_lost_by_every_head_alike() -> None:
    lost_mass = measured("lost_mass_mean")[:, :, 2, -4:].mean(axis=-1)
    assert lost_mass.mean() == pytest.approx(0.1, rel=0.15)
    assert lost_mass.max() < 0.15
    constant = measured("lost_mass_mean")[:, :, 1, -4:].mean(axis=-1)
    assert constant.max() / constant.min() > 5


def test_rows_that_are_shared_out_lose_less_than_as_many_for_each_head() -> None:
    survivors, lost_mass = measured("survivors_mean")[..., -4:], measured("lost_mass_mean")[..., -4:]
    assert survivors[:, :, 3].mean() == pytest.approx(32, rel=0.25)
    assert lost_mass[:, :, 3].mean() < 0.9 * lost_mass[:, :, 1].mean()


def test_a_growing_k_keeps_more_of_longer_rows() -> None:
    job = long_job()
    survivors = measured("survivors_mean")[:, :, 4].mean(axis=(0, 1))
    rows = Expectations(**job.expectations()).measured_rows[4] > 0
    centres = np.sqrt(job.edges[:-1] * job.edges[1:].astype(np.float64))[rows]
    np.testing.assert_allclose(survivors[rows][-5:], 16 * np.sqrt(centres[-5:] / 100), rtol=0.25)


def test_the_grid_is_observed_but_not_stored() -> None:
    job = long_job()
    assert job.tensors["coefficients"].shape[2] == 6
    assert job.moments.mean.shape[2] == 2 + len(grid_ks(400))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_calibrated(family: str) -> None:
    job = finished(("k:8", "mass:0.8"), model=tiny_model(family_config(family)), sequences=[random_tokens(80)])
    full = (1, 3) if family in WINDOWED else (0, 1, 2, 3)
    assert job.moments.observed_layers == full
    expectations = Expectations(**job.expectations())
    for layer in range(4):
        assert bool(job.tensors["coefficients"][layer].any()) == (layer in full)
        assert bool(expectations.survivors_mean[layer].any()) == (layer in full)
    assert expectations.survivors_mean[3, :, 0, -3:].mean() == pytest.approx(8, rel=0.5)


def test_a_model_without_full_attention_is_refused() -> None:
    config = family_config("gemma2")
    config.layer_types = ["sliding_attention"] * 4
    job = make_job(model=tiny_model(config))
    for run_pass in job.passes[:2]:
        run_pass()
    with pytest.raises(CalibrationError, match="no layer can be calibrated"):
        job.passes[2]()
