"""Answers by running servers with the OpenAI API: one dense, one sparse, side by side.

Only what a server generates is compared. The log probabilities that it returns for a prompt come from prefill, which
is dense, so a perplexity through this API would say nothing about sparse decoding.
"""

import time
from collections.abc import Callable
from functools import cached_property
from typing import Any

import httpx

from vllm_toptheta.errors import EvaluationError
from vllm_toptheta.evaluation.tasks.report import Endpoints
from vllm_toptheta.evaluation.tasks.task import Answers, Question, cut_at_stop

__all__ = ["Endpoint", "EndpointPair"]

# what a server under load, or behind a proxy, may answer now and not in a moment
_TRANSIENT = (429, 500, 502, 503, 504)
_RETRY_SECONDS = (1.0, 5.0, 20.0)
# the OpenAI API takes no more; the others are applied to the answer
_MAX_STOP_TEXTS = 4


class Endpoint:
    """A server with the OpenAI API.

    Args:
        url: of the server, with or without the path `/v1`.
        model: the name that it serves the model under; None for the first that it lists.
        api_key: sent as a bearer token; None for a server that asks for none.
        timeout: seconds to wait for an answer.
        transport: what carries the requests; None for the network.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        timeout: float = 600.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._model = model
        try:
            self._client = httpx.Client(
                base_url=self.url,
                headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
                timeout=timeout,
                transport=transport,
            )
        except (httpx.InvalidURL, ValueError) as error:
            raise EvaluationError(f"not a URL: {error}", field=url) from None

    @cached_property
    def model(self) -> str:
        """The name of the model.

        Raises:
            EvaluationError: the server does not answer, or lists no model.
        """
        if self._model is not None:
            return self._model
        answer = self._request("GET", "/v1/models")
        try:
            return str(answer["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise EvaluationError("the server lists no model", field=self.url, remedy="Name one") from None

    def complete(self, prompt: str, *, max_tokens: int, stop: tuple[str, ...] = ()) -> tuple[str, int]:
        """Continues a prompt greedily.

        Args:
            prompt: the text.
            max_tokens: tokens to generate at most.
            stop: texts at which the answer ends.

        Returns:
            The text after the prompt, up to a stop text, and the number of the prompt's tokens.

        Raises:
            EvaluationError: the server does not answer, or not as the API says.
        """
        body = {"model": self.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "seed": 0}
        answer = self._request("POST", "/v1/completions", {**body, "stop": list(stop[:_MAX_STOP_TEXTS]) or None})
        try:
            return cut_at_stop(answer["choices"][0]["text"], stop), int(answer["usage"]["prompt_tokens"])
        except (KeyError, IndexError, TypeError):
            raise EvaluationError("the server's answer is not a completion", field=self.url) from None

    def token_counter(self, sample: str) -> Callable[[str], float]:
        """Returns what counts the tokens of a text, about, from one request: the server's tokenizer is not at hand.

        Args:
            sample: text of the kind to be counted.

        Raises:
            EvaluationError: the server does not answer.
        """
        density = self.complete(sample, max_tokens=1)[1] / len(sample)
        return lambda text: density * len(text)

    def value_rows(self) -> tuple[int, int] | None:
        """Returns the value rows read and cached so far, if the server runs TOPTHETA and says so."""
        try:
            answer = self._client.get("/toptheta/stats")
            layers = answer.json()["layers"] if answer.status_code == httpx.codes.OK else None
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return None
        if layers is None:
            return None
        return sum(layer["rows_read"] for layer in layers), sum(layer["rows_cached"] for layer in layers)

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        for wait in (*_RETRY_SECONDS, None):
            try:
                answer = self._client.request(method, path, json=body)
            except httpx.HTTPError as error:
                raise EvaluationError(
                    f"no answer: {error or type(error).__name__}", field=self.url, remedy="Is the server up?"
                ) from None
            if wait is None or answer.status_code not in _TRANSIENT:
                break
            time.sleep(wait)
        if answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            raise EvaluationError(
                f"the server refuses the request ({answer.status_code})",
                field=self.url,
                remedy="Put its key into the environment variable that --api-key-env names",
            )
        if answer.status_code != httpx.codes.OK:
            raise EvaluationError(f"{path} answered {answer.status_code}: {answer.text[:300]}", field=self.url)
        try:
            return answer.json()
        except ValueError:
            raise EvaluationError(f"{path} answered no JSON", field=self.url) from None


class EndpointPair:
    """Asks two servers the same question.

    Args:
        dense: the server with dense attention.
        sparse: the server with sparse attention.

    Raises:
        EvaluationError: the dense server says that it runs TOPTHETA.
    """

    def __init__(self, dense: Endpoint, sparse: Endpoint) -> None:
        if dense.value_rows() is not None:
            raise EvaluationError(
                "this server runs TOPTHETA", field=dense.url, remedy="Give --dense a server with dense attention"
            )
        self._dense, self._sparse = dense, sparse
        self._rows_before = sparse.value_rows()
        self.token_counter = dense.token_counter

    def __call__(self, question: Question) -> Answers:
        """Returns both answers to a question."""
        (dense, num_prompt_tokens), (sparse, _) = (
            endpoint.complete(question.prompt, max_tokens=question.max_new_tokens, stop=question.stop)
            for endpoint in (self._dense, self._sparse)
        )
        return Answers(num_prompt_tokens, dense, (sparse,))

    def endpoints(self) -> Endpoints:
        """Returns what a report says of the servers: also what the sparse one has read since it was first asked."""
        before, after = self._rows_before, self._sparse.value_rows()
        share = None
        if before is not None and after is not None and after[1] > before[1]:
            share = (after[0] - before[0]) / (after[1] - before[1])
        return Endpoints(
            dense_url=self._dense.url,
            dense_model=self._dense.model,
            sparse_url=self._sparse.url,
            sparse_model=self._sparse.model,
            value_rows_share=share,
        )
