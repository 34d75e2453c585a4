from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.calibration.tiny_model import save_model_dir, tiny_config, tiny_model
from vllm_toptheta import store
from vllm_toptheta.errors import CalibrationError, EvaluationError, FingerprintMismatch, ReportError, TargetOutOfRange
from vllm_toptheta.limits import NUM_ANCHORS
from vllm_toptheta.report import Report, SurvivorOptions, measure_survivors
from vllm_toptheta.report.findings import SurvivorReport


def test_all_is_counted(survivors: SurvivorReport, thresholds: store.ThresholdStore) -> None:
    assert (survivors.model, survivors.thresholds) == ("tiny", "org/tiny-model")
    assert survivors.not_held_out == survivors.not_calibrated_on == ()
    assert [target.label for target in survivors.targets] == ["floor:2", "k:8", "k:16"]
    for target, k in zip(survivors.targets[1:], (8, 16), strict=True):
        curves = target.curves
        assert curves is not None
        assert (target.dense_length, target.dense_layers, target.weight_floor) == (k, (0, 1), None)
        assert (curves.placement, curves.lengths[0]) == ("pre_softmax", k + 1)
        assert curves.lengths[-1] == thresholds.curve(k).max_length == 1024
        np.testing.assert_allclose(curves.thresholds, thresholds.curve(k).threshold(curves.lengths), rtol=1e-6)
        assert target.calibration is not None
        for found in (target.held_out, target.calibration):
            assert found.num_rows == 2 * (160 - k)
            assert k / 2 < found.mean_survivors < 2 * k
            assert 0 < found.mean_lost_mass < 1
            assert found.head_mean_survivors[0] == found.head_mean_survivors[1] == (0, 0, 0, 0)
            assert np.mean(found.head_mean_survivors[2:]) == pytest.approx(found.mean_survivors)
            assert np.mean(found.head_lost_mass[2:]) == pytest.approx(found.mean_lost_mass)
            assert found.group_value_rows_share[0] == (1, 1)
        assert [source.name for source in target.held_out.text] == ["held-out.txt"]
        assert target.held_out.mean_survivors != target.calibration.mean_survivors
    # half of the layers are dense
    shares = [rows.expectation.value_rows_share for rows in survivors.targets[1].held_out.by_length]
    assert all(0.5 < share < 1 for share in shares)
    assert len(set(shares)) == len(shares) == 6


def test_floors_need_nothing_calibrated(survivors: SurvivorReport, folder: Path) -> None:
    found = survivors.targets[0]
    assert (found.weight_floor, found.curves, found.calibration, found.dense_layers) == (2, None, None, ())
    assert (found.dense_length, found.held_out.num_rows) == (NUM_ANCHORS, 2 * (160 - NUM_ANCHORS))
    assert min(map(min, found.held_out.head_mean_survivors)) > 0
    assert 0 < found.held_out.sparse_value_rows_share < 1
    # alone, and without a store: the default
    options = SurvivorOptions(length=160, num_sequences=2, device="cpu")
    alone = measure_survivors(folder / "tiny", [folder / "held-out.txt"], options=options, progress=False)
    assert (alone.thresholds, alone.targets) == (None, (found,))


def test_numbers_survive_json(report: Report) -> None:
    assert Report.read(report.model_dump_json()) == report


def test_texts_in_the_wrong_role_are_pointed_out(folder: Path, thresholds: store.ThresholdStore) -> None:
    swapped = measure_survivors(
        folder / "tiny",
        [folder / "calibration.txt"],
        thresholds,
        options=SurvivorOptions(targets=["8"], length=50, num_sequences=1, device="cpu"),
        calibration_texts=[folder / "held-out.txt"],
        progress=False,
    )
    assert swapped.not_held_out == ("calibration.txt",)
    assert swapped.not_calibrated_on == ("held-out.txt",)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"targets": ["32"], "length": 32}, ReportError, "length: rows of at most 32 tokens are dense"),
        ({"targets": ["floor:2"], "length": 144}, ReportError, "length: rows of at most 144 tokens are dense"),
        ({"targets": ["floor:-1"]}, EvaluationError, "targets: no weight floor: -1"),
        ({"length": 1}, ReportError, "length: must be at least 2"),
        ({"num_sequences": 0}, ReportError, "num_sequences"),
        ({"attention_share": 1.5}, ReportError, "attention_share"),
        ({"attention_share": float("nan")}, ReportError, "attention_share"),
        ({"device": "nonsense"}, CalibrationError, "device: no device 'nonsense'"),
        ({"targets": ["4"]}, TargetOutOfRange, "no thresholds for k 4"),
        ({"num_sequences": 1000}, CalibrationError, "the texts have"),
    ],
)
def test_options_that_cannot_work_are_refused(
    folder: Path, thresholds: store.ThresholdStore, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        measure_survivors(
            folder / "tiny",
            [folder / "held-out.txt"],
            thresholds,
            options=SurvivorOptions(**{"targets": ["8"], "length": 50, "device": "cpu", **options}),
            progress=False,
        )


def test_another_model_and_dense_layers_alone_are_refused(
    folder: Path, thresholds: store.ThresholdStore, tmp_path: Path
) -> None:
    texts = [folder / "held-out.txt"]
    other = save_model_dir(tmp_path / "other", tiny_model(tiny_config(num_hidden_layers=2)))
    options = SurvivorOptions(targets=["8"], length=50, device="cpu")
    with pytest.raises(FingerprintMismatch):
        measure_survivors(other, texts, thresholds, options=options, progress=False)
    section = thresholds.manifest.thresholds.model_copy(update={"dense_layers": (0, 1, 2, 3)})
    dense = replace(thresholds, manifest=thresholds.manifest.model_copy(update={"thresholds": section}))
    with pytest.raises(ReportError, match="every layer is dense"):
        measure_survivors(folder / "tiny", texts, dense, options=options, progress=False)


def test_what_needs_a_store_is_refused_without_one(folder: Path) -> None:
    texts = [folder / "held-out.txt"]
    with pytest.raises(ReportError, match="calibration_texts: nothing was calibrated for floors"):
        measure_survivors(folder / "tiny", texts, calibration_texts=texts, progress=False)
    options = SurvivorOptions(targets=["floor:2", "8"], device="cpu")
    with pytest.raises(EvaluationError, match="thresholds: top-theta k:8 needs what was calibrated"):
        measure_survivors(folder / "tiny", texts, options=options, progress=False)
