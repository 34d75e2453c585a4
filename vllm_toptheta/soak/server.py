"""The server under test as processes of this machine: started, measured, stopped and killed."""

from __future__ import annotations

import asyncio
import os
import shlex
import subprocess
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import psutil

from vllm_toptheta.errors import SoakError

LOG_TAIL = 4000  # characters of a failed server's log that are shown


class ServerProcess:
    """A server that we have started, with all processes that it has started.

    Args:
        command: Its words.
        log: What it prints is appended here.
        is_up: Whether it answers.
        start_seconds: How long a start may take.
    """

    def __init__(
        self, command: Sequence[str], log: Path, is_up: Callable[[], Awaitable[bool]], *, start_seconds: float = 600.0
    ) -> None:
        self._command, self._log, self._is_up, self._start_seconds = list(command), log, is_up, start_seconds
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def _first(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError("the server has not been started")
        return self._process

    @property
    def processes(self) -> list[psutil.Process]:
        """The first process and all its descendants, those that are gone left out."""
        try:
            first = psutil.Process(self._first.pid)
            return [first, *first.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    async def start(self) -> None:
        """Start it and wait until it answers.

        Raises:
            SoakError: Something else answers there already, it ends, or it takes too long.
        """
        if await self._is_up():
            raise SoakError("something answers at this URL already", field="--url", remedy="Name a free port")
        with self._log.open("ab") as output:
            try:
                # what the caller asked for, in a session of its own: Ctrl+C is for us
                self._process = subprocess.Popen(  # noqa: S603
                    self._command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
                )
            except OSError as error:
                raise SoakError(f"cannot be run: {error.strerror}", field=shlex.join(self._command)) from None
        deadline = time.monotonic() + self._start_seconds
        while not await self._is_up():
            code = self._process.poll()
            if code is not None or time.monotonic() > deadline:
                what = "does not answer" if code is None else f"ended with code {code}"
                raise SoakError(f"the server {what}; the end of its log:\n{self._tail()}", field="--url")
            await asyncio.sleep(1)

    def terminate(self) -> None:
        """Send SIGTERM to the first process, as an orchestrator does; vLLM tells the others."""
        self._first.terminate()

    def kill(self, title: str) -> int:
        """SIGKILL the first process with `title` in its command line; returns its id.

        Raises:
            SoakError: There is none.
        """
        for process in self.processes:
            if title in " ".join(process.cmdline()):
                process.kill()
                return process.pid
        raise SoakError(f"no process of the server is called {title}", field="--kill")

    async def ended(self, seconds: float) -> int | None:
        """Wait until the first process has ended; returns its exit code, None if it has not."""
        deadline = time.monotonic() + seconds
        while self._first.poll() is None and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        return self._first.returncode

    async def clean_up(self, patience: float = 0.0) -> int:
        """Kill whatever is left of the server.

        Args:
            patience: Seconds within which it may end by itself.

        Returns:
            How many processes had to be killed.
        """
        if self._process is None:
            return 0
        deadline = time.monotonic() + patience
        while (left := self._left()) and time.monotonic() < deadline:
            await asyncio.sleep(0.2)
        for process in left:
            process.kill()
        self._process.wait()
        return len(left)

    def _left(self) -> list[psutil.Process]:
        """The processes of the server's session; they stay in it when their parent is gone."""
        return [process for process in psutil.process_iter() if _session(process.pid) == self._first.pid]

    def _tail(self) -> str:
        return self._log.read_text(errors="replace")[-LOG_TAIL:]


def _session(pid: int) -> int | None:
    """The session that a process belongs to; zombies, which nobody can kill, belong to none."""
    try:
        return None if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE else os.getsid(pid)
    except (psutil.NoSuchProcess, ProcessLookupError):
        return None
