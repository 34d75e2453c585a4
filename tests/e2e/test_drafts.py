"""Drafts beside thresholds: they change no text, whoever guesses, and no layer that drafts has thresholds.

Random models in float32, so that several tokens at once are summed up nearly as one by one.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import TINY
from tests.e2e.draft_models import Models, write_models
from tests.e2e.generate import GPU_ENGINE, Call, generate
from tests.e2e.test_lossless import random_requests, run
from tests.e2e.texts import ON_GPU, ROUNDING, assert_same_text, cut

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(900),
    pytest.mark.xdist_group("drafts"),
]

NUM_LAYERS, NUM_KV_HEADS = TINY["num_hidden_layers"], TINY["num_key_value_heads"]
KEEPS_ALL = {"weight_floor": 1e-300}  # sparse, and no score lies that far below the others
COPIES = {"mode": "shadow", "shadow_values": True, "always_shadow": True}
# chunks of prompts beside what decodes; pages that the smallest number of drafts may fill and leave again
ENGINE: dict[str, Any] = {"skip_tokenizer_init": True, "max_num_batched_tokens": 256, "block_size": 32}
DRAFTS = 3
ROUNDED = 0.1 if ON_GPU else ROUNDING
V1 = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
if ON_GPU:  # with graphs of four sequences that are verified
    ENGINE["compilation_config"] = GPU_ENGINE["compilation_config"] | {"cudagraph_capture_sizes": [1, 2, 4, 8, 16]}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return write_models(tmp_path_factory.mktemp("drafts"))


@pytest.fixture(scope="module")
def calls() -> list[Call]:
    """Two with the same prompts, the second one behind cached prefixes; one prompt repeats itself, for n-grams."""
    chance = random.Random(0)  # noqa: S311 - nothing is secret
    text = [chance.randrange(TINY["vocab_size"]) for _ in range(1200)]
    prompts = [*cut(text, [700, 40, 317]), 4 * text[:60]]
    return [Call(prompts, 40), Call(prompts, 40)]


def drafting(models: Models, who: str) -> dict[str, Any]:
    """An engine's arguments so that this drafts."""
    asked: dict[str, Any] = {"num_speculative_tokens": DRAFTS}
    if who == "ngram":
        asked |= {"method": "ngram", "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    elif who == "mimo":
        asked |= {"method": "mtp"}
    else:
        asked |= {"method": who if "eagle" in who else "draft_model", "model": str(getattr(models, who))}
    return {"speculative_config": asked}


def runner(who: str) -> dict[str, str]:
    """The environment of the model runner that a draft needs: vLLM's V2 gives layers of a `draft_model` our backend."""
    return V1 if ON_GPU and who in ("served", "other", "small") else {}


def ours(
    folder: Path,
    calls: list[Call],
    options: dict[str, Any] | None = None,
    environment: dict[str, str] | None = None,
    **engine: Any,
) -> list[dict[str, Any]]:
    return generate(
        calls,
        environment,
        model=str(folder),
        backend="toptheta",
        options=options or {},
        engine={**ENGINE, **engine},
    )


@pytest.fixture(scope="module")
def sparse(models: Models, calls: list[Call]) -> list[dict[str, Any]]:
    """The answers of thresholds at the default floor without drafts."""
    answers = ours(models.served, calls)
    assert_only_its_layers(answers)
    return answers


def assert_only_its_layers(answers: list[dict[str, Any]]) -> None:
    """Skipping happens, and in layers of the served model alone."""
    for answer in answers:
        heads = answer["stats"][0]["layers"]
        assert len(heads) == NUM_LAYERS * NUM_KV_HEADS
        assert all(0 < head["rows_read"] < head["rows_cached"] for head in heads)
        assert all(0 < head["lost_mass_mean"] < 0.5 for head in heads)


@pytest.mark.parametrize(
    ("who", "share"),
    [
        # of the drafts that are accepted, at least and at most
        # not all: it drafts densely
        pytest.param("served", (0.5, 0.99), marks=pytest.mark.nightly),
        pytest.param("other", (0.3, 0.95), marks=pytest.mark.nightly),
        pytest.param("small", (0.0, 0.1), marks=pytest.mark.nightly),
        pytest.param("eagle", (0.05, 0.9), marks=pytest.mark.nightly),
        pytest.param("eagle3", (0.0, 0.5), marks=pytest.mark.nightly),
        pytest.param("ngram", (0.0, 1.0), marks=pytest.mark.nightly),
    ],
)
def test_drafts_change_no_text_of_thresholds(
    models: Models, calls: list[Call], sparse: list[dict[str, Any]], who: str, share: tuple[float, float]
) -> None:
    answers = ours(models.served, calls, environment=runner(who), **drafting(models, who))
    assert_only_its_layers(answers)
    for answer, plain in zip(answers, sparse, strict=True):
        assert_same_text(answer["outputs"], plain["outputs"], ROUNDED)
        assert share[0] * answer["drafted"] <= answer["accepted"] <= share[1] * answer["drafted"]
        assert answer["drafted"] > 0
        stats = answer["stats"][0]
        if who != "ngram" and not ON_GPU:  # which guesses seldom; where steps overlap, texts end behind drafts
            # every token that is verified is counted, accepted or not
            assert stats["decode_tokens"] == answer["drafted"] + answer["verifications"]
        if share[0] > 0:
            assert stats["decode_steps"] < 0.9 * plain["stats"][0]["decode_steps"]
    assert answers[1]["prefix_hits"] > 0


@pytest.mark.parametrize(
    "who",
    [
        pytest.param(who, marks=[] if who == "eagle" else pytest.mark.nightly)
        for who in ("eagle", "other", "served", "ngram")
    ],
)
def test_where_nothing_is_skipped_the_text_is_that_of_the_stock_backend(
    models: Models, calls: list[Call], who: str
) -> None:
    stock = generate(calls, runner(who), model=str(models.served), engine={**ENGINE, **drafting(models, who)})
    answers = ours(models.served, calls, {"weight_floor": 0}, runner(who), **drafting(models, who))
    for answer, other in zip(answers, stock, strict=True):
        assert_same_text(answer["outputs"], other["outputs"], ROUNDED)
        assert answer["drafted"] > 0
        if not ON_GPU:
            assert answer["accepted"] == other["accepted"]
            assert (answer["accepted"] == answer["drafted"]) == (who == "served")


@pytest.mark.nightly
def test_layers_of_the_model_itself_draft(models: Models, calls: list[Call]) -> None:
    plain = ours(models.mimo, calls)
    answers = ours(models.mimo, calls, **drafting(models, "mimo"))
    assert_only_its_layers(answers)
    for answer, other in zip(answers, plain, strict=True):
        assert_same_text(answer["outputs"], other["outputs"], ROUNDED)
        assert answer["drafted"] > 0


@pytest.mark.skipif(ON_GPU, reason="there, drafts are verified densely beside copies")
@pytest.mark.nightly
def test_copies(models: Models, calls: list[Call]) -> None:
    plain = ours(models.served, calls, COPIES)
    answers = ours(models.served, calls, COPIES, **drafting(models, "other"))
    for answer, other in zip(answers, plain, strict=True):
        assert_same_text(answer["outputs"], other["outputs"])
        assert 0 < answer["accepted"] < answer["drafted"]


@pytest.mark.skipif(ON_GPU, reason="random models part from themselves in float16")
@pytest.mark.nightly
@pytest.mark.parametrize(
    ("seed", "who", "is_preempted"), [(0, "other", False), (1, "eagle", True)], ids=["thresholds", "preempted"]
)
def test_requests_that_come_stop_and_are_left(
    models: Models, tmp_path: Path, seed: int, who: str, is_preempted: bool
) -> None:
    chance = random.Random(seed)  # noqa: S311 - nothing is secret
    requests = random_requests(chance)
    # what was decoded by thresholds is computed densely after a preemption, so only texts that lose nothing are alike
    options = {"min_context": 0, "guard": "off", **(KEEPS_ALL if is_preempted else {"weight_floor": 20.0})}
    engine = {"max_model_len": 700, "block_size": 32}
    config = {"model": str(models.served), "seed": seed, "preempted": 0, "backend": "toptheta", "options": options}
    whole = {
        **config,
        "requests": [{**request, "left": None} for request in requests],
        "backend": None if is_preempted else "toptheta",
        "engine": {**engine, "max_num_seqs": 1},
    }
    crowd = {
        **config,
        "requests": requests,
        "preempted": 0.03 if is_preempted else 0,
        # few blocks, for which requests wait
        "engine": {
            **engine,
            "max_num_seqs": 12 if is_preempted else 4,
            "num_gpu_blocks_override": 56 if is_preempted else 100,
            "max_num_batched_tokens": 256,
            **drafting(models, who),
        },
    }
    expected, found = run("lossless_load", tmp_path, whole)["texts"], run("lossless_load", tmp_path, crowd)
    assert set(found["texts"]) >= {str(index) for index, request in enumerate(requests) if request["left"] is None}
    for index, text in found["texts"].items():
        assert text == expected[index], index
    assert 0 < found["accepted"] < found["drafted"]
    assert found["prefix_hits"] > 0
    assert (found["preemptions"] > 0) == is_preempted


@pytest.mark.nightly
def test_what_an_engine_refuses(models: Models, calls: list[Call]) -> None:
    arguments = drafting(models, "other")
    arguments["speculative_config"]["attention_backend"] = "TOPTHETA"
    words = "--speculative-config draft_model attention_backend: layers that draft have no thresholds"
    with pytest.raises(RuntimeError, match=f"UnsupportedError: .*{words}"):
        ours(models.served, calls, **arguments)
