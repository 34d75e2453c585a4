"""Many clients at a time, each of which asks again as soon as its request has ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from vllm_toptheta.soak.client import Outcome, SoakClient
from vllm_toptheta.soak.traffic import Prompt, requests

_PAUSE = 0.5  # seconds before a client that was turned away tries again


class Crowd:
    """Clients that ask until they are told to leave; they begin at once.

    Args:
        client: How they ask.
        prompts: What they ask.
        size: How many there are.
        seed: Decides who asks what.
    """

    def __init__(self, client: SoakClient, prompts: Sequence[Prompt], *, size: int, seed: int) -> None:
        self._client = client
        self._requests = requests(prompts, seed=seed)
        self._is_leaving = False
        self._may_ask = asyncio.Event()
        self._may_ask.set()
        self._in_flight = 0
        self.by_client: list[list[Outcome]] = [[] for _ in range(size)]
        self._tasks = [asyncio.create_task(self._ask(mine)) for mine in self.by_client]

    @property
    def in_flight(self) -> int:
        """Requests that have not ended."""
        return self._in_flight

    @property
    def outcomes(self) -> list[Outcome]:
        """Of all requests that have ended."""
        return [outcome for mine in self.by_client for outcome in mine]

    def pause(self) -> None:
        """Ask nothing new until `resume`; what was asked goes on."""
        self._may_ask.clear()

    def resume(self) -> None:
        """Ask again."""
        self._may_ask.set()

    async def leave(self) -> list[Outcome]:
        """Ask nothing new, wait for what was asked, and return all outcomes."""
        self._is_leaving = True
        self.resume()
        await asyncio.gather(*self._tasks)
        return self.outcomes

    async def _ask(self, mine: list[Outcome]) -> None:
        while not self._is_leaving:
            began = time.monotonic()
            self._in_flight += 1
            outcome = await self._client.ask(*next(self._requests))
            self._in_flight -= 1
            outcome.began, outcome.ended = began, time.monotonic()
            mine.append(outcome)
            if outcome.ending not in ("finished", "left"):
                await asyncio.sleep(_PAUSE)
            await self._may_ask.wait()
