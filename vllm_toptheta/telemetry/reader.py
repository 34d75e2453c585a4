"""How an API server gets the workers' counters: seldom, and never on the way of a token."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from vllm_toptheta.telemetry.stats import Stats, merge

logger = logging.getLogger("vllm.toptheta")  # below vLLM's own, so that its format and level apply

STATS_RPC = "toptheta_stats"  # the method that the plugin adds to vLLM's workers
MAX_AGE = 1.0  # seconds that statistics are served again; well below any scrape interval, so that counters never fall
PATIENCE = 5.0  # seconds to wait for the engine, which answers between two steps


class StatsUnavailable(Exception):
    """There are no statistics; the message says why."""


class NotServing(StatsUnavailable):
    """No layer runs on our backend."""


class StatsReader:
    """The statistics of an engine, asked for when they are wanted and older than `MAX_AGE`.

    Counters live in the workers, so every API server of an engine reports the same totals, whichever answers.

    Args:
        engine_client: vLLM's `EngineClient`.
        patience: Seconds to wait for an answer.
    """

    def __init__(self, engine_client: Any, *, patience: float = PATIENCE) -> None:
        self._engine_client = engine_client
        self._patience = patience
        self._stats: Stats | None = None
        self._read_at = -MAX_AGE
        self._question: asyncio.Task[Stats] | None = None

    async def read(self) -> Stats:
        """The statistics; while the engine takes longer than our patience, those of the last time.

        Raises:
            NotServing: No layer runs on our backend.
            StatsUnavailable: The engine does not answer.
        """
        if self._stats is not None and time.monotonic() - self._read_at < MAX_AGE:
            return self._stats
        # a question that nobody waited for to the end may have been answered long ago
        if self._question is None or self._question.done():
            self._question = asyncio.create_task(self._ask())
        question = self._question
        await asyncio.wait({question}, timeout=self._patience)
        if not question.done():
            if self._stats is None:
                raise StatsUnavailable("the engine is busy and has not answered yet")
            return self._stats
        return question.result()

    async def _ask(self) -> Stats:
        try:
            answers = await _ask_workers(self._engine_client)
        except Exception as error:  # vLLM reports a dead engine and a failed call by several kinds
            logger.debug("toptheta: no statistics: %r", error)
            raise StatsUnavailable("the engine does not answer") from error
        replicas = [[rank for rank in ranks if rank is not None] for ranks in answers]
        if not all(replicas):
            raise NotServing("no layer runs on TOPTHETA: start the server with --attention-backend toptheta")
        self._stats, self._read_at = merge(replicas), time.monotonic()
        return self._stats


async def _ask_workers(engine_client: Any) -> list[list[dict[str, Any] | None]]:
    """What the workers of each data-parallel replica report; where vLLM can ask only one, the first's."""
    ask_replicas = getattr(getattr(engine_client, "engine_core", None), "call_utility_all_async", None)
    if ask_replicas is None:
        return [await engine_client.collective_rpc(STATS_RPC)]
    replicas: list[list[dict[str, Any] | None]] = await ask_replicas("collective_rpc", STATS_RPC, None, (), None)
    return replicas
