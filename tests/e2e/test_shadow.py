"""Mode `shadow` in an engine: what it generates, and that it does not depend on how the engine splits the work."""

from __future__ import annotations

import inspect
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.generate import generate
from tests.e2e.test_engine import assert_same_text, cut
from tests.shadow_store import make_shadow_store
from vllm_toptheta.calibration import CalibrationOptions, calibrate
from vllm_toptheta.calibration.sources import read_file
from vllm_toptheta.store import Architecture

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

LENGTHS = [700, 160, 1500]  # prompt tokens
MAX_TOKENS = 24
NAME = "HuggingFaceTB--SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def low_shadow_thresholds(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every score reaches the thresholds, and every shadow the margins."""
    folder = tmp_path_factory.mktemp("low_shadow") / NAME
    architecture = Architecture.from_hf_config(json.loads((model / "config.json").read_text()))
    make_shadow_store(
        folder,
        coefficients=[-1e9, 0.0, 0.0],
        margin=1e8,
        target_ks=(16, 128),
        max_length=4096,
        dense_layers=(),
        **architecture.model_dump(),
    )
    return folder


@pytest.fixture(scope="module")
def shadow_thresholds(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thresholds and shadow keys calibrated on a little code."""
    folder = tmp_path_factory.mktemp("shadow")
    code = folder / "code.txt"
    code.write_text(inspect.getsource(tarfile))
    options = CalibrationOptions.create(["k:32"], max_length=320, num_sequences=1, shadow={})
    return calibrate(model, [read_file(code)], out=folder, options=options)


def shares(stats: dict[str, Any]) -> tuple[float, float]:
    """Keys and value rows read, of those cached."""
    cached = sum(head["rows_cached"] for head in stats["layers"])
    return tuple(sum(head[name] for head in stats["layers"]) / cached for name in ("keys_read", "rows_read"))


def test_thresholds_below_every_score_give_the_stock_backends_text(
    model: Path, low_shadow_thresholds: Path, text_ids: list[int]
) -> None:
    config = {"model": str(model), "prompts": cut(text_ids, [40, 300, 700, 1500]), "max_tokens": 16}
    stock = generate(**config)
    ours = generate(
        **config,
        backend="toptheta",
        options={"mode": "shadow", "always_shadow": True, "thresholds": str(low_shadow_thresholds), "target_k": 16},
    )
    (stats,) = ours["stats"]
    assert (stats["mode"], len(stats["layers"])) == ("shadow", 30 * 3)
    assert shares(stats) == (1.0, 1.0)
    assert_same_text(ours, stock)


def test_chunks_small_blocks_and_the_prefix_cache(model: Path, shadow_thresholds: Path, text_ids: list[int]) -> None:
    prompts = cut(text_ids, LENGTHS)
    config = {
        "model": str(model),
        "backend": "toptheta",
        "options": {"mode": "shadow", "always_shadow": True, "thresholds": str(shadow_thresholds), "target_k": 32},
        "max_tokens": MAX_TOKENS,
    }
    undisturbed = generate(
        **config,
        prompts=prompts,
        engine={"enable_prefix_caching": False, "max_num_batched_tokens": 8192, "block_size": 16},
    )
    (stats,) = undisturbed["stats"]
    assert (stats["mode"], stats["guard"]) == ("shadow", "unmeasured")
    keys, rows = shares(stats)
    assert 0 < rows < keys < 0.6
    assert all(0 < head["lost_mass_mean"] < 0.6 for head in stats["layers"])
    chunked = generate(
        **config,
        calls=[prompts, prompts],
        engine={"enable_prefix_caching": True, "max_num_batched_tokens": 200, "block_size": 16},
    )
    assert chunked["prefix_hits"] > 2000
    assert_same_text({"outputs": chunked["outputs"][: len(LENGTHS)]}, undisturbed)
    assert_same_text({"outputs": chunked["outputs"][len(LENGTHS) :]}, undisturbed)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("runner", ["0", "1"], ids=["V1 runner", "V2 runner"])
def test_decoding_runs_in_full_graphs(model: Path, shadow_thresholds: Path, text_ids: list[int], runner: str) -> None:
    config = {
        "model": str(model),
        "backend": "toptheta",
        "options": {"mode": "shadow", "always_shadow": True, "thresholds": str(shadow_thresholds), "target_k": 32},
        # in a graph captured for four sequences, so that one row is padding
        "prompts": cut(text_ids, [600] * 3),
        "max_tokens": MAX_TOKENS,
        "asked": [None, "dense", None],
    }
    eager = generate(**config, engine={"enforce_eager": True, "compilation_config": {}})
    replayed = generate(
        {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": runner},
        **config,
        engine={"compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8]}},
    )
    assert replayed["graph_mode"] == "FULL_AND_PIECEWISE"
    assert replayed["python_decodes"] == 0
    (stats,) = replayed["stats"]
    for head in stats["layers"]:
        assert head["decode_tokens"] == 3 * (MAX_TOKENS - 1)
        assert 0 < head["rows_read"] < head["keys_read"] < head["rows_cached"]
    assert_same_text(replayed, eager)
