"""How growth of memory is told from noise."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

import pytest

from vllm_toptheta.soak.memory import MemoryWatch
from vllm_toptheta.soak.server import ServerProcess

HOARD = """
import time
kept = []
print("up", flush=True)
while True:
    kept.append(b"x" * (1 << 20) * {mib})
    time.sleep(0.05)
"""


async def watch_process(log: Path, mib: int) -> tuple[MemoryWatch, float]:
    async def is_up() -> bool:
        return log.exists() and "up" in log.read_text()

    server = ServerProcess([sys.executable, "-c", HOARD.format(mib=mib)], log, is_up)
    try:
        await server.start()
        start, watch = time.monotonic(), MemoryWatch(server, seconds=0.05)
        sampling = asyncio.create_task(watch.run())
        await asyncio.sleep(1.5)
        while watch.since(start) is None and time.monotonic() < start + 60:  # a busy machine samples less often
            await asyncio.sleep(0.05)
        sampling.cancel()
    finally:
        await server.clean_up()
    return watch, start


@pytest.mark.parametrize(("mib", "grows"), [(0, False), (1, True)])
def test_growth_is_measured(tmp_path: Path, mib: int, grows: bool) -> None:
    watch, start = asyncio.run(watch_process(tmp_path / "log.txt", mib))
    memory = watch.since(start)
    assert memory is not None
    *_, total = memory.processes
    assert total.name == "all"
    # some MiB every 0.05 s are hundreds a minute
    assert (total.mib_per_minute > 100) == grows
    assert (total.last_mib > total.first_mib + 3) == grows


def test_too_few_samples_say_nothing(tmp_path: Path) -> None:
    watch, _ = asyncio.run(watch_process(tmp_path / "log.txt", 0))
    assert watch.since(time.monotonic()) is None
