"""What a client makes of every kind of answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest

from tests.soak.conftest import PROMPT
from vllm_toptheta.errors import SoakError
from vllm_toptheta.soak.client import HELD, PREEMPTIONS, Outcome, SoakClient
from vllm_toptheta.soak.traffic import Behaviour, Prompt

Handler = Callable[[httpx.Request], httpx.Response]


def choice(*tokens: str, reason: str | None = None) -> dict[str, Any]:
    best = [{token: -0.5, "token_id:9": -1.5} for token in tokens]
    return {"choices": [{"logprobs": {"tokens": list(tokens), "top_logprobs": best}, "finish_reason": reason}]}


def events(*contents: dict[str, Any] | str) -> bytes:
    lines = [content if isinstance(content, str) else json.dumps(content) for content in contents]
    return "".join(f"data: {line}\n\n" for line in lines).encode()


def run(handler: Handler, behaviour: Behaviour, moment: float = 0.0, prompt: Prompt = PROMPT) -> Outcome:
    async def ask() -> Outcome:
        client = SoakClient("http://server/v1", transport=httpx.MockTransport(handler))
        try:
            return await client.ask(prompt, behaviour, moment)
        finally:
            await client.close()

    return asyncio.run(ask())


def raising(error: Exception) -> Handler:
    def handler(request: httpx.Request) -> httpx.Response:
        raise error

    return handler


def test_a_whole_answer() -> None:
    asked: dict[str, Any] = {}

    def handler(request: httpx.Request) -> httpx.Response:
        asked.update(json.loads(request.content))
        return httpx.Response(200, json=choice("token_id:1", "token_id:2", reason="length"))

    outcome = run(handler, Behaviour.WHOLE)
    assert (outcome.ending, outcome.tokens, outcome.gaps) == ("finished", ["token_id:1", "token_id:2"], [1.0, 1.0])
    assert asked["prompt"] == list(PROMPT.token_ids)
    assert (asked["temperature"], asked["stream"], asked["ignore_eos"]) == (0, False, True)
    assert "vllm_xargs" not in asked
    run(handler, Behaviour.WHOLE, prompt=replace(PROMPT, choice="floor:2"))
    assert asked["vllm_xargs"] == {"toptheta": "floor:2"}


def test_a_stream() -> None:
    body = events(choice("token_id:1"), choice("token_id:2", reason="length"), "[DONE]")
    outcome = run(lambda request: httpx.Response(200, content=body), Behaviour.STREAM)
    assert (outcome.ending, outcome.tokens) == ("finished", ["token_id:1", "token_id:2"])


def test_leaving_midway_keeps_what_came() -> None:
    body = events(*[choice(f"token_id:{index}") for index in range(4)])
    outcome = run(lambda request: httpx.Response(200, content=body), Behaviour.LEAVE_MIDWAY, moment=0.5)
    assert (outcome.ending, len(outcome.tokens)) == ("left", 3)


@pytest.mark.parametrize(
    ("handler", "behaviour", "ending", "words"),
    [
        (raising(httpx.ReadTimeout("")), Behaviour.LEAVE_EARLY, "left", ""),
        (raising(httpx.ReadTimeout("slow")), Behaviour.WHOLE, "broken", "slow"),
        (raising(httpx.ConnectError("refused")), Behaviour.STREAM, "closed", "refused"),
        (raising(httpx.RemoteProtocolError("cut")), Behaviour.WHOLE, "closed", "cut"),
        (lambda _: httpx.Response(500, json={"error": {"message": "dead"}}), Behaviour.WHOLE, "error", "500: "),
        (lambda _: httpx.Response(503, json={"detail": "dead"}), Behaviour.STREAM, "error", "503: dead"),
        (lambda _: httpx.Response(500, text="<html>"), Behaviour.WHOLE, "broken", "not what the API says"),
        (lambda _: httpx.Response(500, json=["dead"]), Behaviour.STREAM, "broken", "dead"),
        (lambda _: httpx.Response(200, json=choice(reason="abort")), Behaviour.WHOLE, "error", "abort"),
        (lambda _: httpx.Response(200, json={}), Behaviour.WHOLE, "broken", "choices"),
        (lambda _: httpx.Response(200, content=events({"error": "dead"})), Behaviour.STREAM, "error", "dead"),
        (lambda _: httpx.Response(200, content=events(choice("a"), "[DONE]")), Behaviour.STREAM, "broken", "reason"),
        (lambda _: httpx.Response(200, content=b"data: {"), Behaviour.STREAM, "broken", "not what the API says"),
    ],
)
def test_other_endings(handler: Handler, behaviour: Behaviour, ending: str, words: str) -> None:
    outcome = run(handler, behaviour)
    assert outcome.ending == ending
    assert words in outcome.detail


def test_counters_are_summed_over_engines() -> None:
    text = f"""# TYPE {PREEMPTIONS}_total counter
{PREEMPTIONS}_total{{engine="0"}} 3.0
{PREEMPTIONS}_total{{engine="1"}} 4.0
# TYPE {PREEMPTIONS}_created gauge
{PREEMPTIONS}_created{{engine="0"}} 1.7e9
# TYPE {HELD[0]} gauge
{HELD[0]}{{engine="0"}} 2.0
"""

    async def counters() -> dict[str, float]:
        client = SoakClient("http://server", transport=httpx.MockTransport(lambda _: httpx.Response(200, text=text)))
        return await client.counters()

    assert asyncio.run(counters()) == {PREEMPTIONS: 7.0, HELD[0]: 2.0}


def test_what_is_no_vllm_server_is_refused() -> None:
    async def introduce() -> None:
        transport = httpx.MockTransport(lambda _: httpx.Response(200, json={"data": []}))
        await SoakClient("http://server", transport=transport).introduce()

    with pytest.raises(SoakError, match="which model it serves"):
        asyncio.run(introduce())


def test_a_malformed_url_is_refused() -> None:
    with pytest.raises(SoakError, match="not a URL"):
        SoakClient("http://server:port")
