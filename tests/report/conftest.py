from dataclasses import replace
from pathlib import Path

import pytest

from tests.calibration.random_models import random_models_are_accepted
from tests.calibration.tiny_model import save_model_dir, write_text
from tests.evaluation.tiny_store import tiny_store
from tests.one_thread import one_thread
from vllm_toptheta import store
from vllm_toptheta.calibration.data import read_text
from vllm_toptheta.calibration.model import load_model
from vllm_toptheta.report import Report, SurvivorOptions, measure_survivors
from vllm_toptheta.report.findings import SurvivorReport

__all__ = ["one_thread", "random_models_are_accepted"]


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and texts."""
    folder = tmp_path_factory.mktemp("report")
    save_model_dir(folder / "tiny")
    write_text(folder / "calibration.txt", 500, seed=0)
    write_text(folder / "held-out.txt", 500, seed=1)
    return folder


@pytest.fixture(scope="package")
def thresholds(folder: Path) -> store.ThresholdStore:
    """Made from the second of the texts, as far as the manifest says."""
    written = tiny_store(folder / "org--tiny-model", load_model(folder / "tiny"), only_layers=(2, 3))
    provenance = written.manifest.calibration.model_copy(
        update={"text": (read_text(folder / "calibration.txt").source,)}
    )
    return replace(written, manifest=written.manifest.model_copy(update={"calibration": provenance}))


@pytest.fixture(scope="package")
def survivors(folder: Path, thresholds: store.ThresholdStore) -> SurvivorReport:
    return measure_survivors(
        folder / "tiny",
        [folder / "held-out.txt"],
        thresholds,
        options=SurvivorOptions(targets=["8", "k:16", "floor:2"], length=160, num_sequences=2, device="cpu"),
        calibration_texts=[folder / "calibration.txt"],
        progress=False,
    )


@pytest.fixture(scope="package")
def report(survivors: SurvivorReport) -> Report:
    """Of survivors alone."""
    return Report(model="tiny", quality=(), survivors=survivors)
