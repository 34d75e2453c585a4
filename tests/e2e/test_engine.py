"""An engine's text where every key is kept is that of vLLM's own backend."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.conftest import Stock
from tests.e2e.generate import Call, generate
from tests.e2e.texts import ON_GPU, ROUNDING, assert_same_text

KEEPS_ALL = {"weight_floor": 1e-300}  # sparse, and no score lies that far below the others

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


@pytest.mark.xdist_group("stock")
def test_thresholds_below_every_score_give_the_stock_backends_text(model: Path, stock: Stock) -> None:
    (ours,) = generate([stock.calls["lengths"]], model=str(model), backend="toptheta", options=KEEPS_ALL)
    assert stock.answers["lengths"]["stats"] == [None]
    (stats,) = ours["stats"]
    assert len(stats["layers"]) == 30 * 3
    assert all(head["rows_read"] == head["rows_cached"] > 0 for head in stats["layers"])
    assert_same_text(ours["outputs"], stock.answers["lengths"]["outputs"])


@pytest.mark.xdist_group("stock")
def test_calibrated_thresholds_and_speculation_by_n_grams(model: Path, low_thresholds: Path, stock: Stock) -> None:
    # of repeated text, so that guesses are made; some are right
    (ours,) = generate(
        [stock.calls["repeated"]],
        model=str(model),
        backend="toptheta",
        options={"thresholds": str(low_thresholds), "target": "k:16"},
        engine={"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}},
    )
    assert 0 < ours["accepted"] < ours["drafted"]
    assert_same_text(ours["outputs"], stock.answers["repeated"]["outputs"])


@pytest.mark.xdist_group("gemma")
def test_sliding_windows_and_soft_caps(tiny_gemma: Path) -> None:
    prompts = [
        [(start * 17 + index * index) % 512 for index in range(length)] for start, length in enumerate((30, 400))
    ]
    calls = [Call(prompts, max_tokens=24)]
    # vLLM runs no Gemma 2 in float16
    engine = {"skip_tokenizer_init": True, **({"dtype": "bfloat16"} if ON_GPU else {})}
    (stock,) = generate(calls, model=str(tiny_gemma), engine=engine)
    (ours,) = generate(
        calls,
        model=str(tiny_gemma),
        engine=engine,
        backend="toptheta",
        options=KEEPS_ALL,
    )
    assert {head["layer"] for head in ours["stats"][0]["layers"]} == {1, 3}  # the full-attention layers
    assert_same_text(ours["outputs"], stock["outputs"], rounding=0.1 if ON_GPU else ROUNDING)
