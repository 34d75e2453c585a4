"""What only a GPU's engine has: CUDA graphs, two model runners, float8 pages, asynchronous scheduling."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import STORED, Subject, architecture
from tests.e2e.generate import IN_THIS_PROCESS, Call, generate
from tests.e2e.texts import ON_GPU, assert_same_text, cut
from tests.shadow_store import make_shadow_store
from vllm_toptheta.support import wakes_up_whole

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.e2e,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not ON_GPU, reason="needs a GPU"),
]

LENGTHS = [600] * 3  # in a graph captured for four sequences, so that one row is padding
MAX_TOKENS = 40
FULL_AND_PIECEWISE = {"compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8]}}
NO_GRAPHS = {"enforce_eager": True, "compilation_config": {}}

# sparse, and no score lies that far below the others; nothing is weighed by a copy
FLOAT8_OPTIONS: dict[str, dict[str, Any]] = {
    "values": {"weight_floor": 1e-300},
    "copies": {
        "mode": "shadow", "shadow_values": True, "always_shadow": True, "heavy": 0, "weight_floor": 1e-300,
    },
    "shadow keys": {"mode": "shadow", "always_shadow": True},
}  # fmt: skip

graphs = pytest.mark.xdist_group("graphs")


@pytest.fixture(scope="module")
def prompts(demo: Subject) -> list[list[int]]:
    return cut(demo.text, LENGTHS)


@pytest.fixture(scope="module")
def dense(demo: Subject, prompts: list[list[int]]) -> dict[str, Any]:
    """vLLM's own backend."""
    (answer,) = demo.stock([Call(prompts, MAX_TOKENS)])
    return answer


