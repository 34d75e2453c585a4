"""Pages that leave an engine and come back: what stands on them is answered as if they had stayed.

OffloadingConnector keeps pages elsewhere that an engine has no room for; on GPUs vLLM does the copying, on CPUs
`host_offloading` does. Two more of vLLM's connectors run on CPUs: ExampleConnector writes the pages of whole prompts to
files, and by NixlConnector, an engine takes the pages of prompts from another one that has read them.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.e2e.conftest import TINY
from tests.e2e.generate import IN_PROCESSES_OF_THEIR_OWN, Call, generate
from tests.e2e.texts import ON_GPU, ROUNDING, assert_same_text
from vllm_toptheta.support import has_nixl

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(900),
    pytest.mark.xdist_group("connectors"),
]
only_on_cpus = pytest.mark.skipif(ON_GPU, reason="GPUs refuse it")

BLOCK = 32  # the smallest that vLLM's own attention takes
KEEPS_ALL = {"weight_floor": 1e-300}  # sparse, and no score lies that far below the others
COPIES = {"mode": "shadow", "shadow_values": True, "always_shadow": True}
ENGINE = {"skip_tokenizer_init": True, "block_size": BLOCK}
ROUNDED = 0.1 if ON_GPU else ROUNDING
# tokens behind a prefix that is in the cache; a GPU decodes one by thresholds, and several densely
FEW_MORE = (2, 2, 2) if ON_GPU else (0, 1, 1)
# of traces by which much comes back
SEEDS = (1, 4) if ON_GPU else (0, 1, 2)
# in float16 a text may part from itself, and then other rows are read
PARTED = 0.05 if ON_GPU else 1e-3
LONGEST = {"max_model_len": 640, "max_num_batched_tokens": 272}
# room for two sequences; one that is preempted answers otherwise, whoever keeps its pages, because what it has decoded
# by thresholds is computed again as a prompt
FEW_PAGES = {**LONGEST, "num_gpu_blocks_override": 52, "max_num_seqs": 2}
TOO_FEW_PAGES = {**LONGEST, "num_gpu_blocks_override": 26}


def trace(seed: int, num_calls: int = 8) -> list[Call]:
    """Calls whose prompts begin with the same texts, or with each other's whole prompts, in any order.

    Some are answered in a step behind a prefix that fills pages but for a token, or that is in the cache in part.
    """
    chance = random.Random(seed)  # noqa: S311 - nothing is secret
    texts = [[chance.randrange(TINY["vocab_size"]) for _ in range(600)] for _ in range(6)]
    asked: list[list[int]] = []
    calls = []
    for _ in range(num_calls):
        prompts = []
        for _ in range(chance.randint(1, 3)):
            if asked and chance.random() < 0.4:
                begin = chance.choice(asked)
            else:
                begin = chance.choice(texts)[: BLOCK * chance.randint(4, 18)]
            more = chance.choice([*FEW_MORE, chance.randint(2, 60)])
            prompts.append((begin + [chance.randrange(TINY["vocab_size"]) for _ in range(more)])[:600])
        asked += prompts
        calls.append(Call(prompts, chance.choice([4, 20, 40])))
    return calls


def to_host(num_bytes: int) -> dict[str, Any]:
    """The engine's arguments by which pages go to the host, where there is room for so many bytes."""
    if ON_GPU:
        return {"kv_offloading_size": num_bytes / (1 << 30)}
    extra = {
        "spec_name": "HostOffloadingSpec",
        "spec_module_path": "tests.e2e.host_offloading",
        "cpu_bytes_to_use": num_bytes,
    }
    return {
        "kv_transfer_config": {
            "kv_connector": "OffloadingConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": extra,
        }
    }


def to_files(folder: Path) -> dict[str, Any]:
    """The engine's arguments by which prompts go to files, and are found nowhere else."""
    return {
        "enable_prefix_caching": False,
        "kv_transfer_config": {
            "kv_connector": "ExampleConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"shared_storage_path": str(folder)},
        },
    }


def ours(model: Path, calls: list[Call], options: dict[str, Any], engine: dict[str, Any]) -> list[dict[str, Any]]:
    return generate(calls, model=str(model), engine={**ENGINE, **engine}, backend="toptheta", options=options)


class Read(NamedTuple):
    """What all layers read and lost in a call."""

    rows_read: int
    copies_read: int
    lost_mass: float


def read(answer: dict[str, Any]) -> Read:
    heads = [head for rank in answer["stats"] for head in rank["layers"]]
    return Read(
        sum(head["rows_read"] for head in heads),
        sum(head["copies_read"] or 0 for head in heads),
        sum(head["lost_mass_mean"] for head in heads) / len(heads),
    )


def assert_as_if_they_had_stayed(
    answers: list[dict[str, Any]], stayed: list[dict[str, Any]], *, loses: bool = True
) -> None:
    assert sum(answer["brought"] for answer in answers) > 300
    assert sum(answer["brought"] for answer in stayed) == 0
    for answer, other in zip(answers, stayed, strict=True):
        assert_same_text(answer["outputs"], other["outputs"], ROUNDED)
        one, another = read(answer), read(other)
        assert one.rows_read == pytest.approx(another.rows_read, rel=PARTED)
        assert one.copies_read == pytest.approx(another.copies_read, rel=PARTED)
        assert one.lost_mass == pytest.approx(another.lost_mass, rel=PARTED, abs=1e-6)
    assert loses == any(read(answer).lost_mass > 0.01 for answer in answers)


