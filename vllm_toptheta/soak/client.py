"""One request and what became of it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx
from prometheus_client.parser import text_string_to_metric_families

from vllm_toptheta.errors import SoakError
from vllm_toptheta.soak.traffic import Behaviour, Prompt

Ending = Literal["finished", "left", "error", "closed", "broken"]

# what vLLM counts, and whether it is to be zero again once nobody asks for anything
PREEMPTIONS = "vllm:num_preemptions"
HELD = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")

# seconds that a client who leaves before its answer waits at most
_LONGEST_GLANCE = 3.0


@dataclass
class Outcome:
    """How a request ended.

    Attributes:
        prompt: What was asked.
        behaviour: What the client did with it.
        ending: `finished`: answered to the end. `left`: the client went away on purpose. `error`: the server said that
            it will not answer, by an HTTP status and JSON or in the stream. `closed`: the connection was refused or
            closed. `broken`: anything else: an answer that ends without saying so, an error that is no JSON, silence.
        tokens: The generated tokens that arrived.
        gaps: For each of them, how far its log probability lay above that of the other best candidate, nats.
        detail: What the server or the connection said; empty for `finished` and `left`.
        began, ended: Seconds of the clock that the run uses.
    """

    prompt: Prompt
    behaviour: Behaviour
    ending: Ending = "broken"
    tokens: list[str] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    detail: str = ""
    began: float = 0.0
    ended: float = 0.0


class _Refusal(Exception):
    """The server says that there will be no answer; the message is what it says."""


class SoakClient:
    """Asks a server with the OpenAI API, many requests at a time.

    Args:
        url: of the server, with or without the path `/v1`.
        api_key: Sent as a bearer token; None for a server that asks for none.
        patience: Seconds without a byte after which an answer counts as lost.
        transport: What carries the requests; None for the network.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        patience: float = 3600.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.model = ""
        self.max_model_len = 0
        try:
            self._http = httpx.AsyncClient(
                base_url=self.url,
                headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
                timeout=httpx.Timeout(patience, connect=60.0),
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=20),
                transport=transport,
            )
        except (httpx.InvalidURL, ValueError) as error:
            raise SoakError(f"not a URL: {error}", field=url) from None

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def introduce(self) -> None:
        """Ask for the name of the model and the longest sequence.

        Raises:
            SoakError: The server does not answer, or lists no model.
        """
        try:
            answer = await self._http.get("/v1/models")
            first = answer.raise_for_status().json()["data"][0]
            self.model, self.max_model_len = str(first["id"]), int(first["max_model_len"])
        except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
            raise SoakError(
                f"does not say which model it serves: {error!r}",
                field=self.url,
                remedy="Is it a vLLM server, and up? A key is read from the variable that --api-key-env names",
            ) from None

    async def is_healthy(self) -> bool:
        """Whether `/health` answers 200."""
        try:
            return (await self._http.get("/health", timeout=5.0)).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    async def tokenize(self, text: str) -> list[int]:
        """Return the token ids of a text.

        Raises:
            SoakError: The server does not tokenise.
        """
        try:
            answer = await self._http.post("/tokenize", json={"model": self.model, "prompt": text})
            return [int(token) for token in answer.raise_for_status().json()["tokens"]]
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise SoakError(f"/tokenize: {error!r}", field=self.url, remedy="It has to be a vLLM server") from None

    async def counters(self) -> dict[str, float]:
        """What `PREEMPTIONS` and `HELD` stand at, summed over engines; those that the server lacks are left out."""
        answer = await self._http.get("/metrics", timeout=30.0)
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(answer.text):
            if family.name in (PREEMPTIONS, *HELD):
                samples = [one.value for one in family.samples if not one.name.endswith("_created")]
                found[family.name] = sum(samples)
        return found

    async def ask(self, prompt: Prompt, behaviour: Behaviour, moment: float) -> Outcome:
        """Ask for a completion and do with it what the client does; never raises.

        Args:
            prompt: What is asked.
            behaviour: What the client does.
            moment: In [0, 1): when a client that leaves does so.
        """
        outcome = Outcome(prompt, behaviour)
        try:
            if behaviour is Behaviour.WHOLE:
                await self._read_whole(outcome)
            elif behaviour is Behaviour.LEAVE_EARLY:
                await self._read_whole(outcome, timeout=0.05 + moment * _LONGEST_GLANCE)
            else:
                enough = int(moment * prompt.max_tokens) if behaviour is Behaviour.LEAVE_MIDWAY else None
                await self._read_stream(outcome, enough)
        except _Refusal as refusal:
            outcome.ending, outcome.detail = "error", str(refusal)
        except httpx.TimeoutException as error:
            if behaviour is Behaviour.LEAVE_EARLY:
                outcome.ending = "left"
            else:
                outcome.detail = repr(error)
        except httpx.TransportError as error:
            outcome.ending, outcome.detail = "closed", repr(error)
        except (ValueError, KeyError, IndexError, TypeError) as error:
            outcome.detail = f"not what the API says: {error!r}"
        return outcome

    def _body(self, prompt: Prompt, *, stream: bool) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt": list(prompt.token_ids),
            "max_tokens": prompt.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 2,
            "return_tokens_as_token_ids": True,
            "stream": stream,
            **({"vllm_xargs": {"toptheta": prompt.choice}} if prompt.choice else {}),
        }

    async def _read_whole(self, outcome: Outcome, timeout: float | None = None) -> None:
        answer = await self._http.post(
            "/v1/completions",
            json=self._body(outcome.prompt, stream=False),
            timeout=httpx.USE_CLIENT_DEFAULT if timeout is None else timeout,
        )
        if answer.status_code != httpx.codes.OK:
            raise _Refusal(_error_text(answer.status_code, answer.content))
        _take(outcome, answer.json()["choices"][0])

    async def _read_stream(self, outcome: Outcome, enough: int | None) -> None:
        body = self._body(outcome.prompt, stream=True)
        async with self._http.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != httpx.codes.OK:
                raise _Refusal(_error_text(answer.status_code, await answer.aread()))
            async for event in _events(answer):
                _take(outcome, event["choices"][0])
                if enough is not None and len(outcome.tokens) > enough:
                    outcome.ending = "left"
                    return
        if outcome.ending == "broken":
            outcome.detail = "the stream ended without a reason"


def _take(outcome: Outcome, choice: dict[str, Any]) -> None:
    """Add a choice, or the part of it that has arrived."""
    if choice.get("logprobs"):
        outcome.tokens += choice["logprobs"]["tokens"]
        for token, best in zip(choice["logprobs"]["tokens"], choice["logprobs"]["top_logprobs"], strict=True):
            others = [value for name, value in best.items() if name != token]
            outcome.gaps.append(best[token] - max(others))
    reason = choice["finish_reason"]
    if reason == "length":
        outcome.ending = "finished"
    elif reason is not None:
        raise _Refusal(f"finish_reason {reason}")


async def _events(answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """Yield the JSON of a stream's events.

    Raises:
        _Refusal: One of them is an error.
    """
    async for line in answer.aiter_lines():
        content = line.removeprefix("data:").strip()
        if content and content != "[DONE]":
            event = json.loads(content)
            if "error" in event:
                raise _Refusal(str(event["error"]))
            yield event


def _error_text(status: int, body: bytes) -> str:
    """What an error's body says.

    Raises:
        ValueError: It is no JSON object with an error or a detail.
    """
    content = json.loads(body)
    if not isinstance(content, dict) or not {"error", "detail"} & content.keys():
        raise ValueError(f"status {status}, {body[:200]!r}")
    return f"{status}: {content.get('error', content.get('detail'))}"[:300]
