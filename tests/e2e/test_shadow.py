"""Mode `shadow` in an engine: what it generates, and that it does not depend on how the engine splits the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import STORED, Stock, Subject, architecture
from tests.e2e.generate import IN_THIS_PROCESS, Call, generate
from tests.e2e.texts import ON_GPU, assert_same_text, cut
from tests.shadow_store import make_shadow_store

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

LENGTHS = [700, 160, 1500]  # prompt tokens
MAX_TOKENS = 24


@pytest.fixture(scope="module")
def low_shadow_thresholds(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every score reaches the thresholds, and every shadow the margins."""
    folder = tmp_path_factory.mktemp("low_shadow") / "HuggingFaceTB--SmolLM2-135M-Instruct"
    make_shadow_store(folder, weight_floor=1e-300, margin=1e8, **STORED, **architecture(model))
    return folder


def shares(stats: dict[str, Any]) -> tuple[float, float]:
    """Keys and value rows read, of those cached."""
    cached = sum(head["rows_cached"] for head in stats["layers"])
    return tuple(sum(head[name] for head in stats["layers"]) / cached for name in ("keys_read", "rows_read"))


@pytest.mark.nightly
@pytest.mark.xdist_group("stock")
def test_thresholds_below_every_score_give_the_stock_backends_text(
    model: Path, low_shadow_thresholds: Path, stock: Stock
) -> None:
    (ours,) = generate(
        [stock.calls["few"]],
        model=str(model),
        backend="toptheta",
        options={"mode": "shadow", "always_shadow": True, "thresholds": str(low_shadow_thresholds)},
    )
    (stats,) = ours["stats"]
    assert (stats["mode"], len(stats["layers"])) == ("shadow", 30 * 3)
    assert shares(stats) == (1.0, 1.0)
    assert_same_text(ours["outputs"], stock.answers["few"]["outputs"])


@pytest.mark.nightly
def test_chunks_small_blocks_and_the_prefix_cache(subject: Subject) -> None:
    call = Call(cut(subject.text, LENGTHS), MAX_TOKENS)
    (undisturbed,) = subject.sparse(
        [call], mode="shadow", enable_prefix_caching=False, max_num_batched_tokens=8192, block_size=16
    )
    (stats,) = undisturbed["stats"]
    assert (stats["mode"], stats["guard"]) == ("shadow", "off")
    keys, rows = shares(stats)
    assert 0 < rows < keys < 0.75
    assert all(0 < head["lost_mass_mean"] < 0.6 for head in stats["layers"])
    chunked, cached = subject.sparse(
        [call, call], mode="shadow", enable_prefix_caching=True, max_num_batched_tokens=200, block_size=16
    )
    assert cached["prefix_hits"] > 2000
    assert_same_text(chunked["outputs"], undisturbed["outputs"])
    assert_same_text(cached["outputs"], undisturbed["outputs"])


@pytest.mark.xdist_group("stock")
def test_every_key_read_exactly_gives_the_stock_backends_text(model: Path, stock: Stock) -> None:
    (ours,) = generate(
        [stock.calls["few"]],
        model=str(model),
        backend="toptheta",
        options={
            "mode": "shadow", "shadow_values": True, "always_shadow": True, "heavy": 0, "weight_floor": 1e-300,
        },
    )  # fmt: skip
    (stats,) = ours["stats"]
    assert shares(stats) == (1.0, 1.0)
    assert not any(head["copies_read"] for head in stats["layers"])
    assert_same_text(ours["outputs"], stock.answers["few"]["outputs"])


def test_copies_with_chunks_small_blocks_and_the_prefix_cache(subject: Subject) -> None:
    call = Call(cut(subject.text, LENGTHS), MAX_TOKENS)
    options = {"mode": "shadow", "copies": True, "floor": 1.0, "block_size": 16}
    (undisturbed,) = subject.sparse([call], enable_prefix_caching=False, max_num_batched_tokens=8192, **options)
    (stats,) = undisturbed["stats"]
    assert (stats["mode"], stats["guard"]) == ("shadow", "warn")  # there is one
    keys, rows = shares(stats)
    assert 0 < rows <= keys < 0.9
    assert all(head["copies_read"] for head in stats["layers"])
    chunked, cached = subject.sparse([call, call], enable_prefix_caching=True, max_num_batched_tokens=200, **options)
    assert cached["prefix_hits"] > 2000
    assert_same_text(chunked["outputs"], undisturbed["outputs"])
    assert_same_text(cached["outputs"], undisturbed["outputs"])


@pytest.fixture(scope="module")
def eager(demo: Subject) -> dict[str, Any]:
    """No graphs at all."""
    (answer,) = demo.sparse([graph_call(demo)], mode="shadow", enforce_eager=True, compilation_config={})
    return answer


def graph_call(demo: Subject) -> Call:
    """A batch for a graph captured for four sequences, so that one row is padding."""
    return Call(cut(demo.text, [600] * 3), MAX_TOKENS, asked=[None, "dense", None])


@pytest.mark.gpu
@pytest.mark.xdist_group("shadow graphs")
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("runner", ["0", "1"], ids=["V1 runner", "V2 runner"])
def test_decoding_runs_in_full_graphs(demo: Subject, eager: dict[str, Any], runner: str) -> None:
    (replayed,) = demo.sparse(
        [graph_call(demo)],
        {**IN_THIS_PROCESS, "VLLM_USE_V2_MODEL_RUNNER": runner},
        mode="shadow",
        compilation_config={"cudagraph_capture_sizes": [1, 2, 4, 8]},
    )
    assert replayed["graph_mode"] == "FULL_AND_PIECEWISE"
    assert replayed["python_decodes"] == 0
    (stats,) = replayed["stats"]
    for head in stats["layers"]:
        assert head["decode_tokens"] == 3 * (MAX_TOKENS - 1)
        assert 0 < head["rows_read"] < head["keys_read"] < head["rows_cached"]
    assert_same_text(replayed["outputs"], eager["outputs"])
