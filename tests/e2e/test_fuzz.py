"""Requests made from the server's own OpenAPI document, right and wrong ones: none of them is answered by a 5xx.

The examples are the same in every run. vLLM 0.32 has no exclusion here: it answers all of them without a 5xx too.
"""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode

from tests.e2e.server import Server

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

MAX_TOKENS = 2  # of an answer that nobody reads
RIGHT, WRONG = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
# a GET without parameters has no wrong form in the document's terms; the last test has some
CASES = [
    ("GET", "/toptheta/stats", RIGHT),
    ("GET", "/metrics", RIGHT),
    *[("POST", route, mode) for route in ("/v1/chat/completions", "/v1/completions") for mode in (RIGHT, WRONG)],
]


@pytest.fixture(scope="module")
def document(server: Server) -> Any:
    """The server's description of itself."""
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def bounded(body: Any) -> Any:
    """The same body, with an answer short enough for a CPU where it asks for a long one or several."""
    if not isinstance(body, dict):
        return body
    short = {"max_tokens": MAX_TOKENS, "max_completion_tokens": MAX_TOKENS, "min_tokens": 1, "n": 2}
    clipped = {
        name: min(body[name], most)
        for name, most in short.items()
        if isinstance(body.get(name), int) and not isinstance(body[name], bool)
    }
    return {"max_tokens": MAX_TOKENS, **body, **clipped}


@pytest.mark.parametrize(("method", "route", "mode"), CASES)
def test_no_server_error(document: Any, method: str, route: str, mode: GenerationMode) -> None:
    operation = document[route][method]

    @settings(
        max_examples=20,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        case.body = bounded(case.body)
        answer = case.call(timeout=120)
        assert answer.status_code < 500, f"{answer.status_code}: {answer.text[:500]}\n{case.body}"

    check()


@pytest.mark.parametrize("route", ["/toptheta", "/toptheta/", "/toptheta/stats", "/toptheta/stats/..%2f", "/metrics"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "QUERY"])
def test_our_routes_bear_any_method_and_header(server: Server, route: str, method: str) -> None:
    headers = {"Authorization": b"Bearer \xff", "Accept": b"*/*;q=nan", "Range": b"bytes=9-1", "Cookie": b"\xe9=\xe9"}
    answer = httpx.request(method, server.url + route, headers=headers, params={"x": "\U0001f600" * 99}, timeout=30)
    assert answer.status_code < 500
