"""What the engine generates must not depend on how it batches, caches, chunks, preempts or splits the work.

That holds for requests that ask for dense decoding or another floor, too: they get what a server of that setting
gives, whoever is beside them. The engines here serve both.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
import torch

from tests.e2e.conftest import Subject
from tests.e2e.generate import IN_PROCESSES_OF_THEIR_OWN, Call
from tests.e2e.texts import assert_same_text, cut

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

LENGTHS = [500, 1200, 160, 1800]  # prompt tokens
# such a prompt fills 20 of 84 blocks and grows to 22: all four start, and not all of them can end
TIGHT_LENGTHS = [305] * 4
RANKS_LENGTHS = [40, 300, 300]
MAX_TOKENS = 40
LOW_FLOOR = 0.01
RANKS_MAX_TOKENS = 24  # two ranks wait for each other at every layer of every step

Outputs = list[dict[str, Any]]


class Undisturbed(NamedTuple):
    """The answers of one engine: whole prompts in one step, room for all, and no cache reuse before `cached`.

    Attributes:
        prompts: Those of the first call, which hold `LENGTHS` and `TIGHT_LENGTHS`.
        first: The first call's.
        cached: The same call again.
        ranks: Of the prompts for two ranks.
        refused: Of a request for a target, where thresholds are relative.
        other: Outputs of the prompts, one request after the other, each asking for the other floor.
    """

    prompts: list[list[int]]
    first: dict[str, Any]
    cached: dict[str, Any]
    ranks: dict[str, Any]
    refused: dict[str, Any]
    other: Outputs


@pytest.fixture(scope="module")
def undisturbed(subject: Subject) -> Undisturbed:
    prompts = cut(subject.text, LENGTHS + TIGHT_LENGTHS)
    first, cached, ranks, refused, *other = subject.sparse(
        [
            Call(prompts),
            Call(prompts),
            Call(cut(subject.text, RANKS_LENGTHS), RANKS_MAX_TOKENS),
            Call([[1, 2, 3]], asked=["k:100"], refused=True),
            *(Call([prompt], asked=[floor(subject.other)]) for prompt in prompts),
        ],
        enable_prefix_caching=True,
        block_size=32,
        max_num_batched_tokens=8192,
    )
    return Undisturbed(prompts, first, cached, ranks, refused, [output for one in other for output in one["outputs"]])


@pytest.fixture(scope="module")
def dense(subject: Subject, undisturbed: Undisturbed) -> dict[str, Outputs]:
    """vLLM's own backend, on the same prompts as `undisturbed`."""
    prompts, ranks = subject.stock(
        [Call(undisturbed.prompts), Call(cut(subject.text, RANKS_LENGTHS), RANKS_MAX_TOKENS)]
    )
    return {"prompts": prompts["outputs"], "ranks": ranks["outputs"]}


def floor(weight_floor: float) -> str:
    """How a request asks for it."""
    return f"floor:{weight_floor:g}"


def mix(subject: Subject) -> list[str | None]:
    """What four requests of a batch ask for."""
    return ["dense", None, floor(subject.other), "dense"]


def pick(*answers: Outputs) -> Outputs:
    """Of each of several runs of a batch the output in that place."""
    return [run[index] for index, run in enumerate(answers)]


@pytest.fixture(scope="module")
def chunked(subject: Subject, undisturbed: Undisturbed) -> list[dict[str, Any]]:
    """Small steps and small pages, on a server of the other floor: a plain batch, and one of mixed requests."""
    prompts = undisturbed.prompts[: len(LENGTHS)]
    return subject.sparse(
        [Call(prompts), Call(prompts, asked=["dense", None, floor(subject.floor), "dense"])],
        floor=subject.other,
        max_num_batched_tokens=200,
        block_size=16,
        enable_prefix_caching=False,
    )


class Tight(NamedTuple):
    """The answers of one engine whose cache is too small for a whole batch.

    A preempted sequence is read again as a prompt is, densely. So floors are low here, where that changes no text.

    Attributes:
        usual: Outputs of the prompts, one request after the other.
        plain, mixed: The answers of whole batches.
    """

    usual: Outputs
    plain: dict[str, Any]
    mixed: dict[str, Any]


