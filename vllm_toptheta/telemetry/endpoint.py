"""The routes that the plugin adds to vLLM's OpenAI server (entry point group `vllm.endpoint_plugins`).

vLLM loads them only when `VLLM_PLUGINS` names the plugin: `VLLM_PLUGINS=toptheta vllm serve ...`.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from fastapi import FastAPI, HTTPException
from starlette.datastructures import State

from vllm_toptheta.telemetry.stats import Stats, merge

STATS_RPC = "toptheta_stats"  # the method that the plugin adds to vLLM's workers


class StatsEndpoint:
    """Serves `GET /toptheta/stats`."""

    name = "toptheta"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._engine_client: Any = None

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes to `app`."""
        app.get("/toptheta/stats", response_model=Stats)(self.stats)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Keep the way to the engine; None on a server that has none."""
        self._engine_client = engine_client

    async def stats(self) -> Stats:
        """Value rows read, rows cached and lost mass per layer and kv head, summed over ranks."""
        if self._engine_client is None:
            raise HTTPException(503, "this server has no engine, hence no statistics")
        ranks = [rank for rank in await self._engine_client.collective_rpc(STATS_RPC) if rank is not None]
        if not ranks:
            raise HTTPException(409, "no layer runs on TOPTHETA: start the server with --attention-backend toptheta")
        return merge(ranks)