@pytest.fixture(scope="module")
def eager(demo: Subject, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """No graphs at all: the usual prompts, and four tokens of one."""
    return demo.sparse([Call(prompts, MAX_TOKENS), Call(prompts[:1], 4)], IN_THIS_PROCESS, **NO_GRAPHS)


@pytest.fixture(scope="module")
def synchronous(demo: Subject, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """Without asynchronous scheduling, on a server of another floor: at that, and all asking for the usual one."""
    calls = [Call(prompts, MAX_TOKENS), Call(prompts, MAX_TOKENS, asked=[f"floor:{demo.floor:g}"] * len(prompts))]
    return demo.sparse(calls, floor=demo.other, async_scheduling=False)


@pytest.fixture(scope="module", params=["0", "1"], ids=["V1 runner", "V2 runner"])
def replayed(request: pytest.FixtureRequest, demo: Subject, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """A model runner with graphs: a plain batch, and one of requests that ask for something."""
    return demo.sparse(
        [Call(prompts, MAX_TOKENS), Call(prompts, MAX_TOKENS, asked=["dense", None, f"floor:{demo.other:g}"])],
        {**IN_THIS_PROCESS, "VLLM_USE_V2_MODEL_RUNNER": request.param},
        **FULL_AND_PIECEWISE,
    )


@graphs
def test_decoding_runs_in_full_graphs(replayed: list[dict[str, Any]], eager: list[dict[str, Any]]) -> None:
    assert replayed[0]["graph_mode"] == "FULL_AND_PIECEWISE"
    assert replayed[0]["python_decodes"] == 0
    (stats,) = replayed[0]["stats"]
    assert len(stats["layers"]) == 30 * 3
    for head in stats["layers"]:
        # every generated token but the first of each prompt, and nothing of what warm-up and capture ran
        assert head["decode_tokens"] == len(LENGTHS) * (MAX_TOKENS - 1)
        assert 0 < head["rows_read"] < head["rows_cached"]
    assert_same_text(replayed[0]["outputs"], eager[0]["outputs"])


@graphs
def test_requests_choose_how_a_graph_decodes_them(
    replayed: list[dict[str, Any]],
    dense: dict[str, Any],
    eager: list[dict[str, Any]],
    synchronous: list[dict[str, Any]],
    demo: Subject,
) -> None:
    mixed = replayed[1]
    assert mixed["python_decodes"] == 0
    (stats,) = mixed["stats"]
    assert stats["requests"] == {"dense": 1, "floor": 1}
    assert stats["asked_tokens"] == 2 * (MAX_TOKENS - 1)
    assert {sum(layer["counts"]) for layer in stats["lost_mass"]} == {demo.num_heads * (MAX_TOKENS - 1)}
    runs = (dense, eager[0], synchronous[0])
    assert_same_text(mixed["outputs"], [run["outputs"][index] for index, run in enumerate(runs)])


@graphs
def test_without_graphs_the_decode_step_is_called(eager: list[dict[str, Any]]) -> None:
    assert eager[1]["graph_mode"] == "NONE"
    assert eager[1]["python_decodes"] == 30 * 3


@graphs
def test_synchronous_scheduling(synchronous: list[dict[str, Any]], eager: list[dict[str, Any]], demo: Subject) -> None:
    assert synchronous[1]["stats"][0]["requests"] == {"floor": len(LENGTHS)}
    assert_same_text(synchronous[1]["outputs"], eager[0]["outputs"])


@graphs
@pytest.mark.parametrize("runner", ["0", "1"], ids=["V1 runner", "V2 runner"])
def test_drafts_go_through_thresholds(
    demo: Subject, prompts: list[list[int]], eager: list[dict[str, Any]], runner: str
) -> None:
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
    (drafted,) = demo.sparse(
        [Call(prompts, MAX_TOKENS)],
        {**IN_THIS_PROCESS, "VLLM_USE_V2_MODEL_RUNNER": runner},
        speculative_config=ngram,
        **FULL_AND_PIECEWISE,
    )
    assert_same_text(drafted["outputs"], eager[0]["outputs"])
    (stats,) = drafted["stats"]
    # a dense step of verification counts no token
    assert {head["decode_tokens"] >= len(LENGTHS) * (MAX_TOKENS - 1) for head in stats["layers"]} == {True}
    assert stats["decode_steps"] < MAX_TOKENS - 1


@pytest.mark.xdist_group("float8")
@pytest.mark.parametrize("kind", FLOAT8_OPTIONS)
def test_float8_pages(model: Path, text_ids: list[int], kind: str, tmp_path: Path) -> None:
    calls = [Call(cut(text_ids, [300, 1500, 40, 2500]), max_tokens=24)]
    # FlashAttention has no other output for float8 than bfloat16
    float8 = {"dtype": "bfloat16", "kv_cache_dtype": "fp8"}
    (exact,) = generate(calls, model=str(model), engine={"dtype": "bfloat16"})
    (stock,) = generate(calls, model=str(model), engine=float8)
    options = dict(FLOAT8_OPTIONS[kind])
    if kind == "shadow keys":
        folder = tmp_path / "HuggingFaceTB--SmolLM2-135M-Instruct"
        make_shadow_store(folder, weight_floor=1e-300, margin=1e8, **STORED, **architecture(model))
        options["thresholds"] = str(folder)
    (ours,) = generate(calls, model=str(model), engine=float8, backend="toptheta", options=options)
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


@pytest.mark.xdist_group("float8")
def test_copies_of_float8_pages_are_near_dense_attention(model: Path, text_ids: list[int]) -> None:
    """At the defaults, of a server that scans every step and captures it; far from dense would be nats."""
    calls = [Call(cut(text_ids, [300, 1500, 40, 2500]), max_tokens=24)]
    (exact,) = generate(calls, model=str(model), engine={"dtype": "bfloat16"})
    (ours,) = generate(
        calls,
        model=str(model),
        engine={"dtype": "bfloat16", "kv_cache_dtype": "fp8", "enforce_eager": False, **FULL_AND_PIECEWISE},
        backend="toptheta",
        options={"mode": "shadow", "always_shadow": True},
    )
    heads = ours["stats"][0]["layers"]
    assert sum(head["copies_read"] for head in heads) > 0
    assert sum(head["keys_read"] for head in heads) < 0.9 * sum(head["rows_cached"] for head in heads)
    assert deviation(ours, exact) < 0.2


@pytest.mark.skipif(not wakes_up_whole(), reason="this vLLM loses what a backend keeps when it sleeps")
@pytest.mark.parametrize("copies", [False, True], ids=["values", "copies"])
@pytest.mark.parametrize("runner", ["0", "1"], ids=["V1 runner", "V2 runner"])
def test_an_engine_that_slept_decodes_as_before(
    demo: Subject, prompts: list[list[int]], runner: str, copies: bool
) -> None:
    awake, *slept = demo.sparse(
        [Call(prompts, MAX_TOKENS), Call(prompts, MAX_TOKENS, slept=1), Call(prompts, MAX_TOKENS, slept=2)],
        {**IN_THIS_PROCESS, "VLLM_USE_V2_MODEL_RUNNER": runner},
        mode="shadow" if copies else "values",
        copies=copies,
        enable_sleep_mode=True,
        enable_prefix_caching=True,
        **FULL_AND_PIECEWISE,
    )
    # counted up to then, by memory that is away
    assert slept[0]["asleep"] == awake["stats"]
    for one in slept:
        assert one["python_decodes"] == one["prefix_hits"] == 0
        assert_same_text(one["outputs"], awake["outputs"])
        for head in one["stats"][0]["layers"]:
            assert head["decode_tokens"] == len(LENGTHS) * (MAX_TOKENS - 1)
            assert 0 < head["rows_read"] < head["rows_cached"]


@pytest.mark.parametrize("always", [False, True], ids=["all keys are read", "scanned"])
def test_a_batch_of_uneven_lengths_with_copies_answers_as_each_alone(demo: Subject, always: bool) -> None:
    prompts = cut(demo.text, [100, 300, 16, 700, 1500, 2900])
    together, *alone = demo.sparse(
        [Call(prompts, MAX_TOKENS), *(Call([prompt], MAX_TOKENS) for prompt in prompts)],
        mode="shadow",
        copies=True,
        always=always,
    )
    assert_same_text(together["outputs"], [output for one in alone for output in one["outputs"]])
