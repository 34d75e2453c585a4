from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.calibration.tiny_model import save_model_dir, tiny_config, tiny_model
from tests.store_factory import make_store
from vllm_toptheta import store
from vllm_toptheta.errors import CalibrationError, FingerprintMismatch, ReportError, TargetOutOfRange
from vllm_toptheta.report import Report, make_report
from vllm_toptheta.report.run import default_targets


def test_a_report_is_complete(report: Report, thresholds: store.ThresholdStore) -> None:
    assert (report.model, report.thresholds, report.dense_layers) == ("tiny", "org/tiny-model", (0, 1))
    assert report.not_held_out == report.not_calibrated_on == ()
    assert [target.label for target in report.targets] == ["k:8", "k:16"]
    for target, k in zip(report.targets, (8, 16), strict=True):
        assert target.dense_length == k
        assert target.lengths[0] == k + 1
        assert target.lengths[-1] == thresholds.curve(k).max_length == 1024
        np.testing.assert_allclose(target.thresholds, thresholds.curve(k).threshold(target.lengths), rtol=1e-6)
        assert target.calibration is not None
        for found in (target.held_out, target.calibration):
            assert found.num_rows == 2 * (120 - k)
            assert k / 2 < found.mean_survivors < 2 * k
            assert 0 < found.mean_lost_mass < 1
            assert found.head_mean_survivors[0] == found.head_mean_survivors[1] == (0, 0, 0, 0)
            assert np.mean(found.head_mean_survivors[2:]) == pytest.approx(found.mean_survivors)
            assert np.mean(found.head_lost_mass[2:]) == pytest.approx(found.mean_lost_mass)
            assert found.group_value_rows_share[0] == (1, 1)
        assert [source.name for source in target.held_out.text] == ["held-out.txt"]
        assert target.held_out.mean_survivors != target.calibration.mean_survivors
    # half of the layers are dense
    shares = [rows.expectation.value_rows_share for rows in report.targets[0].held_out.by_length]
    assert all(0.5 < share < 1 for share in shares)
    assert len(set(shares)) == len(shares) == 6


def test_numbers_survive_json(report: Report) -> None:
    assert Report.read(report.model_dump_json()) == report


def test_texts_in_the_wrong_role_are_pointed_out(folder: Path, thresholds: store.ThresholdStore) -> None:
    swapped = make_report(
        folder / "tiny",
        [folder / "calibration.txt"],
        thresholds,
        calibration_texts=[folder / "held-out.txt"],
        targets=["8"],
        length=50,
        num_sequences=1,
        device="cpu",
        progress=False,
    )
    assert swapped.not_held_out == ("calibration.txt",)
    assert swapped.not_calibrated_on == ("held-out.txt",)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"targets": ["32"], "length": 32}, ReportError, "length: rows of at most 32 tokens are dense"),
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
        make_report(
            folder / "tiny",
            [folder / "held-out.txt"],
            thresholds,
            **{"targets": ["8"], "length": 50, "device": "cpu", "progress": False, **options},
        )


def test_another_model_and_dense_layers_alone_are_refused(
    folder: Path, thresholds: store.ThresholdStore, tmp_path: Path
) -> None:
    texts = [folder / "held-out.txt"]
    other = save_model_dir(tmp_path / "other", tiny_model(tiny_config(num_hidden_layers=2)))
    with pytest.raises(FingerprintMismatch):
        make_report(other, texts, thresholds, targets=["8"], length=50, device="cpu", progress=False)
    section = thresholds.manifest.thresholds.model_copy(update={"dense_layers": (0, 1, 2, 3)})
    dense = replace(thresholds, manifest=thresholds.manifest.model_copy(update={"thresholds": section}))
    with pytest.raises(ReportError, match="every layer is dense"):
        make_report(folder / "tiny", texts, dense, targets=["8"], length=50, device="cpu", progress=False)


def test_the_default_target_is_the_servers_or_the_last(tmp_path: Path) -> None:
    wide = make_store(tmp_path / "wide", target_ks=(64, 256))
    assert default_targets(wide.manifest) == ("k:128",)
    narrow = make_store(tmp_path / "narrow", target_ks=(8, 32))
    assert default_targets(narrow.manifest) == ("k:32",)
