"""What only a GPU's engine has: CUDA graphs, two model runners, float8 pages, asynchronous scheduling."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.generate import generate
from tests.e2e.test_engine import assert_same_text, cut

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.e2e,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

LENGTHS = [600] * 3  # in a graph captured for four sequences, so that one row is padding
MAX_TOKENS = 40
SIZES = {"cudagraph_capture_sizes": [1, 2, 4, 8]}
FULL_AND_PIECEWISE = {"compilation_config": SIZES}
IN_THIS_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


@pytest.fixture(scope="module")
def dense(model: Path, text_ids: list[int]) -> dict[str, Any]:
    """vLLM's own backend."""
    return generate(model=str(model), prompts=cut(text_ids, LENGTHS), max_tokens=MAX_TOKENS)


@pytest.fixture(scope="module")
def k32(model: Path, text_ids: list[int]) -> dict[str, Any]:
    """Another target than the default."""
    prompts = cut(text_ids, LENGTHS)
    options = {"target_k": 32}
    return generate(model=str(model), backend="toptheta", options=options, prompts=prompts, max_tokens=MAX_TOKENS)


@pytest.fixture(scope="module")
def eager(model: Path, text_ids: list[int]) -> dict[str, Any]:
    """No graphs at all."""
    return generate(
        model=str(model),
        backend="toptheta",
        prompts=cut(text_ids, LENGTHS),
        max_tokens=MAX_TOKENS,
        engine={"enforce_eager": True, "compilation_config": {}},
    )


@pytest.mark.parametrize("runner", ["0", "1"], ids=["V1 runner", "V2 runner"])
def test_decoding_runs_in_full_graphs(model: Path, text_ids: list[int], eager: dict[str, Any], runner: str) -> None:
    replayed = generate(
        {**IN_THIS_PROCESS, "VLLM_USE_V2_MODEL_RUNNER": runner},
        model=str(model),
        backend="toptheta",
        prompts=cut(text_ids, LENGTHS),
        max_tokens=MAX_TOKENS,
        engine=FULL_AND_PIECEWISE,
    )
    assert replayed["graph_mode"] == "FULL_AND_PIECEWISE"
    assert replayed["python_decodes"] == 0
    (stats,) = replayed["stats"]
    assert len(stats["layers"]) == 28 * 3
    for head in stats["layers"]:
        # every generated token but the first of each prompt, and nothing of what warm-up and capture ran
        assert head["decode_tokens"] == len(LENGTHS) * (MAX_TOKENS - 1)
        assert 0 < head["rows_read"] < head["rows_cached"]
    assert_same_text(replayed, eager)


@pytest.mark.parametrize("runner", ["0", "1"], ids=["V1 runner", "V2 runner"])
def test_requests_choose_how_a_graph_decodes_them(
    model: Path,
    text_ids: list[int],
    dense: dict[str, Any],
    eager: dict[str, Any],
    k32: dict[str, Any],
    runner: str,
) -> None:
    mixed = generate(
        {**IN_THIS_PROCESS, "VLLM_USE_V2_MODEL_RUNNER": runner},
        model=str(model),
        backend="toptheta",
        prompts=cut(text_ids, LENGTHS),
        max_tokens=MAX_TOKENS,
        asked=["dense", None, "k:32"],
        engine=FULL_AND_PIECEWISE,
    )
    assert mixed["graph_mode"] == "FULL_AND_PIECEWISE"
    assert mixed["python_decodes"] == 0
    (stats,) = mixed["stats"]
    assert stats["requests"] == {"dense": 1, "k:32": 1}
    assert stats["asked_tokens"] == 2 * (MAX_TOKENS - 1)
    assert {sum(layer["counts"]) for layer in stats["lost_mass"]} == {9 * (MAX_TOKENS - 1)}
    outputs = [run["outputs"][index] for index, run in enumerate((dense, eager, k32))]
    assert_same_text(mixed, {"outputs": outputs})


def test_without_graphs_the_decode_step_is_called(model: Path, text_ids: list[int]) -> None:
    called = generate(
        IN_THIS_PROCESS,
        model=str(model),
        backend="toptheta",
        prompts=cut(text_ids, LENGTHS[:1]),
        max_tokens=4,
        engine={"enforce_eager": True, "compilation_config": {}},
    )
    assert called["graph_mode"] == "NONE"
    assert called["python_decodes"] == 28 * 3


def test_synchronous_scheduling(model: Path, text_ids: list[int], eager: dict[str, Any]) -> None:
    synchronous = generate(
        model=str(model),
        backend="toptheta",
        prompts=cut(text_ids, LENGTHS),
        max_tokens=MAX_TOKENS,
        engine={"async_scheduling": False},
    )
    assert_same_text(synchronous, eager)


def test_float8_pages(model: Path, low_thresholds: Path, text_ids: list[int]) -> None:
    config = {"model": str(model), "prompts": cut(text_ids, [300, 1500, 40, 2500]), "max_tokens": 24}
    # FlashAttention has no other output for float8 than bfloat16
    float8 = {"dtype": "bfloat16", "kv_cache_dtype": "fp8"}
    exact = generate(**config, engine={"dtype": "bfloat16"})
    stock = generate(**config, engine=float8)
    ours = generate(
        **config, engine=float8, backend="toptheta", options={"thresholds": str(low_thresholds), "target_k": 16}
    )
    assert all(head["rows_read"] == head["rows_cached"] > 0 for head in ours["stats"][0]["layers"])
    # FlashAttention rounds the weights to float8 too, so it is no measure; but who rounds less must not err more
    assert deviation(ours, exact) < 1.2 * deviation(stock, exact) + 0.02


def deviation(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Mean difference of the best token's log-probability, nats, as long as the texts are equal."""
    differences = []
    for ours, theirs in zip(one["outputs"], other["outputs"], strict=True):
        for index, (a, b) in enumerate(zip(ours["token_ids"], theirs["token_ids"], strict=True)):
            differences.append(abs(ours["top2"][index][0] - theirs["top2"][index][0]))
            if a != b:
                break
    return statistics.mean(differences)