@pytest.fixture(scope="module")
def tight(subject: Subject, undisturbed: Undisturbed) -> Tight:
    prompts = undisturbed.prompts[len(LENGTHS) :]
    *alone, plain, mixed = subject.sparse(
        [*(Call([prompt]) for prompt in prompts), Call(prompts), Call(prompts, asked=mix(subject))],
        floor=LOW_FLOOR,
        num_gpu_blocks_override=84,
        block_size=16,
        max_model_len=400,
        enable_prefix_caching=False,
    )
    assert not any(answer["preemptions"] for answer in alone)
    return Tight([answer["outputs"][0] for answer in alone], plain, mixed)


def test_thresholds_are_at_work(subject: Subject, undisturbed: Undisturbed) -> None:
    (stats,) = undisturbed.first["stats"]
    layers = [head["layer"] for head in stats["layers"] if head["kv_head"] == 0]
    assert layers == list(range(stats["num_layers"]))
    cached = sum(head["rows_cached"] for head in stats["layers"])
    assert sum(head["rows_read"] for head in stats["layers"]) < 0.5 * cached
    lost = [head["lost_mass_mean"] for head in stats["layers"]]
    assert all(0 < mass < 1 for mass in lost)
    # in the mean of heads: single ones of a trained model's first layer look at everything alike, and lose most of it
    assert sum(lost) < 0.5 * len(lost)


def test_floors_differ(subject: Subject, undisturbed: Undisturbed, dense: dict[str, Outputs]) -> None:
    # so that a request that is decoded in another way than it asks for has another text
    runs = (dense["prompts"], undisturbed.first["outputs"], undisturbed.other)
    texts = [[tuple(output["token_ids"]) for output in outputs] for outputs in runs]
    for one, other in itertools.combinations(texts, 2):
        assert sum(a != b for a, b in zip(one, other, strict=True)) >= subject.differing * len(one)


def test_prefix_caching(undisturbed: Undisturbed) -> None:
    assert undisturbed.first["prefix_hits"] == 0
    assert undisturbed.cached["prefix_hits"] > 4000
    assert_same_text(undisturbed.cached["outputs"], undisturbed.first["outputs"])


def test_chunked_prefill_and_small_blocks(undisturbed: Undisturbed, chunked: list[dict[str, Any]]) -> None:
    # a server of the other floor gives what requests for it are given elsewhere
    assert_same_text(chunked[0]["outputs"], undisturbed.other[: len(LENGTHS)])


def test_each_in_a_batch_gets_what_it_asks_for(
    subject: Subject, undisturbed: Undisturbed, dense: dict[str, Outputs], chunked: list[dict[str, Any]]
) -> None:
    stock = dense["prompts"]
    assert_same_text(chunked[1]["outputs"], pick(stock, undisturbed.other, undisturbed.first["outputs"], stock))
    assert_counts(chunked[1], subject, {"dense": 2, "floor": 1})


@pytest.mark.nightly
def test_requests_that_wait_for_a_row(subject: Subject, undisturbed: Undisturbed, dense: dict[str, Outputs]) -> None:
    call = Call(undisturbed.prompts[: len(LENGTHS)], asked=mix(subject))
    (two_at_a_time,) = subject.sparse([call], max_num_seqs=2)
    stock = dense["prompts"]
    assert_same_text(two_at_a_time["outputs"], pick(stock, undisturbed.first["outputs"], undisturbed.other, stock))
    assert_counts(two_at_a_time, subject, {"dense": 2, "floor": 1})


def assert_counts(answer: dict[str, Any], subject: Subject, requests: dict[str, int]) -> None:
    """Each request of a mixed batch is counted as what it is."""
    (stats,) = answer["stats"]
    assert stats["requests"] == requests
    assert stats["asked_tokens"] == 3 * (MAX_TOKENS - 1)
    # only the request that asked for nothing is measured
    assert {sum(layer["counts"]) for layer in stats["lost_mass"]} == {subject.num_heads * (MAX_TOKENS - 1)}


