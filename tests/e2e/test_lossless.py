"""Lossless: whatever is drafted, texts are those of dense attention, and samples have its distribution."""

from __future__ import annotations

import itertools
import json
import os
import random
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GraniteSWAConfig, LlamaConfig

from tests.e2e.conftest import TINY, Subject, write_model, write_tokenizer
from tests.e2e.generate import ENVIRONMENT, GPU_ENGINE, IN_PROCESSES_OF_THEIR_OWN, IN_THIS_PROCESS, Call, generate
from tests.e2e.texts import ON_GPU, assert_same_text, cut

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(900),
    pytest.mark.xdist_group("lossless"),
]

LENGTHS = [700, 160, 1500, 40]
# such a prompt fills 20 of 84 blocks and grows to 23: all four start, and not all of them can end
TIGHT_LENGTHS = [305] * 4
MAX_TOKENS = 40
NO_GRAPHS = {"enforce_eager": True, "compilation_config": {}}


@pytest.fixture(scope="module")
def drafting(request: pytest.FixtureRequest) -> Subject:
    """Whose drafts are often wrong: on CPUs the random model, on GPUs one that parts from itself less in float16."""
    subject: Subject = request.getfixturevalue("demo" if ON_GPU else "tiny")
    return subject._replace(floor=20.0)


@pytest.fixture(scope="module")
def prompts(drafting: Subject) -> list[list[int]]:
    return cut(drafting.text, LENGTHS + TIGHT_LENGTHS)


@pytest.fixture(scope="module")
def dense(drafting: Subject, prompts: list[list[int]]) -> list[dict[str, Any]]:
    (answer,) = drafting.stock([Call(prompts, MAX_TOKENS)])
    return answer["outputs"]


def lossless(
    subject: Subject,
    calls: list[Call],
    *,
    draft_tokens: int | str = 4,
    environment: dict[str, str] | None = None,
    options: dict[str, Any] | None = None,
    **engine: Any,
) -> list[dict[str, Any]]:
    if ON_GPU:
        numbers = (8, 4, 0) if draft_tokens == "auto" else (int(draft_tokens),)
        sizes = sorted({num_seqs * (number + 1) for num_seqs in (1, 2, 4, 8) for number in numbers})
        graphs = GPU_ENGINE["compilation_config"] | {"cudagraph_capture_sizes": sizes}
        engine = {"compilation_config": graphs, **engine}
    return generate(
        calls,
        environment,
        model=str(subject.model),
        backend="toptheta",
        options={"lossless": True, "draft_tokens": draft_tokens, "weight_floor": subject.floor, **(options or {})},
        engine={**subject.engine, **engine},
    )


# four are drafted in most tests below
@pytest.mark.parametrize(
    "draft_tokens",
    [pytest.param(1, marks=pytest.mark.nightly), pytest.param(4, marks=pytest.mark.nightly), 20],
    ids="{} drafts".format,
)
def test_texts_are_those_of_dense_attention(
    drafting: Subject, prompts: list[list[int]], dense: list[dict[str, Any]], draft_tokens: int
) -> None:
    calls = [Call(prompts, MAX_TOKENS)] * 2
    first, again = lossless(
        drafting, calls, draft_tokens=draft_tokens, enable_prefix_caching=True, max_num_batched_tokens=512
    )
    assert_same_text(first["outputs"], dense)
    assert_same_text(again["outputs"], dense)
    assert again["prefix_hits"] > 2000
    # some are accepted, and some are not: the model draws from its own thresholds
    for one in (first, again):
        assert 0 < one["accepted"] < 0.98 * one["drafted"]


@pytest.mark.nightly
def test_as_many_drafts_as_are_fastest(
    drafting: Subject, prompts: list[list[int]], dense: list[dict[str, Any]]
) -> None:
    # a model whose drafts are mostly accepted needs more tokens until all numbers were tried
    answers = lossless(drafting, [Call(prompts[:3], MAX_TOKENS)] * (12 if ON_GPU else 3), draft_tokens="auto")
    for answer in answers:
        assert_same_text(answer["outputs"], dense[:3])
    drafted, verifications = (sum(answer[name] for answer in answers) for name in ("drafted", "verifications"))
    # eight first, and then others
    assert 0 < drafted < (7.5 if ON_GPU else 7) * verifications
    assert sum(answer["accepted"] for answer in answers) > 0