@pytest.mark.parametrize(
    ("options", "seed"),
    [
        ({}, SEEDS[0]),
        *(pytest.param({}, seed, marks=pytest.mark.nightly) for seed in SEEDS[1:]),
        *(pytest.param(COPIES, seed, marks=[pytest.mark.nightly, only_on_cpus]) for seed in (0, 1)),
    ],
)
def test_a_prefix_that_was_offloaded(tiny_llama: Path, options: dict[str, Any], seed: int) -> None:
    calls = trace(seed)
    stayed = ours(tiny_llama, calls, options, {**LONGEST, "max_num_seqs": 2})
    answers = ours(tiny_llama, calls, options, {**FEW_PAGES, **to_host(1 << 28)})
    assert sum(answer["preemptions"] for answer in answers) == 0
    assert_as_if_they_had_stayed(answers, stayed)


@pytest.mark.nightly
def test_where_every_key_is_kept_the_text_is_the_stock_backends(tiny_llama: Path) -> None:
    calls = trace(0)
    stock = generate(calls, model=str(tiny_llama), engine={**ENGINE, **LONGEST})
    # little room there too, so that what comes back is a part of what left
    answers = ours(tiny_llama, calls, KEEPS_ALL, {**TOO_FEW_PAGES, **to_host(6 << 20)})
    assert sum(answer["brought"] for answer in answers) > 100
    assert sum(answer["preemptions"] for answer in answers) > 0
    for answer, other in zip(answers, stock, strict=True):
        assert_same_text(answer["outputs"], other["outputs"], ROUNDED)


@only_on_cpus
@pytest.mark.nightly
@pytest.mark.parametrize("options", [{}, COPIES], ids=["values", "copies"])
def test_a_prompt_from_files(tiny_llama: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    chance = random.Random(7)  # noqa: S311 - nothing is secret
    prompts = [[chance.randrange(TINY["vocab_size"]) for _ in range(length)] for length in (300, 33, 700, 97)]
    calls = [Call(prompts, 24)] * 2
    stayed = ours(tiny_llama, calls, options, {})
    # the second call reads what the first one wrote, and so does all of another engine
    first, second = ours(tiny_llama, calls, options, to_files(tmp_path))
    assert first["brought"] == 0
    assert_as_if_they_had_stayed([second], stayed[1:])
    assert_as_if_they_had_stayed(ours(tiny_llama, calls, options, to_files(tmp_path)), stayed)


needs_nixl = pytest.mark.skipif(not has_nixl(), reason="needs the package nixl, which the extra cpu-dev has")


def decoded_elsewhere(
    model: Path,
    calls: list[Call],
    options: dict[str, Any],
    prefill: dict[str, Any],
    *,
    engine: dict[str, Any] | None = None,
    prefill_engine: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """What an engine answers to prompts that another one has read, with options and arguments of its own."""
    return generate(
        calls,
        {**IN_PROCESSES_OF_THEIR_OWN, "OMP_NUM_THREADS": "1"},
        model=str(model),
        engine={**ENGINE, **LONGEST, **(engine or {})},
        backend="toptheta",
        options=options,
        prefill=prefill,
        prefill_engine=prefill_engine or {},
    )


@only_on_cpus
@needs_nixl
@pytest.mark.nightly
@pytest.mark.parametrize(
    ("options", "prefill"),
    [
        # dense layers write no tails
        ({}, {"weight_floor": 0}),
        ({}, {}),
        (COPIES, COPIES),
        (COPIES, {}),
    ],
    ids=["dense prefill", "values", "copies", "another mode"],
)
def test_a_prompt_that_another_engine_read(tiny_llama: Path, options: dict[str, Any], prefill: dict[str, Any]) -> None:
    calls = trace(3)
    answers = decoded_elsewhere(tiny_llama, calls, options, prefill)
    assert_as_if_they_had_stayed(answers, ours(tiny_llama, calls, options, LONGEST))


@only_on_cpus
@needs_nixl
@pytest.mark.nightly
@pytest.mark.parametrize(("prefill_ranks", "ranks"), [(1, 2), (2, 1), (2, 2)])
@pytest.mark.parametrize("options", [{}, COPIES], ids=["values", "copies"])
def test_a_prompt_that_an_engine_of_other_ranks_read(
    tiny_llama: Path, options: dict[str, Any], prefill_ranks: int, ranks: int
) -> None:
    calls = trace(3, 4)
    engine, prefill = ({"tensor_parallel_size": number} for number in (ranks, prefill_ranks))
    answers = decoded_elsewhere(tiny_llama, calls, options, options, engine=engine, prefill_engine=prefill)
    assert [len(rank["layers"]) for rank in answers[0]["stats"]] == [8 // ranks] * ranks
    assert_as_if_they_had_stayed(answers, ours(tiny_llama, calls, options, LONGEST))


@only_on_cpus
@needs_nixl
@pytest.mark.nightly
def test_where_every_key_is_kept_the_text_behind_another_engine_is_the_stock_backends(tiny_llama: Path) -> None:
    calls = trace(4)
    answers = decoded_elsewhere(tiny_llama, calls, KEEPS_ALL, KEEPS_ALL)
    assert sum(answer["brought"] for answer in answers) > 300
    for answer, other in zip(
        answers, generate(calls, model=str(tiny_llama), engine={**ENGINE, **LONGEST}), strict=True
    ):
        assert_same_text(answer["outputs"], other["outputs"])


@only_on_cpus
@needs_nixl
@pytest.mark.nightly
def test_no_token_is_answered_from_pages_of_another_length(tiny_llama: Path) -> None:
    prompt = trace(0)[0].prompts[0]
    # the same engines answer where pages are as long as each other
    engine, prefill = {"block_size": 2 * BLOCK}, {"block_size": BLOCK}
    (answer,) = decoded_elsewhere(tiny_llama, [Call([prompt], 8)], {}, {}, engine=engine, prefill_engine=prefill)
    assert answer["outputs"][0]["token_ids"] == []
