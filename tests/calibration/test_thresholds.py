"""The passes of a calibration over tiny models."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.calibration.families import FAMILIES, PARTLY_FULL, family_config
from tests.calibration.tiny_model import architecture, random_tokens, tiny_model
from vllm_toptheta.calibration import CalibrationOptions
from vllm_toptheta.calibration.model import hidden_states, overriding_attention
from vllm_toptheta.calibration.override import AttentionCall, DenseOverride
from vllm_toptheta.calibration.thresholds import ThresholdCalibration
from vllm_toptheta.errors import CalibrationError
from vllm_toptheta.reference import top_theta_attention


def make_job(
    targets: Any = (8, 16), *, model: Any = None, sequences: list[Tensor] | None = None, **options: Any
) -> ThresholdCalibration:
    model = model or tiny_model()
    sequences = sequences or [random_tokens(120)]
    chosen = {"max_length": len(sequences[0]), "num_sequences": len(sequences), "top_k": "each", **options}
    return ThresholdCalibration(
        model,
        sequences,
        architecture=architecture(model),
        options=CalibrationOptions.create(targets, **chosen),
    )


def finished(targets: Any = (8, 16), **options: Any) -> ThresholdCalibration:
    job = make_job(targets, **options)
    for run_pass in job.passes:
        run_pass()
    return job


@cache
def long_job() -> ThresholdCalibration:
    """Enough rows to be compared with what the targets aim at; heads differ in how flat they are."""
    model = tiny_model()
    for layer in model.model.layers:
        with torch.no_grad():
            layer.self_attn.q_proj.weight.view(4, 16, -1).mul_(torch.tensor([0.3, 0.6, 1.0, 1.0])[:, None, None])
    sequences = [random_tokens(400, seed) for seed in range(4)]
    return finished((16, 32), model=model, sequences=sequences, dense_layers=(0,))


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
    assert len(make_job(sequences=sequences, top_k="off").passes) == 5 + 2 * 2


@pytest.mark.parametrize("stop", range(6))
def test_going_on_after_any_pass_gives_the_same_to_the_bit(stop: int) -> None:
    options: dict[str, Any] = {"row_fraction": 0.5, "sequences": [random_tokens(120, seed) for seed in range(2)]}
    whole, first, second = finished(**options), make_job(**options), make_job(**options)
    assert len(whole.passes) == 2 * 2 + 2
    for run_pass in first.passes[:stop]:
        run_pass()
    for name, array in second.arrays.items():
        array[...] = first.arrays[name]
    for run_pass in second.passes[stop:]:
        run_pass()
    for name, tensor in whole.tensors().items():
        np.testing.assert_array_equal(second.tensors()[name], tensor)


class Served(DenseOverride):
    """The thresholds that were calibrated for a target, and how many keys each thresholded row keeps."""

    def __init__(self, job: ThresholdCalibration, target: int) -> None:
        self.options, self.curve = job.options, job.curve(target)
        self.kept: dict[int, list[Tensor]] = {}

    def attend(self, call: AttentionCall) -> Tensor:
        if call.layer_idx in self.options.dense_layers:
            return super().attend(call)
        result = top_theta_attention(
            call.query,
            call.key,
            call.value,
            threshold=torch.from_numpy(self.curve.threshold(np.arange(1, len(call.key) + 1)))[:, call.layer_idx],
            target_k=self.curve.dense_length,
            softmax_scale=call.softmax_scale,
            placement=self.options.placement,
            logits_soft_cap=call.soft_cap,
        )
        self.kept.setdefault(call.layer_idx, []).append(result.num_survivors[result.thresholded])
        return result.output


def mean_survivors(job: ThresholdCalibration, target: int) -> dict[int, float]:
    """Of the rows and heads of a sparse layer that calibration read."""
    override = Served(job, target)
    with overriding_attention(job.model, override):
        for sequence in job.sequences:
            hidden_states(job.model, sequence)
    return {layer: float(torch.cat(kept).double().mean()) for layer, kept in override.kept.items()}


def test_about_k_keys_are_kept() -> None:
    for target, k in enumerate((16, 32)):
        of_layers = mean_survivors(long_job(), target)
        assert sorted(of_layers) == [1, 2, 3]
        assert np.mean(list(of_layers.values())) == pytest.approx(k, rel=0.2)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_calibrated(family: str) -> None:
    job = finished((8, 16), model=tiny_model(family_config(family)), sequences=[random_tokens(80)])
    full = (1, 3) if family in PARTLY_FULL else (0, 1, 2, 3)
    assert job.moments.observed_layers == full
    tensors = job.tensors()
    for layer in range(4):
        for name in ("coefficients", "offline_sum", "exp_threshold_scale"):
            assert bool(tensors[name][layer].any()) == (layer in full)
    assert mean_survivors(job, 0)[3] == pytest.approx(8, rel=0.5)


def test_a_model_without_full_attention_is_refused() -> None:
    config = family_config("gemma2")
    config.layer_types = ["sliding_attention"] * 4
    job = make_job(model=tiny_model(config))
    for run_pass in job.passes[:2]:
        run_pass()
    with pytest.raises(CalibrationError, match="no layer can be calibrated"):
        job.passes[2]()
