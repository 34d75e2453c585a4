"""Memory of the server's processes over time, and how fast it grows."""

from __future__ import annotations

import asyncio
import statistics
import time
from dataclasses import dataclass

import psutil
from pydantic import BaseModel, Field

from vllm_toptheta.soak.server import ServerProcess

_MIB = 1 << 20


class ProcessMemory(BaseModel):
    """Resident memory of one process under load, after warming up."""

    name: str
    first_mib: float = Field(description="Mean of the first tenth of the samples, MiB.")
    last_mib: float = Field(description="Mean of the last tenth.")
    mib_per_minute: float = Field(description="Slope of a straight line through all samples.")


class Memory(BaseModel):
    """Resident memory of a server under steady load, after warming up."""

    minutes: float
    samples: int
    processes: list[ProcessMemory] = Field(description="The last is the sum of all.")


@dataclass
class MemoryWatch:
    """Samples the server's memory until it is cancelled.

    Attributes:
        server: Whose memory.
        seconds: Between two samples.
    """

    server: ServerProcess
    seconds: float = 1.0

    def __post_init__(self) -> None:
        self._samples: list[tuple[float, dict[int, float]]] = []
        self._names: dict[int, str] = {}

    async def run(self) -> None:
        """Take samples; it does not end by itself."""
        while True:
            self._samples.append((time.monotonic(), self._sample()))
            await asyncio.sleep(self.seconds)

    def since(self, start: float) -> Memory | None:
        """Fit what was sampled since then; None with fewer than ten samples.

        Args:
            start: A time of the monotonic clock, seconds: the end of warming up.
        """
        kept = [(when, sample) for when, sample in self._samples if when >= start]
        if len(kept) < 10:
            return None
        minutes = [(when - kept[0][0]) / 60 for when, _ in kept]
        # a process that has come or gone meanwhile is in the sum alone
        lasting = [pid for pid in kept[0][1] if all(pid in sample for _, sample in kept)]
        series = [(self._names[pid], [sample[pid] for _, sample in kept]) for pid in lasting]
        series.append(("all", [sum(sample.values()) for _, sample in kept]))
        return Memory(
            minutes=minutes[-1],
            samples=len(kept),
            processes=[_fit(name, minutes, values) for name, values in series],
        )

    def _sample(self) -> dict[int, float]:
        found = {}
        for process in self.server.processes:
            try:
                found[process.pid] = process.memory_info().rss / _MIB
                self._names.setdefault(process.pid, self._name(process))
            except psutil.NoSuchProcess:
                continue
        return found

    def _name(self, process: psutil.Process) -> str:
        """vLLM gives its processes titles; the first one keeps its command line."""
        title = " ".join(process.cmdline()).strip()
        if title.startswith("VLLM::"):
            return title
        return process.name() if self._names else "server"


def _fit(name: str, minutes: list[float], values: list[float]) -> ProcessMemory:
    tenth = max(1, len(values) // 10)
    return ProcessMemory(
        name=name,
        first_mib=statistics.mean(values[:tenth]),
        last_mib=statistics.mean(values[-tenth:]),
        mib_per_minute=statistics.linear_regression(minutes, values).slope,
    )
