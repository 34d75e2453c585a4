"""The routes that the plugin adds to vLLM's OpenAI server (entry point group `vllm.endpoint_plugins`).

vLLM loads them only when `VLLM_PLUGINS` names the plugin: `VLLM_PLUGINS=toptheta vllm serve ...`.
"""

from __future__ import annotations

import logging
import os
import secrets
from argparse import Namespace
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, HTTPException
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import State
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from vllm_toptheta.settings import OPTIONS_KEY, Settings
from vllm_toptheta.telemetry.drafts import drafts
from vllm_toptheta.telemetry.exit_code import fail_when_engine_died
from vllm_toptheta.telemetry.metrics import exposition
from vllm_toptheta.telemetry.page import PAGE, PAGE_HEADERS
from vllm_toptheta.telemetry.reader import NotServing, StatsReader, StatsUnavailable
from vllm_toptheta.telemetry.stats import Stats

logger = logging.getLogger("vllm.toptheta")  # below vLLM's own, so that its format and level apply

API_KEY_VARIABLE = "VLLM_API_KEY"


class StatsEndpoint:
    """Serves `/toptheta/stats` and the page `/toptheta`, and adds our metrics to `/metrics`."""

    name = "toptheta"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._reader: StatsReader | None = None
        self._api_keys: list[bytes] = []
        self._has_page = True

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes to `app`."""
        app.get(
            "/toptheta/stats",
            response_model=Stats,
            dependencies=[Depends(self.authorize)],
            responses={
                401: {"description": "An API key is set, and the request does not bear it."},
                409: {"description": "No layer runs on the backend TOPTHETA."},
                503: {"description": "The engine does not answer."},
            },
        )(self.stats)
        app.get("/toptheta", include_in_schema=False)(self.page)
        # in front, because the first route that matches answers
        app.router.routes.insert(0, Route("/metrics", self.metrics, include_in_schema=False))

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Keep the way to the engine, None on a server that has none, and what the flags say."""
        if engine_client is not None:
            self._reader = StatsReader(engine_client)
            fail_when_engine_died(engine_client)
        keys = getattr(args, "api_key", None) or [os.environ.get(API_KEY_VARIABLE)]
        self._api_keys = [key.encode() for key in ([keys] if isinstance(keys, str) else keys) if key]
        options = getattr(args, "additional_config", None)
        settings = Settings.load(options.get(OPTIONS_KEY, {}) if isinstance(options, dict) else {})
        self._has_page = settings.page

    def authorize(self, authorization: Annotated[str, Header(include_in_schema=False)] = "") -> None:
        """Ask for a key of --api-key, as vLLM does for /v1.

        Raises:
            HTTPException: 401, the request bears none of them.
        """
        scheme, _, given = authorization.partition(" ")
        known = [secrets.compare_digest(given.encode(), key) for key in self._api_keys]
        if known and not (scheme.lower() == "bearer" and any(known)):
            raise HTTPException(401, "Unauthorized", headers={"WWW-Authenticate": "Bearer"})

    async def stats(self) -> Stats:
        """Value rows read, rows cached and lost mass per layer and kv head, summed over ranks."""
        if self._reader is None:
            raise HTTPException(503, "this server has no engine, hence no statistics")
        try:
            stats = await self._reader.read()
        except NotServing as error:
            raise HTTPException(409, str(error)) from None
        except StatsUnavailable as error:
            raise HTTPException(503, str(error)) from None
        if stats.draft_tokens is None:
            return stats
        # files are read where there are several API servers
        return stats.model_copy(update={"drafts": await run_in_threadpool(drafts)})

    async def page(self) -> HTMLResponse:
        """The page; it holds no figures and asks `/toptheta/stats` for them."""
        if not self._has_page:
            raise HTTPException(404)
        return HTMLResponse(PAGE, headers=PAGE_HEADERS)

    async def metrics(self, request: Request) -> Response:
        """vLLM's metrics and ours; vLLM's alone while there are none."""
        stats = None
        if self._reader is not None:
            try:
                stats = await self._reader.read()
            except StatsUnavailable as error:
                logger.debug("toptheta: /metrics without ours: %s", error)
        # it reads files where there are several API servers
        body = await run_in_threadpool(exposition, stats)
        return Response(body, headers={"Content-Type": CONTENT_TYPE_LATEST})