@pytest.fixture(scope="module")
def windowed(drafting: Subject, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """The same weights, with a window in every other layer."""
    folder = tmp_path_factory.mktemp("windowed") / "model"
    folder.mkdir()
    for file in drafting.model.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    kinds = ["sliding_attention", "full_attention"] * (config["num_hidden_layers"] // 2)
    (folder / "config.json").write_text(json.dumps({**config, "layer_types": kinds, "sliding_window": 256}))
    return drafting._replace(model=folder)


@pytest.mark.nightly
@pytest.mark.parametrize("mode", ["values", "shadow"])
def test_layers_with_windows(windowed: Subject, prompts: list[list[int]], mode: str) -> None:
    options = {"mode": mode, **({"always_shadow": True} if mode == "shadow" else {})}
    calls = [Call(prompts[: len(LENGTHS)], MAX_TOKENS)] * 2
    engine = {"options": options, "enable_prefix_caching": True, "max_num_batched_tokens": 512}
    config = json.loads((windowed.model / "config.json").read_text())
    (dense,) = windowed.stock(calls[:1])
    for answer in lossless(windowed, calls, **engine):
        assert_same_text(answer["outputs"], dense["outputs"])
        assert 0 < answer["accepted"] < answer["drafted"]
        num_sparse = config["num_hidden_layers"] // 2
        assert len(answer["stats"][0]["layers"]) == num_sparse * config["num_key_value_heads"]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            {"mode": "shadow", "shadow_values": True, "always_shadow": True}, id="copies", marks=pytest.mark.nightly
        ),
        pytest.param(
            {"weight_floor": 900.0, "compensation": "none"}, id="next to nothing is read", marks=pytest.mark.nightly
        ),
    ],
)
def test_whatever_drafts(
    drafting: Subject, prompts: list[list[int]], dense: list[dict[str, Any]], options: dict[str, Any]
) -> None:
    (answer,) = lossless(drafting, [Call(prompts, MAX_TOKENS)], options=options)
    assert_same_text(answer["outputs"], dense)
    assert 0 < answer["accepted"] < 0.98 * answer["drafted"]
    (stats,) = answer["stats"]
    # what is counted are drafts, and their keys are skipped
    assert stats["decode_tokens"] >= answer["drafted"]
    assert sum(head["rows_read"] for head in stats["layers"]) < 0.8 * sum(
        head["rows_cached"] for head in stats["layers"]
    )


def test_preemption(drafting: Subject, prompts: list[list[int]], dense: list[dict[str, Any]]) -> None:
    tight = slice(len(LENGTHS), None)
    (answer,) = lossless(
        drafting, [Call(prompts[tight], MAX_TOKENS)], block_size=16, num_gpu_blocks_override=84, max_model_len=512
    )
    assert answer["preemptions"] > 0
    assert_same_text(answer["outputs"], dense[tight])


@pytest.mark.nightly
def test_up_to_the_longest_sequence(drafting: Subject, prompts: list[list[int]], dense: list[dict[str, Any]]) -> None:
    (answer,) = lossless(
        drafting, [Call(prompts[:2], MAX_TOKENS)], draft_tokens=7, max_model_len=LENGTHS[0] + MAX_TOKENS
    )
    assert_same_text(answer["outputs"], dense[:2])


