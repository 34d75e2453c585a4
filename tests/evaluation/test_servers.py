from typing import Any

import httpx
import pytest

from tests.evaluation.fake_server import FakeServer
from vllm_toptheta.errors import EvaluationError
from vllm_toptheta.evaluation import servers
from vllm_toptheta.evaluation.servers import Endpoint, EndpointPair
from vllm_toptheta.evaluation.tasks import compare_answers, needle_task

TEXT = "\n".join(f"Line {index} says nothing of interest." for index in range(100))


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that a client would have waited before asking again."""
    waited: list[float] = []
    monkeypatch.setattr(servers.time, "sleep", waited.append)
    return waited


def connect(server: FakeServer, **options: Any) -> Endpoint:
    return Endpoint("http://server:8000/v1/", transport=server.transport(), **options)


def test_completions_are_greedy_and_end_at_stop_texts() -> None:
    server = FakeServer()
    stop = ("\n", "a", "b", "c", "d")
    text, num_tokens = connect(server).complete("mill is 12345. mill is", max_tokens=7, stop=stop)
    assert (text, num_tokens) == (" 12345.", len("mill is 12345. mill is") // 4)
    assert server.requests == [
        {
            "model": "org/fake",
            "prompt": "mill is 12345. mill is",
            "max_tokens": 7,
            "temperature": 0,
            "seed": 0,
            "stop": list(stop[:4]),
        }
    ]
    assert connect(server, model="mine").complete("x", max_tokens=1)[0] == " 0.\n"
    assert server.requests[-1]["model"] == "mine"
    assert server.requests[-1]["stop"] is None


def test_the_key_is_sent_and_a_refusal_names_the_option() -> None:
    server = FakeServer(key="sesame")
    assert connect(server, api_key="sesame").model == "org/fake"
    with pytest.raises(EvaluationError, match=r"http://server:8000: the server refuses the request \(401\).*api-key"):
        connect(server).model  # noqa: B018 - asks the server


def test_a_busy_server_is_asked_again(waits: list[float]) -> None:
    assert connect(FakeServer(failures=[503, 429])).model == "org/fake"
    assert waits == [1.0, 5.0]
    with pytest.raises(EvaluationError, match="/v1/models answered 503"):
        connect(FakeServer(failures=[503] * 4)).model  # noqa: B018 - asks the server
    with pytest.raises(EvaluationError, match="/v1/models answered 404"):
        connect(FakeServer(failures=[404])).model  # noqa: B018 - asks the server
    assert len(waits) == 5


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (httpx.Response(200, text="hello"), "answered no JSON"),
        (httpx.Response(200, json={"choices": []}), "not a completion"),
        (httpx.Response(200, json=["list"]), "not a completion"),
        (httpx.ConnectError("refused"), "no answer: refused. Is the server up"),
    ],
)
def test_a_server_that_answers_something_else_is_named(response: httpx.Response | Exception, message: str) -> None:
    def handle(request: httpx.Request) -> httpx.Response:
        if isinstance(response, Exception):
            raise response
        return response

    server = Endpoint("http://server", model="m", transport=httpx.MockTransport(handle))
    with pytest.raises(EvaluationError, match=f"http://server: .*{message}"):
        server.complete("x", max_tokens=1)
    assert server.value_rows() is None


def test_two_servers_are_compared_on_the_same_questions() -> None:
    dense, sparse = FakeServer(), FakeServer(forgets_beyond=1500, counts_rows=True)
    pair = EndpointPair(connect(dense), connect(sparse))
    assert pair.token_counter(TEXT)("x" * 400) == pytest.approx(100, rel=0.01)
    task = needle_task(TEXT, pair.token_counter, lengths=[250, 500], depths=[0.0, 1.0], samples=3, seed=0)
    (report,) = compare_answers([task], ["sparse"], pair, concurrency=4, progress=False)
    (contender,) = report.contenders
    assert (contender.shares.dense, contender.shares.sparse) == (1.0, 0.5)
    assert contender.places[0].name == "length 500"
    assert contender.places[0].shares.difference == -1.0
    assert contender.same_text_share == 0.5
    found = pair.endpoints()
    assert (found.dense_url, found.sparse_model, found.value_rows_share) == ("http://server:8000", "org/fake", 0.1)


def test_a_dense_server_must_not_be_a_sparse_one() -> None:
    with pytest.raises(EvaluationError, match="this server runs TOPTHETA. Give --dense"):
        EndpointPair(connect(FakeServer(counts_rows=True)), connect(FakeServer()))
    pair = EndpointPair(connect(FakeServer()), connect(FakeServer()))
    assert pair.endpoints().value_rows_share is None
