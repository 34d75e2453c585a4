"""`make serve`, as a user runs it: the answer, the statistics, and what a mistake looks like."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from vllm_toptheta.backend import worker

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

ROOT = Path(worker.__file__).parents[2]
START_SECONDS = 400


def serve_command(port: int, arguments: str = "") -> list[str]:
    return ["make", "serve", f"VENV={sys.prefix}", f"PORT={port}", f"ARGS={arguments}"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Server(NamedTuple):
    url: str
    log: Path

    def post(self, route: str, **body: Any) -> dict[str, Any]:
        answer = httpx.post(self.url + route, json={"model": "smollm2-135m-instruct", **body}, timeout=300)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def stats(self) -> dict[str, Any]:
        answer = httpx.get(self.url + "/toptheta/stats", timeout=30)
        assert answer.status_code == 200, answer.text
        return answer.json()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(
            serve_command(port), cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_until_healthy(process, f"http://127.0.0.1:{port}", log)
        yield Server(f"http://127.0.0.1:{port}", log)
        assert process.poll() is None, log.read_text()[-4000:]
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def wait_until_healthy(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the server ended:\n{log.read_text()[-6000:]}"
        try:
            if httpx.get(url + "/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(1)
    raise AssertionError(f"no answer after {START_SECONDS} s:\n{log.read_text()[-6000:]}")


def test_it_answers(server: Server) -> None:
    question = "What is the capital of France? Answer in one sentence."
    answer = server.post(
        "/v1/chat/completions", messages=[{"role": "user", "content": question}], max_tokens=40, temperature=0
    )
    assert "Paris" in answer["choices"][0]["message"]["content"]


def test_the_command_is_printed_and_the_settings_logged_once(server: Server) -> None:
    log = server.log.read_text()
    (command,) = [line for line in log.splitlines() if line.startswith("VLLM_PLUGINS=toptheta ")]
    assert " vllm serve " in command
    assert " --attention-backend toptheta " in command
    assert log.count("toptheta: thresholds of HuggingFaceTB/SmolLM2-135M-Instruct") == 1
    assert "target_k=128" in log


def test_a_long_context_reads_few_value_rows(server: Server, text_ids: list[int]) -> None:
    before = server.stats()
    server.post("/v1/completions", prompt=text_ids[:3000], max_tokens=64, temperature=0, ignore_eos=True)
    after = server.stats()
    assert (after["mode"], after["target_k"], after["dense_layers"]) == ("values", 128, [0, 1])
    assert len(after["layers"]) == 28 * 3
    for old, new in zip(before["layers"], after["layers"], strict=True):
        assert new["decode_tokens"] - old["decode_tokens"] == 63  # the first token comes from the prompt's last row
        assert new["dense_tokens"] == old["dense_tokens"]
        assert new["rows_cached"] - old["rows_cached"] == sum(range(3001, 3064))
        assert 0 < new["lost_mass_mean"] < 0.5
    cached, read = (
        sum(new[key] - old[key] for old, new in zip(before["layers"], after["layers"], strict=True))
        for key in ("rows_cached", "rows_read")
    )
    assert read < 0.25 * cached


def test_streaming_and_many_requests_at_once(server: Server, text_ids: list[int]) -> None:
    prompts = [text_ids[start : start + 50 + 100 * start] for start in range(8)]
    together = server.post("/v1/completions", prompt=prompts, max_tokens=8, temperature=0, ignore_eos=True)
    assert len(together["choices"]) == 8
    body = {"model": "smollm2-135m-instruct", "prompt": prompts[3], "max_tokens": 8, "temperature": 0, "stream": True}
    with httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=300) as stream:
        lines = [line for line in stream.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("""--additional-config '{"toptheta": {"target": 64}}'""", "unknown option"),
        ("""--additional-config '{"toptheta": {"thresholds": "nowhere"}}'""", "nowhere"),
        ("--kv-cache-dtype fp8", "--kv-cache-dtype fp8"),
    ],
)
def test_a_mistake_ends_the_start_with_one_reason(arguments: str, words: str) -> None:
    process = subprocess.run(
        serve_command(free_port(), arguments), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert process.returncode != 0
    last = [line for line in process.stderr.splitlines() if "vllm_toptheta.errors." in line][-1]
    assert words in last
