import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.calibration.tiny_model import random_tokens, save_model_dir, tiny_model, write_text
from tests.evaluation.tiny_store import tiny_store
from vllm_toptheta import store
from vllm_toptheta.calibration.model import load_model
from vllm_toptheta.errors import InterchangeError
from vllm_toptheta.interchange import export_modelopt
from vllm_toptheta.interchange.modelopt import refuse_modelopt
from vllm_toptheta.interchange.skip_softmax import TILE, fit_scalar_curve, skipped_tiles

LENGTH = 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("modelopt")
    save_model_dir(folder / "tiny")
    write_text(folder / "text.txt", 500)
    return folder


@pytest.fixture(scope="module")
def thresholds(folder: Path) -> store.ThresholdStore:
    return tiny_store(folder / "org--tiny-model", load_model(folder / "tiny"), only_layers=(2, 3))


def test_the_config_has_the_fields_that_modelopt_reads(
    folder: Path, thresholds: store.ThresholdStore, tmp_path: Path
) -> None:
    out = tmp_path / "skip_softmax.json"
    exported = export_modelopt(
        folder / "tiny", thresholds, [folder / "text.txt"], out=out, length=LENGTH, num_sequences=1
    )
    config = json.loads(out.read_text())["sparse_attention_config"]
    (group,) = config["config_groups"].values()
    assert group["algorithm"] == "skip_softmax"
    assert group["ignore"] == ["*.layers.0.*", "*.layers.1.*"]
    factor = group["threshold_scale_factor"]
    assert factor["formula"] == "a * exp(b * target_sparsity)"
    assert factor.keys() == {"formula", "decode"}
    assert factor["decode"]["a"] > 0
    assert factor["decode"]["b"] > 0
    assert group["target_sparsity"] == {"decode": factor["decode"]["min_observed_sparsity"]}
    assert config["comment"][1:] == [f"lost: {note}" for note in exported.notes]
    assert "32: " in config["comment"][0]


def test_the_curve_goes_through_what_the_thresholds_skip(thresholds: store.ThresholdStore, folder: Path) -> None:
    curve = fit_scalar_curve(load_model(folder / "tiny"), [random_tokens(LENGTH)], thresholds, target_ks=(8, 32))
    assert curve.sparsities[0] > curve.sparsities[1] > 0  # fewer keys kept, more tiles skipped
    for log_scale, sparsity in zip(curve.log_scales, curve.sparsities, strict=True):
        assert curve.a * math.exp(curve.b * sparsity) == pytest.approx(math.exp(log_scale), rel=1e-6)
    assert curve.head_spread > 0
    assert curve.row_spread > 0


def test_thresholds_that_skip_no_tile_have_no_curve(thresholds: store.ThresholdStore) -> None:
    coefficients = np.zeros_like(thresholds.coefficients)
    coefficients[...] = [[-1000.0], [-1100.0]]
    low = replace(thresholds, coefficients=coefficients)
    with pytest.raises(InterchangeError, match="does not grow"):
        fit_scalar_curve(tiny_model(), [random_tokens(LENGTH)], low, target_ks=(8, 32))


def test_tiles_are_skipped_as_by_the_kernel() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(5, 4, 2 * TILE + 40, generator=generator)
    start = scores.shape[-1] - 5
    for row in range(5):
        scores[row, :, start + row + 1 :] = -torch.inf
    log_scale = math.log(30.0)
    skipped = tiles = 0
    for row in range(5):
        n = start + row + 1
        for kv_head in range(2):
            running = [-math.inf, -math.inf]
            for first in range(0, n, TILE):
                wants = False
                for member in range(2):
                    largest = float(scores[row, 2 * kv_head + member, first : min(first + TILE, n)].max())
                    running[member] = max(running[member], largest)
                    wants |= largest >= running[member] + log_scale - math.log(n)
                skipped += not wants
                tiles += 1
    found = skipped_tiles(scores, start=start, target_k=8, log_scale=log_scale, num_kv_heads=2)
    assert found == (skipped, tiles)
    assert 0 < skipped < tiles
    assert skipped_tiles(scores, start=start, target_k=start + 5, log_scale=log_scale, num_kv_heads=2) == (0, 0)


def test_what_cannot_be_expressed_is_refused(folder: Path, thresholds: store.ThresholdStore, tmp_path: Path) -> None:
    texts = [folder / "text.txt"]
    with pytest.raises(InterchangeError, match="needs two k"):
        export_modelopt(folder / "tiny", thresholds, texts, out=tmp_path / "out.json", target_ks=(16,), length=LENGTH)
    with pytest.raises(InterchangeError, match="needs two k"):
        export_modelopt(folder / "tiny", thresholds, texts, out=tmp_path / "out.json", length=10)
    dense = replace(thresholds, manifest=thresholds.manifest.model_copy(update={"dense_layers": (0, 1, 2, 3)}))
    with pytest.raises(InterchangeError, match="every layer is dense"):
        export_modelopt(folder / "tiny", dense, texts, out=tmp_path / "out.json", length=LENGTH, num_sequences=1)
    with pytest.raises(InterchangeError, match="cannot be written"):
        export_modelopt(folder / "tiny", thresholds, texts, out=tmp_path, length=LENGTH, num_sequences=1)
    with pytest.raises(InterchangeError, match="largest score of each row"):
        refuse_modelopt(tmp_path / "config.json")
