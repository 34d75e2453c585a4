"""Counters, their sum over ranks, and the route that serves them."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from typing import Any

import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient

from vllm_toptheta.telemetry.counters import LayerCounters
from vllm_toptheta.telemetry.endpoint import STATS_RPC, StatsEndpoint
from vllm_toptheta.telemetry.stats import merge


def rank(*counters: LayerCounters) -> dict[str, Any]:
    return {
        "mode": "values",
        "target_k": 128,
        "thresholds": "acme/tiny",
        "dense_layers": [0],
        "layers": [record for counter in counters for record in counter.snapshot()],
    }


def counted(layer: int, kv_heads: list[int], rows_read: list[list[int]], lost_mass: float) -> LayerCounters:
    counters = LayerCounters(layer, kv_heads, num_queries_per_kv=2)
    counters.add(
        torch.tensor([len(rows_read), 1, 100 * len(rows_read)]),
        rows_read=torch.tensor(rows_read),
        lost_mass=torch.full((len(rows_read), 2 * len(kv_heads)), lost_mass),
    )
    return counters


def test_counters_add_up_over_steps() -> None:
    counters = counted(3, [4, 5], [[10, 20], [30, 40]], 0.25)
    counters.add(
        torch.tensor([1, 0, 50]),
        rows_read=torch.tensor([[1, 2]]),
        lost_mass=torch.tensor([[0.0, 0.5, 1.0, 1.0]]),
    )
    first, second = counters.snapshot()
    assert (first["layer"], first["kv_head"], second["kv_head"]) == (3, 4, 5)
    assert (first["decode_tokens"], first["dense_tokens"], first["rows_cached"]) == (3, 1, 250)
    assert (first["rows_read"], second["rows_read"]) == (41, 62)
    assert first["lost_mass_mean"] == pytest.approx((4 * 0.25 + 0.5) / 6)
    assert second["lost_mass_mean"] == pytest.approx((4 * 0.25 + 2.0) / 6)


def test_an_idle_layer_has_lost_nothing() -> None:
    (record,) = LayerCounters(1, [0], 3).snapshot()
    assert record["lost_mass_mean"] == 0
    assert merge([rank(LayerCounters(1, [0], 3))]).rows_read_share is None


def test_ranks_hold_different_heads_and_stages_different_layers() -> None:
    stats = merge(
        [
            rank(counted(2, [1], [[7]], 0.5)),
            rank(counted(2, [0], [[5]], 0.1), counted(1, [0], [[9]], 0.0)),
        ]
    )
    assert [(head.layer, head.kv_head, head.rows_read) for head in stats.layers] == [(1, 0, 9), (2, 0, 5), (2, 1, 7)]
    assert stats.rows_read_share == pytest.approx(21 / 300)


def test_a_kv_head_on_two_ranks_is_summed() -> None:
    (head,) = merge([rank(counted(2, [0], [[7], [7]], 0.5)), rank(counted(2, [0], [[5]], 0.2))]).layers
    assert (head.decode_tokens, head.rows_cached, head.rows_read) == (3, 300, 19)
    assert head.lost_mass_mean == pytest.approx((2 * 0.5 + 0.2) / 3)


class Engine:
    """What the route needs of vLLM's engine client."""

    def __init__(self, answers: list[dict[str, Any] | None]) -> None:
        self.answers = answers

    async def collective_rpc(self, method: str) -> list[dict[str, Any] | None]:
        assert method == STATS_RPC
        return self.answers


def client(engine: Engine | None) -> TestClient:
    app, endpoint = FastAPI(), StatsEndpoint()
    endpoint.attach_router(app)
    asyncio.run(endpoint.init_state(engine, app.state, Namespace()))
    return TestClient(app)


def test_route() -> None:
    answer = client(Engine([rank(counted(2, [0], [[5]], 0.1))])).get("/toptheta/stats")
    assert answer.status_code == 200
    body = answer.json()
    assert (body["mode"], body["target_k"]) == ("values", 128)
    assert body["layers"][0] == {
        "layer": 2,
        "kv_head": 0,
        "decode_tokens": 1,
        "dense_tokens": 1,
        "rows_cached": 100,
        "rows_read": 5,
        "lost_mass_mean": pytest.approx(0.1),
    }


def test_route_on_another_backend_says_which_flag_is_missing() -> None:
    answer = client(Engine([None, None])).get("/toptheta/stats")
    assert answer.status_code == 409
    assert "--attention-backend toptheta" in answer.json()["detail"]


def test_route_without_an_engine() -> None:
    assert client(None).get("/toptheta/stats").status_code == 503


def test_the_plugin_is_what_vllm_expects() -> None:
    from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

    assert isinstance(StatsEndpoint(), EndpointPlugin)
