"""Processes under test: what starts, what does not, and what is left of them."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import psutil
import pytest

from vllm_toptheta.errors import SoakError
from vllm_toptheta.soak.server import ServerProcess

# the child is called so by its command line; the parent's must not contain the name
PARENT = (
    "import subprocess, sys, time; "
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)  # VLLM::' + 'Child']); "
)


async def _down() -> bool:
    return False


def server(code: str, folder: Path, *, start_seconds: float = 10.0) -> ServerProcess:
    log = folder / "log.txt"

    async def is_up() -> bool:
        return log.exists() and "up" in log.read_text()

    return ServerProcess([sys.executable, "-c", code], log, is_up, start_seconds=start_seconds)


def test_orphans_are_found_and_killed(tmp_path: Path) -> None:
    async def orphan() -> tuple[int | None, int, list[psutil.Process]]:
        process = server(PARENT + "print('up', flush=True); time.sleep(60)", tmp_path)
        await process.start()
        children = process.processes[1:]
        process.terminate()
        code = await process.ended(10)
        return code, await process.clean_up(), children

    code, orphans, children = asyncio.run(orphan())
    assert (code, orphans, len(children)) == (-15, 1, 1)
    psutil.wait_procs(children, timeout=10)
    assert not children[0].is_running()


def test_a_process_is_killed_by_its_name(tmp_path: Path) -> None:
    async def kill() -> int | None:
        process = server(PARENT + "print('up', flush=True); time.sleep(60)", tmp_path)
        try:
            await process.start()
            with pytest.raises(SoakError, match="no process of the server is called Worker"):
                process.kill("Worker")
            assert process.kill("VLLM::Child") != process.processes[0].pid
            return await process.ended(0.5)
        finally:
            await process.clean_up()

    assert asyncio.run(kill()) is None


def test_what_a_failed_start_said_is_shown(tmp_path: Path) -> None:
    with pytest.raises(SoakError, match="(?s)ended with code 3; the end of its log:.*no such model"):
        asyncio.run(server("import sys; print('no such model'); sys.exit(3)", tmp_path).start())


def test_a_command_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(SoakError, match="nowhere: cannot be run"):
        asyncio.run(ServerProcess(["nowhere"], tmp_path / "log.txt", _down).start())


def test_a_url_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("up")
    with pytest.raises(SoakError, match="answers at this URL already"):
        asyncio.run(server("", tmp_path).start())
