"""Requests to a server that ask for dense decoding or another floor; test_invariance.py says what text they get."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.e2e.server import Server

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900), pytest.mark.xdist_group("server")]

KNOWN = "a request can ask for dense, floor:2, fast, floor:0 to 1000, not for "


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ["completions", "chat/completions"])
@pytest.mark.parametrize("asked", ["sparse", 100, "floor:-2", "floor:nan", "k:64", ["dense"]])
def test_anything_else_is_a_400_that_says_what_can_be_had(server: Server, route: str, asked: Any, stream: bool) -> None:
    prompt = {"prompt": "Hello"} if route == "completions" else {"messages": [{"role": "user", "content": "Hello"}]}
    body = {"model": "smollm2-135m-instruct", **prompt, "max_tokens": 4, "stream": stream}
    answer = httpx.post(f"{server.url}/v1/{route}", json={**body, "vllm_xargs": {"toptheta": asked}}, timeout=60)
    assert answer.status_code == 400, answer.text
    assert KNOWN in answer.json()["error"]["message"]


def test_a_server_that_verifies_nothing_says_so(server: Server) -> None:
    body = {"model": "smollm2-135m-instruct", "prompt": "Hello", "max_tokens": 4, "vllm_xargs": {"toptheta": "lossy"}}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 400, answer.text
    assert "vllm_xargs.toptheta: no answer of this server is verified" in answer.json()["error"]["message"]


def test_beam_search_is_refused(server: Server) -> None:
    body = {"model": "smollm2-135m-instruct", "prompt": "Hello", "max_tokens": 4, "n": 2, "use_beam_search": True}
    answer = httpx.post(f"{server.url}/v1/completions", json={**body, "vllm_xargs": {"toptheta": "dense"}}, timeout=60)
    assert answer.status_code == 400, answer.text
    assert "beam search decodes as the server does" in answer.json()["error"]["message"]


@pytest.mark.parametrize("asked", ["dense", "floor:1.5", "floor:0", "floor:2"])
def test_a_server_gives_what_is_asked_for(server: Server, text_ids: list[int], asked: Any) -> None:
    before = server.stats()
    body = {"prompt": text_ids[:500], "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    server.post("/v1/completions", **body, vllm_xargs={"toptheta": asked})
    after = server.stats()
    kind = "dense" if asked in ("dense", "floor:0") else "floor"
    assert after["requests"][kind] - before["requests"][kind] == 1
    assert after["asked_tokens"] - before["asked_tokens"] == (0 if asked == "floor:2" else 7)
    metrics = server.get("/metrics").text
    assert f'toptheta_requests_total{{kind="{kind}"}} {float(after["requests"][kind])}' in metrics
