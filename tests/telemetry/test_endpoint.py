"""The routes that the plugin adds to vLLM's server."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry
from vllm.v1.metrics import prometheus

from tests.telemetry.drafted import counting
from tests.telemetry.ranks import Engine, counted, rank
from vllm_toptheta.telemetry.endpoint import StatsEndpoint

ANSWERS: list[dict[str, Any] | None] = [rank(counted(2, [0], [[5]], 0.125))]


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_API_KEY", "TOPTHETA_PAGE"):
        monkeypatch.delenv(name, raising=False)


def client(engine: Engine | None, **args: Any) -> TestClient:
    app, endpoint = FastAPI(), StatsEndpoint()

    @app.get("/metrics")
    def core_metrics() -> str:
        return "vLLM's own route"

    endpoint.attach_router(app)
    asyncio.run(endpoint.init_state(engine, app.state, Namespace(**args)))
    return TestClient(app)


def test_stats_of_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = CollectorRegistry()
    monkeypatch.setattr(prometheus, "get_prometheus_registry", lambda: registry)
    counting(registry, positions=2)("0", [2, 1])
    drafting = client(Engine([rank(counted(2, [0], [[5]], 0.125), draft_tokens=2)]))
    assert drafting.get("/toptheta/stats").json()["drafts"] == {
        "verifications": 2,
        "drafted": 4,
        "accepted": 3,
        "accepted_by_position": [2, 1],
        "tokens_per_verification": 2.5,
    }
    # n-grams are not ours
    assert client(Engine(ANSWERS)).get("/toptheta/stats").json()["drafts"] is None


def test_stats() -> None:
    answer = client(Engine(ANSWERS)).get("/toptheta/stats")
    assert answer.status_code == 200
    body = answer.json()
    assert (body["mode"], body["target"], body["decode_tokens"]) == ("values", "k:128", 1)
    assert body["layers"] == [
        {
            "layer": 2,
            "kv_head": 0,
            "decode_tokens": 1,
            "dense_tokens": 0,
            "asked_tokens": 0,
            "rows_cached": 100,
            "rows_read": 5,
            "keys_read": None,
            "copies_read": None,
            "lost_mass_mean": 0.125,
        }
    ]
    assert body["lost_mass"] == [{"layer": 2, "counts": [0] * 6 + [2] + [0] * 3, "sum": 0.25}]
    assert body["bytes_not_read"] == 95 * 128


@pytest.mark.parametrize(
    ("engine", "code", "words"),
    [
        (Engine([None, None]), 409, "--attention-backend toptheta"),
        (Engine(RuntimeError("with details")), 503, "does not answer"),
        (None, 503, "no engine"),
    ],
)
def test_without_statistics(engine: Engine | None, code: int, words: str) -> None:
    server = client(engine)
    answer = server.get("/toptheta/stats")
    assert answer.status_code == code
    assert words in answer.json()["detail"]
    assert "details" not in answer.text
    metrics = server.get("/metrics")
    assert metrics.status_code == 200
    assert "toptheta" not in metrics.text


def test_metrics_take_the_place_of_vllms_route_and_contain_it() -> None:
    answer = client(Engine(ANSWERS)).get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert "toptheta_decode_tokens_total 1.0" in answer.text
    assert "python_info" in answer.text  # of the registry that vLLM uses


@pytest.mark.parametrize(
    ("args", "variable", "key"),
    [
        ({"api_key": ["one", "two"]}, "", "two"),
        ({"api_key": "one"}, "", "one"),
        ({"api_key": None}, "three", "three"),
        ({}, "three", "three"),
        ({"api_key": ["one"]}, "three", "one"),
    ],
)
def test_an_api_key_guards_the_statistics(
    args: dict[str, Any], variable: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", variable)
    server = client(Engine(ANSWERS), **args)
    for header in ({}, {"Authorization": "Bearer other"}, {"Authorization": f"Basic {key}"}, {"Authorization": key}):
        answer = server.get("/toptheta/stats", headers=header)
        assert (answer.status_code, answer.headers.get("www-authenticate")) == (401, "Bearer")
    assert server.get("/toptheta/stats", headers={"Authorization": f"bearer {key}"}).status_code == 200
    # vLLM leaves these open too, and the page holds no figures
    assert server.get("/metrics").status_code == server.get("/toptheta").status_code == 200


def test_a_key_in_the_environment_does_not_add_to_the_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "three")
    server = client(Engine(ANSWERS), api_key=["one"])
    assert server.get("/toptheta/stats", headers={"Authorization": "Bearer three"}).status_code == 401


def test_the_page_loads_nothing_from_elsewhere() -> None:
    answer = client(Engine(ANSWERS)).get("/toptheta")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "//" not in answer.text.split("<body>")[0]  # no address in the head
    assert "<script src" not in answer.text
    assert "<link" not in answer.text


@pytest.mark.parametrize("by_variable", [True, False])
def test_the_page_can_be_switched_off(by_variable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if by_variable:
        monkeypatch.setenv("TOPTHETA_PAGE", "0")
    server = client(Engine(ANSWERS), additional_config=None if by_variable else {"toptheta": {"page": False}})
    assert server.get("/toptheta").status_code == 404
    assert server.get("/toptheta/stats").status_code == 200


def test_the_openapi_document_names_what_may_happen() -> None:
    operation = client(None).get("/openapi.json").json()["paths"]["/toptheta/stats"]["get"]
    assert set(operation["responses"]) >= {"200", "401", "409", "503"}


def test_the_plugin_is_what_vllm_expects() -> None:
    from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

    assert isinstance(StatsEndpoint(), EndpointPlugin)


def test_vllm_keeps_our_metrics_in_front(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.plugins
    from vllm.plugins.endpoint_plugins.interface import attach_endpoint_plugins

    app, endpoint = FastAPI(), StatsEndpoint()

    @app.get("/metrics")
    def core_metrics() -> str:
        return "vLLM's own route"

    monkeypatch.setattr(vllm.plugins, "load_endpoint_plugins", lambda tasks: [endpoint])
    attach_endpoint_plugins(app, ("generate",))
    asyncio.run(endpoint.init_state(Engine(ANSWERS), app.state, Namespace()))
    assert "toptheta_decode_tokens_total 1.0" in TestClient(app).get("/metrics").text
