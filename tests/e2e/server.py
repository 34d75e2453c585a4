"""`make serve` in a process of its own, as a user runs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx

import vllm_toptheta
from tests.e2e.ports import free_port
from vllm_toptheta.telemetry.reader import MAX_AGE

ROOT = Path(vllm_toptheta.__file__).parents[1]
START_SECONDS = 400


def serve_command(port: int, arguments: str = "") -> list[str]:
    """`make serve` with further flags."""
    return ["make", "serve", f"VENV={sys.prefix}", f"PORT={port}", f"ARGS={arguments}"]


class Server(NamedTuple):
    """A running server.

    Attributes:
        url: Without a slash at its end.
        log: What it prints.
    """

    url: str
    log: Path

    def get(self, route: str, **headers: str) -> httpx.Response:
        """The answer to a GET request."""
        return httpx.get(self.url + route, headers=headers, timeout=30)

    def post(self, route: str, **body: Any) -> dict[str, Any]:
        """The JSON that the demo model answers."""
        answer = httpx.post(self.url + route, json={"model": "smollm2-135m-instruct", **body}, timeout=300)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def stats(self) -> dict[str, Any]:
        """What /toptheta/stats answers, newer than what an earlier call has seen."""
        time.sleep(MAX_AGE)
        answer = self.get("/toptheta/stats")
        assert answer.status_code == 200, answer.text
        return answer.json()


@contextmanager
def serving(folder: Path, arguments: str = "") -> Iterator[Server]:
    """A server of the demo model, whose log stands in `folder`; it must not end before we do."""
    port = free_port()
    with running(serve_command(port, arguments), port, folder) as server:
        yield server


@contextmanager
def running(command: list[str], port: int, folder: Path, environment: dict[str, str] | None = None) -> Iterator[Server]:
    """A server that `command` starts on `port`; otherwise as `serving`."""
    log = folder / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_until_healthy(process, f"http://127.0.0.1:{port}", log)
        yield Server(f"http://127.0.0.1:{port}", log)
        assert process.poll() is None, log.read_text()[-4000:]
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _wait_until_healthy(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the server ended:\n{log.read_text()[-6000:]}"
        try:
            if httpx.get(url + "/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(1)
    raise AssertionError(f"no answer after {START_SECONDS} s:\n{log.read_text()[-6000:]}")
