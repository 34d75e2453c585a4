"""What the engine generates must not depend on how it batches, caches, chunks, preempts or splits the work.

Texts are compared token by token. After a first difference two greedy runs go their own ways, and a difference is one
only if the two best candidates of that step lay further apart than rounding can move them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.generate import generate

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

# nats between the two best tokens: float32 with other summation orders stays well below, as does float16 on the GPU
ROUNDING = 0.05 if torch.cuda.is_available() else 5e-3
LENGTHS = [700, 1500, 160, 2500]  # prompt tokens
EQUAL_LENGTHS = [305] * 4
MAX_TOKENS = 40


def assert_same_text(actual: dict[str, Any], expected: dict[str, Any], rounding: float = ROUNDING) -> None:
    assert len(actual["outputs"]) == len(expected["outputs"])
    for index, (one, other) in enumerate(zip(actual["outputs"], expected["outputs"], strict=True)):
        pairs = zip(one["token_ids"], other["token_ids"], strict=True)
        step = next((step for step, (a, b) in enumerate(pairs) if a != b), None)
        if step is not None:
            gap = max(run["top2"][step][0] - run["top2"][step][1] for run in (one, other))
            assert gap < rounding, (
                f"prompt {index}, token {step}: {one['token_ids'][step:]} {other['token_ids'][step:]}"
            )


def cut(text_ids: list[int], lengths: list[int]) -> list[list[int]]:
    """Prompts of these lengths, each from another place of the text."""
    starts = [index * 97 for index in range(len(lengths))]
    return [text_ids[start : start + length] for start, length in zip(starts, lengths, strict=True)]


@pytest.fixture(scope="module")
def undisturbed(model: Path, text_ids: list[int]) -> dict[str, Any]:
    """Each whole prompt in one step, no cache reuse, room for all."""
    return generate(
        model=str(model),
        backend="toptheta",
        calls=[cut(text_ids, LENGTHS), cut(text_ids, EQUAL_LENGTHS)],
        max_tokens=MAX_TOKENS,
        engine={"enable_prefix_caching": False, "max_num_batched_tokens": 8192},
    )


def test_thresholds_below_every_score_give_the_stock_backends_text(
    model: Path, low_thresholds: Path, text_ids: list[int]
) -> None:
    prompts = cut(text_ids, [round(16 * (3000 / 16) ** (index / 19)) for index in range(20)])
    config = {"model": str(model), "prompts": prompts, "max_tokens": 16}
    stock = generate(**config)
    ours = generate(**config, backend="toptheta", options={"thresholds": str(low_thresholds), "target_k": 16})
    assert stock["stats"] == [None]
    (stats,) = ours["stats"]
    assert len(stats["layers"]) == 30 * 3
    assert all(head["rows_read"] == head["rows_cached"] > 0 for head in stats["layers"])
    assert_same_text(ours, stock)


def test_thresholds_are_at_work(undisturbed: dict[str, Any]) -> None:
    (stats,) = undisturbed["stats"]
    assert [head["layer"] for head in stats["layers"][::3]] == list(range(2, 30))
    cached = sum(head["rows_cached"] for head in stats["layers"])
    assert sum(head["rows_read"] for head in stats["layers"]) < 0.5 * cached
    assert all(0 < head["lost_mass_mean"] < 0.5 for head in stats["layers"])


def test_prefix_caching(model: Path, text_ids: list[int], undisturbed: dict[str, Any]) -> None:
    prompts = cut(text_ids, LENGTHS)
    cached = generate(
        model=str(model),
        backend="toptheta",
        calls=[prompts, prompts],
        max_tokens=MAX_TOKENS,
        engine={"enable_prefix_caching": True, "block_size": 32},
    )
    assert cached["prefix_hits"] > 4000
    first, second = cached["outputs"][:4], cached["outputs"][4:]
    expected = {"outputs": undisturbed["outputs"][: len(LENGTHS)]}
    assert_same_text({"outputs": first}, expected)
    assert_same_text({"outputs": second}, expected)


def test_chunked_prefill_and_small_blocks(model: Path, text_ids: list[int], undisturbed: dict[str, Any]) -> None:
    chunked = generate(
        model=str(model),
        backend="toptheta",
        prompts=cut(text_ids, LENGTHS),
        max_tokens=MAX_TOKENS,
        engine={"max_num_batched_tokens": 200, "block_size": 16},
    )
    assert_same_text(chunked, {"outputs": undisturbed["outputs"][: len(LENGTHS)]})


def test_preemption(model: Path, text_ids: list[int], undisturbed: dict[str, Any]) -> None:
    # a prompt fills 20 blocks and grows to 22: all four start, and not all of them can end
    preempted = generate(
        model=str(model),
        backend="toptheta",
        prompts=cut(text_ids, EQUAL_LENGTHS),
        max_tokens=MAX_TOKENS,
        engine={"num_gpu_blocks_override": 84, "block_size": 16, "max_model_len": 400, "enable_prefix_caching": False},
    )
    assert preempted["preemptions"] > 0
    assert_same_text(preempted, {"outputs": undisturbed["outputs"][len(LENGTHS) :]})


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="needs two GPUs, or none")
@pytest.mark.parametrize("ranks", [2])
def test_tensor_parallel(tiny_llama: dict[str, str], ranks: int) -> None:
    prompts = [
        [(start * 31 + index * index) % 512 for index in range(length)] for start, length in enumerate((40, 300))
    ]
    config = {
        "model": tiny_llama["model"],
        "backend": "toptheta",
        "options": {"thresholds": tiny_llama["thresholds"], "target_k": 16},
        "prompts": prompts,
        "max_tokens": 24,
    }
    engine = {"skip_tokenizer_init": True}
    one = generate(**config, engine=engine)
    two = generate(
        {"OMP_NUM_THREADS": "1"},
        **config,
        engine={**engine, "tensor_parallel_size": ranks},
    )
    assert len(two["stats"]) == ranks
    assert [{head["kv_head"] for head in rank["layers"]} for rank in two["stats"]] == [{0}, {1}]
    rows = {(head["layer"], head["kv_head"]): head for head in one["stats"][0]["layers"]}
    for head in (head for rank in two["stats"] for head in rank["layers"]):
        assert head["rows_cached"] == rows[head["layer"], head["kv_head"]]["rows_cached"]
        assert 0.2 < head["rows_read"] / head["rows_cached"] < 0.95
    assert_same_text(two, one)


def test_sliding_windows_and_soft_caps(tiny_gemma: dict[str, str]) -> None:
    prompts = [
        [(start * 17 + index * index) % 512 for index in range(length)] for start, length in enumerate((30, 400))
    ]
    config = {"model": tiny_gemma["model"], "prompts": prompts, "max_tokens": 24}
    # vLLM runs no Gemma 2 in float16
    engine = {"skip_tokenizer_init": True, **({"dtype": "bfloat16"} if torch.cuda.is_available() else {})}
    stock = generate(**config, engine=engine)
    ours = generate(
        **config,
        engine=engine,
        backend="toptheta",
        options={"thresholds": tiny_gemma["thresholds"], "target_k": 16},
    )
    assert {head["layer"] for head in ours["stats"][0]["layers"]} == {1, 3}  # the full-attention layers
    assert_same_text(ours, stock, rounding=0.1 if torch.cuda.is_available() else ROUNDING)


def test_speculation_by_n_grams(model: Path, low_thresholds: Path, text_ids: list[int]) -> None:
    # repeated text, so that guesses are made; some are right
    prompts = [2 * text_ids[start : start + 150] + text_ids[start : start + 60] for start in (0, 400, 900)]
    config = {"model": str(model), "prompts": prompts, "max_tokens": MAX_TOKENS}
    stock = generate(**config)
    ours = generate(
        **config,
        backend="toptheta",
        options={"thresholds": str(low_thresholds), "target_k": 16},
        engine={"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}},
    )
    assert 0 < ours["accepted"] < ours["drafted"]
    assert_same_text(ours, stock)