@pytest.fixture(scope="module")
def speaking(drafting: Subject, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """The same with a tokenizer, which grammars need."""
    if ON_GPU:
        return drafting
    words = [*string.printable[:95], *map("".join, itertools.product('{}[]":,. 0123456789abcdef', repeat=2))]
    words = [*words[: TINY["vocab_size"] - 1], "</s>"]
    last = len(words) - 1
    folder = tmp_path_factory.mktemp("speaking")
    model = write_model(LlamaConfig(**TINY, bos_token_id=last, eos_token_id=last), folder)
    write_tokenizer(words, model)
    return drafting._replace(model=model, engine={})


@pytest.mark.nightly
def test_texts_follow_grammars(speaking: Subject, prompts: list[list[int]]) -> None:
    person = {"name": {"type": "string", "maxLength": 20}, "ages": {"type": "array", "items": {"type": "integer"}}}
    schema = {"type": "object", "properties": person, "required": list(person), "additionalProperties": False}
    structures = [{"json": schema}, {"regex": "[0-9a-f]{8}(-[0-9a-f]{2,4})+"}, None, {"choice": ["abcabc", "abcabd"]}]
    call = Call(prompts[: len(structures)], MAX_TOKENS, structures=structures)
    (expected,) = speaking.stock([call])
    (answer,) = lossless(speaking, [call])
    assert_same_text(answer["outputs"], expected["outputs"])
    assert 0 < answer["accepted"] < 0.98 * answer["drafted"]


@pytest.mark.nightly
@pytest.mark.skipif(ON_GPU, reason="GPUs refuse it")
def test_requests_that_are_not_verified(
    drafting: Subject, prompts: list[list[int]], dense: list[dict[str, Any]]
) -> None:
    floor = f"floor:{drafting.other:g}"
    long, beside = [prompts[0], prompts[2]], prompts[1]
    (sparse,) = drafting.sparse([Call(long, MAX_TOKENS, asked=[None, floor])])
    assert all(
        one["token_ids"] != dense[index]["token_ids"] for one, index in zip(sparse["outputs"], (0, 2), strict=True)
    )
    more = [[*prompts[0], *sparse["outputs"][0]["token_ids"], 7]]
    mixed, verified, unverified, refused = lossless(
        drafting,
        [
            Call([long[0], beside, long[1]], MAX_TOKENS, asked=["lossy", None, f"lossy {floor}"]),
            Call(more, 8),
            Call(more, 8, asked=["lossy"]),
            Call(more, 8, asked=["lossy dense"], refused=True),
        ],
        enable_prefix_caching=True,
        block_size=16,
    )
    first, other, second = mixed["outputs"]
    assert_same_text([first, second], sparse["outputs"])
    assert_same_text([other], dense[1:2])
    assert mixed["stats"][0]["requests"]["lossy"] == 2
    # what thresholds have decoded is found again, but not by those who did not ask for it
    assert verified["prefix_hits"] == 0
    assert unverified["prefix_hits"] > len(prompts[0]) + MAX_TOKENS - 16
    assert "can ask for dense, floor:20, floor:0 to 1000, lossy, not for 'lossy dense'" in refused["refusal"]


@pytest.mark.nightly
def test_drafts_of_dense_requests_are_all_accepted(
    drafting: Subject, prompts: list[list[int]], dense: list[dict[str, Any]]
) -> None:
    (answer,) = lossless(drafting, [Call(prompts, MAX_TOKENS, asked=["dense"] * len(prompts))])
    assert_same_text(answer["outputs"], dense)
    # drafts behind the last token are cut, not rejected
    assert answer["accepted"] > 0.9 * answer["drafted"]


@pytest.mark.nightly
@pytest.mark.skipif(ON_GPU and torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_ranks(drafting: Subject, prompts: list[list[int]], dense: list[dict[str, Any]]) -> None:
    short = [1, 3]
    (answer,) = lossless(
        drafting,
        [Call([prompts[index] for index in short], 16)],
        environment=IN_PROCESSES_OF_THEIR_OWN,
        tensor_parallel_size=2,
    )
    expected = [{"token_ids": dense[index]["token_ids"][:16], "top2": dense[index]["top2"][:16]} for index in short]
    assert_same_text(answer["outputs"], expected)
    assert answer["accepted"] > 0


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_drafts_run_in_full_graphs(drafting: Subject, prompts: list[list[int]], dense: list[dict[str, Any]]) -> None:
    call, few = Call(prompts[:3], MAX_TOKENS), Call(prompts[:1], 4)
    (replayed,) = lossless(drafting, [call], environment=IN_THIS_PROCESS)
    assert (replayed["graph_mode"], replayed["python_decodes"]) == ("FULL_DECODE_ONLY", 0)
    called, again = lossless(drafting, [few, call], environment=IN_THIS_PROCESS, **NO_GRAPHS)
    assert called["graph_mode"] == "NONE"
    assert called["python_decodes"] > 0
    for one in (replayed, again):
        assert_same_text(one["outputs"], dense[:3])


def test_refusals(drafting: Subject, prompts: list[list[int]]) -> None:
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}
    for engine, words in (
        ({"speculative_config": ngram}, "lossless: drafts come from the served model itself"),
        ({"enable_lora": True}, "--enable-lora: lossless drafts do not know which adapter a request has"),
    ):
        with pytest.raises(RuntimeError, match=words):
            lossless(drafting, [Call(prompts[:1], 4)], **engine)


def run(module: str, folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    result = folder / "result.json"
    process = subprocess.run(
        [sys.executable, "-m", f"tests.e2e.{module}", str(result)],
        input=json.dumps(config),
        env={**os.environ, **ENVIRONMENT, **IN_THIS_PROCESS},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert process.returncode == 0, process.stdout[-6000:]
    found: dict[str, Any] = json.loads(result.read_text())
    return found


WINDOWED = {"sliding_window": 48, "layer_types": ["sliding_attention", "full_attention"] * 2}
COPIES = {"mode": "shadow", "shadow_values": True, "always_shadow": True}


def random_requests(chance: random.Random) -> list[dict[str, Any]]:
    """Prompts of which many begin alike, that stop early or late, and some of which are left."""
    vocabulary, beginning = TINY["vocab_size"], [chance.randrange(512) for _ in range(400)]
    return [
        {
            "prompt": [
                *beginning[: chance.choice([0, 64, 333, 400])],
                *(chance.randrange(vocabulary) for _ in range(chance.randrange(1, 200))),
            ],
            "max_tokens": chance.randrange(1, 60),
            "stop": [chance.randrange(vocabulary) for _ in range(chance.choice([0, 0, 30]))],
            "left": chance.choice([None, None, None, 1, 7]),
        }
        for _ in range(24)
    ]


@pytest.mark.skipif(ON_GPU, reason="random models part from themselves in float16")
@pytest.mark.parametrize(
    ("seed", "has_windows", "options"),
    [
        pytest.param(0, False, {}, id="values"),
        pytest.param(1, True, {}, id="windows and sinks", marks=pytest.mark.nightly),
        pytest.param(2, False, COPIES, id="copies", marks=pytest.mark.nightly),
        pytest.param(3, True, COPIES, id="windows, sinks and copies", marks=pytest.mark.nightly),
    ],
)
def test_requests_that_come_stop_and_are_left(
    tmp_path: Path, seed: int, has_windows: bool, options: dict[str, Any]
) -> None:
    chance = random.Random(seed)  # noqa: S311 - nothing is secret
    # scores spread differently from model to model, and so does what is accepted
    fields = {
        **TINY,
        "initializer_range": chance.choice([0.06, 0.1, 0.15]),
        "num_key_value_heads": chance.choice([1, 2, 4]),
    }
    family = (
        GraniteSWAConfig(**fields, **WINDOWED, attention_multiplier=0.125) if has_windows else LlamaConfig(**fields)
    )
    model = write_model(family, tmp_path)
    requests = random_requests(chance)
    config = {"model": str(model), "requests": requests, "seed": seed, "preempted": 0}
    engine = {"max_model_len": 700, "block_size": 32}
    whole = [{**request, "left": None} for request in requests]
    expected = run(
        "lossless_load",
        tmp_path,
        {**config, "requests": whole, "backend": None, "options": {}, "engine": {**engine, "max_num_seqs": 1}},
    )["texts"]
    found = run(
        "lossless_load",
        tmp_path,
        {
            **config,
            "backend": "toptheta",
            "options": {
                "lossless": True, "draft_tokens": chance.randrange(1, 9), "weight_floor": 20.0, "min_context": 0,
                "guard": "off", **options,
            },
            "preempted": 0.03,
            # few blocks, for which requests wait
            "engine": {
                **engine, "max_num_seqs": chance.choice([2, 6, 12]), "num_gpu_blocks_override": 56,
                "max_num_batched_tokens": 256,
            },
        },
    )  # fmt: skip
    assert set(found["texts"]) >= {str(index) for index, request in enumerate(requests) if request["left"] is None}
    for index, text in found["texts"].items():
        assert text == expected[index], index
    assert 0 < found["accepted"] < found["drafted"]
    assert found["prefix_hits"] > 0
    assert found["preemptions"] > 0


FLOOR = {"weight_floor": 20.0, "min_context": 0, "guard": "off"}
DRAFTING = {**FLOOR, "lossless": True, "draft_tokens": 2}


def sampled(folder: Path, **config: Any) -> dict[str, Any]:
    """How texts of three tokens that a model of few words says are sampled, so that they repeat.

    Args:
        folder: Where the model goes.
        config: That of `tests.e2e.sample`, its `options` being those of dense attention if not given.
    """
    words = [*"abcdefg", "</s>"]
    fields = {**TINY, "vocab_size": len(words), "num_hidden_layers": 2, "bos_token_id": 7, "eos_token_id": 7}
    model = write_model(LlamaConfig(**fields), folder)
    write_tokenizer(words, model)
    chance = random.Random(3)  # noqa: S311 - nothing is secret
    return run(
        "sample",
        folder,
        {
            "model": str(model),
            "prompt": [chance.randrange(len(words)) for _ in range(300)],
            "number": 4000,
            "backend": "toptheta" if "options" in config else None,
            "options": {},
            "sampling": {"temperature": 1.5, "max_tokens": 3},
            **config,
        },
    )


@pytest.mark.nightly
def test_samples_have_the_distribution_of_dense_attention(tmp_path: Path) -> None:
    dense = sampled(tmp_path, seed=1)
    lossy = sampled(tmp_path, options=FLOOR, seed=2)
    ours = sampled(tmp_path, options=DRAFTING, seed=3)
    unverified = sampled(tmp_path, options=DRAFTING, asked="lossy", number=2000, seed=4)
    assert 0.3 * ours["drafted"] < ours["accepted"] < 0.98 * ours["drafted"]
    # the same number of samples tells what thresholds change
    assert p_value(dense["counts"], lossy["counts"]) < 1e-6
    assert p_value(dense["counts"], ours["counts"]) > 1e-3
    assert p_value(lossy["counts"], unverified["counts"]) > 1e-3
    assert unverified["accepted"] > 0.98 * unverified["drafted"]


def test_samples_of_few_tokens(tmp_path: Path) -> None:
    few = {"number": 2000, "sampling": {"temperature": 1.5, "max_tokens": 3, "top_k": 5, "top_p": 0.8}}
    dense, ours = (sampled(tmp_path, **few, **one) for one in ({"seed": 1}, {"options": DRAFTING, "seed": 3}))
    assert p_value(dense["counts"], ours["counts"]) > 1e-3
    # 0.61 of the drafts that know the temperature only, as those on GPUs do
    assert ours["accepted"] > (0.5 if ON_GPU else 0.65) * ours["drafted"]


@pytest.mark.nightly
def test_samples_that_follow_a_grammar(tmp_path: Path) -> None:
    # it cuts most of the drafts
    pattern = {"number": 6000, "regex": "[a-g][abc][a-g]"}
    dense, ours = (sampled(tmp_path, **pattern, **one) for one in ({"seed": 1}, {"options": DRAFTING, "seed": 3}))
    assert all(text.split(",")[1] in "012" for text in ours["counts"])
    assert p_value(dense["counts"], ours["counts"]) > 1e-3
    assert ours["accepted"] > 0


def p_value(one: dict[str, int], other: dict[str, int]) -> float:
    """Of the chi-squared test that both are drawn from one distribution; rare texts count as one."""
    common = [text for text in one.keys() | other.keys() if one.get(text, 0) + other.get(text, 0) >= 20]
    table = torch.tensor([[counts.get(text, 0) for text in common] for counts in (one, other)], dtype=torch.float64)
    rest = torch.tensor([sum(one.values()), sum(other.values())]) - table.sum(1)
    if rest.sum() >= 20:
        table = torch.cat((table, rest[:, None]), dim=1)
    expected = table.sum(1, keepdim=True) * table.sum(0, keepdim=True) / table.sum()
    statistic = ((table - expected) ** 2 / expected).sum()
    degrees = torch.tensor(table.shape[1] - 1, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees / 2, statistic / 2))
