"""Requests that ask for dense decoding or another target get what a server of that setting gives, whoever is beside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.e2e.generate import generate
from tests.e2e.server import Server
from tests.e2e.test_engine import assert_same_text, cut

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

ASKED = ["dense", None, "k:32", "dense"]
COUNTS = {"dense": 2, "k:32": 1}
LENGTHS = [700, 900, 600, 305]  # prompt tokens
MAX_TOKENS = 40
# a prompt fills 20 blocks and grows to 22: all four start, and not all of them can end
TIGHT = {"num_gpu_blocks_override": 84, "block_size": 16, "max_model_len": 400, "enable_prefix_caching": False}
TIGHT_LENGTHS = [305] * len(ASKED)


@pytest.fixture(scope="module")
def servers(model: Path, text_ids: list[int]) -> dict[str | None, dict[str, Any]]:
    """Every prompt on engines that do nothing else than one of the requests asks for; rows:128 is the default."""

    def one(**config: Any) -> dict[str, Any]:
        prompts = cut(text_ids, LENGTHS + TIGHT_LENGTHS)
        return generate(model=str(model), prompts=prompts, max_tokens=MAX_TOKENS, **config)

    return {
        "dense": one(),  # vLLM's own backend
        None: one(backend="toptheta"),
        "k:32": one(backend="toptheta", options={"target_k": 32}),
    }


def expected(servers: dict[str | None, dict[str, Any]], first: int) -> dict[str, Any]:
    return {"outputs": [servers[asked]["outputs"][first + index] for index, asked in enumerate(ASKED)]}


def test_they_differ(servers: dict[str | None, dict[str, Any]]) -> None:
    texts = [tuple(token for one in run["outputs"] for token in one["token_ids"]) for run in servers.values()]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize(
    "engine",
    [{"max_num_batched_tokens": 200, "block_size": 16}, {"max_num_seqs": 2}],
    ids=["chunked prefill", "one after the other"],
)
def test_each_in_a_batch_gets_what_it_asks_for(
    model: Path, text_ids: list[int], servers: dict[str | None, dict[str, Any]], engine: dict[str, Any]
) -> None:
    mixed = generate(
        model=str(model),
        backend="toptheta",
        prompts=cut(text_ids, LENGTHS + TIGHT_LENGTHS)[: len(LENGTHS)],
        asked=ASKED,
        max_tokens=MAX_TOKENS,
        engine=engine,
    )
    assert_same_text(mixed, expected(servers, 0))
    (stats,) = mixed["stats"]
    assert stats["requests"] == COUNTS
    assert stats["asked_tokens"] == 3 * (MAX_TOKENS - 1)
    # only the request that asked for nothing is measured
    assert {sum(layer["counts"]) for layer in stats["lost_mass"]} == {9 * (MAX_TOKENS - 1)}


def test_preemption(model: Path, text_ids: list[int], servers: dict[str | None, dict[str, Any]]) -> None:
    preempted = generate(
        model=str(model),
        backend="toptheta",
        prompts=cut(text_ids, LENGTHS + TIGHT_LENGTHS)[len(LENGTHS) :],
        asked=ASKED,
        max_tokens=MAX_TOKENS,
        engine=TIGHT,
    )
    assert preempted["preemptions"] > 0
    assert_same_text(preempted, expected(servers, len(LENGTHS)))
    assert preempted["stats"][0]["requests"] == COUNTS


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="needs two GPUs, or none")
def test_tensor_parallel(tiny_llama: dict[str, str]) -> None:
    prompts = [[(start * 31 + index * index) % 512 for index in range(300)] for start in range(3)]
    config = {"model": tiny_llama["model"], "prompts": prompts, "max_tokens": 24}
    engine = {"skip_tokenizer_init": True}
    options = {"thresholds": tiny_llama["thresholds"], "target_k": 16}
    stock = generate(**config, engine=engine)
    sparse = generate(**config, engine=engine, backend="toptheta", options=options)
    two = generate(
        {"OMP_NUM_THREADS": "1"},
        **config,
        engine={**engine, "tensor_parallel_size": 2},
        backend="toptheta",
        options=options,
        asked=["dense", None, "dense"],
    )
    assert [rank["requests"] for rank in two["stats"]] == [{"dense": 2}] * 2
    assert_same_text(two, {"outputs": [run["outputs"][index] for index, run in enumerate((stock, sparse, stock))]})


def test_an_offline_engine_refuses_what_it_does_not_have(model: Path) -> None:
    with pytest.raises(RuntimeError, match="vllm_xargs.toptheta: a request can ask for dense, rows:128, k:32, k:64"):
        generate(model=str(model), backend="toptheta", prompts=[[1, 2, 3]], asked=["k:100"], max_tokens=2)


KNOWN = "a request can ask for dense, rows:128, k:32, k:64, k:128, k:256, "


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ["completions", "chat/completions"])
@pytest.mark.parametrize("asked", ["sparse", 100, "mass:2", 64.5, ["dense"]])
def test_anything_else_is_a_400_that_says_what_can_be_had(server: Server, route: str, asked: Any, stream: bool) -> None:
    prompt = {"prompt": "Hello"} if route == "completions" else {"messages": [{"role": "user", "content": "Hello"}]}
    body = {"model": "smollm2-135m-instruct", **prompt, "max_tokens": 4, "stream": stream}
    answer = httpx.post(f"{server.url}/v1/{route}", json={**body, "vllm_xargs": {"toptheta": asked}}, timeout=60)
    assert answer.status_code == 400, answer.text
    assert KNOWN in answer.json()["error"]["message"]


def test_beam_search_is_refused(server: Server) -> None:
    body = {"model": "smollm2-135m-instruct", "prompt": "Hello", "max_tokens": 4, "n": 2, "use_beam_search": True}
    answer = httpx.post(f"{server.url}/v1/completions", json={**body, "vllm_xargs": {"toptheta": "dense"}}, timeout=60)
    assert answer.status_code == 400, answer.text
    assert "beam search decodes as the server does" in answer.json()["error"]["message"]


@pytest.mark.parametrize("asked", ["dense", "k:64", 64, "64", "rows:128"])
def test_a_server_gives_what_is_asked_for(server: Server, text_ids: list[int], asked: Any) -> None:
    before = server.stats()
    body = {"prompt": text_ids[:500], "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    server.post("/v1/completions", **body, vllm_xargs={"toptheta": asked})
    after = server.stats()
    label = asked if asked in ("dense", "rows:128") else f"k:{str(asked).removeprefix('k:')}"
    assert after["requests"][label] - before["requests"].get(label, 0) == 1
    assert after["asked_tokens"] - before["asked_tokens"] == (0 if asked == "rows:128" else 7)
    metrics = server.get("/metrics").text
    assert f'toptheta_requests_total{{level="{label}"}} {float(after["requests"][label])}' in metrics