def test_preemption(tight: Tight) -> None:
    assert tight.plain["preemptions"] > 0
    assert any(head["rows_read"] < head["rows_cached"] for head in tight.plain["stats"][0]["layers"])
    assert_same_text(tight.plain["outputs"], tight.usual)


def test_preempted_requests_keep_what_they_asked_for(subject: Subject, dense: dict[str, Outputs], tight: Tight) -> None:
    preemptions = tight.mixed["preemptions"]
    assert preemptions > 0
    stock = dense["prompts"][len(LENGTHS) :]
    for row, expected in ((0, stock), (1, tight.usual), (3, stock)):
        assert_same_text([tight.mixed["outputs"][row]], [expected[row]])
    (stats,) = tight.mixed["stats"]
    assert stats["requests"] == {"dense": 2, "floor": 1}
    # each time that a sequence is read again, its next token comes of that
    tokens = 3 * (MAX_TOKENS - 1)
    assert tokens - preemptions <= stats["asked_tokens"] <= tokens


def test_an_offline_engine_refuses_what_it_does_not_have(subject: Subject, undisturbed: Undisturbed) -> None:
    labels = undisturbed.first["stats"][0]["choices"]
    assert labels == ["dense", floor(subject.floor), "floor:0 to 1000"]
    refusal = f"vllm_xargs.toptheta: a request can ask for {', '.join(labels)}, not for 'k:100'"
    assert refusal in undisturbed.refused["refusal"]
    assert undisturbed.refused["stats"][0]["decode_tokens"] == 0


def on_two_ranks(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test with the random model: the demo model's three kv heads cannot be shared by two ranks."""
    tiny = pytest.param("tiny", marks=pytest.mark.xdist_group("tiny"))
    test = pytest.mark.parametrize("subject", [tiny], indirect=True, scope="session")(test)
    return pytest.mark.skipif(torch.cuda.device_count() == 1, reason="needs two GPUs, or none")(test)


@pytest.fixture(scope="module")
def two_ranks(subject: Subject) -> list[dict[str, Any]]:
    """A plain batch, and one of requests that ask for something."""
    prompts = cut(subject.text, RANKS_LENGTHS)
    return subject.sparse(
        [Call(prompts, RANKS_MAX_TOKENS), Call(prompts, RANKS_MAX_TOKENS, asked=["dense", None, "dense"])],
        {**IN_PROCESSES_OF_THEIR_OWN, "OMP_NUM_THREADS": "1"},
        tensor_parallel_size=2,
    )


def heads(stats: Iterable[dict[str, Any]]) -> dict[tuple[int, int], dict[str, Any]]:
    """Every rank's records by layer and kv head."""
    return {(head["layer"], head["kv_head"]): head for rank in stats for head in rank["layers"]}


@on_two_ranks
def test_tensor_parallel(undisturbed: Undisturbed, two_ranks: list[dict[str, Any]]) -> None:
    stats = two_ranks[0]["stats"]
    assert [{head["kv_head"] for head in rank["layers"]} for rank in stats] == [{0}, {1}]
    one_rank = heads(undisturbed.ranks["stats"])
    assert heads(stats).keys() == one_rank.keys()
    for place, head in heads(stats).items():
        assert head["rows_cached"] == one_rank[place]["rows_cached"]
        assert 0.2 < head["rows_read"] / head["rows_cached"] < 0.95
    assert_same_text(two_ranks[0]["outputs"], undisturbed.ranks["outputs"])


@on_two_ranks
def test_requests_on_two_ranks_get_what_they_ask_for(
    undisturbed: Undisturbed, dense: dict[str, Outputs], two_ranks: list[dict[str, Any]]
) -> None:
    assert [rank["requests"] for rank in two_ranks[1]["stats"]] == [{"dense": 2}] * 2
    expected = pick(dense["ranks"], undisturbed.ranks["outputs"], dense["ranks"])
    assert_same_text(two_ranks[1]["outputs"], expected)
