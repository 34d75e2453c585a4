"""`make serve`, as a user runs it: the answer, the statistics, and what a mistake looks like."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.ports import free_port
from tests.e2e.server import ROOT, Server, serve_command, serving
from tests.e2e.texts import assert_same_text
from vllm_toptheta.telemetry.reader import MAX_AGE

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]
on_the_server = pytest.mark.xdist_group("server")


@on_the_server
def test_it_answers(server: Server) -> None:
    question = "What is the capital of France? Answer in one sentence."
    answer = server.post(
        "/v1/chat/completions", messages=[{"role": "user", "content": question}], max_tokens=40, temperature=0
    )
    assert "Paris" in answer["choices"][0]["message"]["content"]


@on_the_server
def test_the_command_is_printed_and_the_settings_logged_once(server: Server) -> None:
    log = server.log.read_text()
    (command,) = [line for line in log.splitlines() if line.startswith("VLLM_PLUGINS=")]
    assert ",toptheta vllm serve " in command
    assert " --attention-backend toptheta " in command
    assert log.count("toptheta: thresholds floor:2: relative to each row") == 1


@on_the_server
def test_a_long_context_reads_few_value_rows(server: Server, text_ids: list[int]) -> None:
    before = server.stats()
    server.post("/v1/completions", prompt=text_ids[:3000], max_tokens=64, temperature=0, ignore_eos=True)
    after = server.stats()
    assert (after["mode"], after["target"], after["dense_layers"]) == ("values", "floor:2", [])
    assert len(after["layers"]) == 30 * 3
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


@on_the_server
def test_streaming_and_many_requests_at_once(server: Server, text_ids: list[int]) -> None:
    prompts = [text_ids[start : start + 50 + 60 * start] for start in range(4)]
    # dense: the guard may lower thresholds between two requests, and texts that thresholds made would differ by that
    asked = {"vllm_xargs": {"toptheta": "dense"}}
    body = {"max_tokens": 6, "temperature": 0, "ignore_eos": True, "logprobs": 2, **asked}
    together = server.post("/v1/completions", prompt=prompts, **body)["choices"]
    assert [choice["index"] for choice in together] == list(range(4))
    alone = [server.post("/v1/completions", prompt=prompt, **body)["choices"][0] for prompt in prompts]
    # steps of bfloat16 logits, which are up to 32
    assert_same_text([output(choice) for choice in together], [output(choice) for choice in alone], rounding=0.25)
    streamed = {"model": "smollm2-135m-instruct", "prompt": prompts[3], "stream": True, **body}
    with httpx.stream("POST", server.url + "/v1/completions", json=streamed, timeout=300) as stream:
        lines = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    pieces = [json.loads(line)["choices"][0] for line in lines[:-1]]
    assert len(pieces) > 1
    names = ("tokens", "top_logprobs")
    whole = {"logprobs": {name: [one for piece in pieces for one in piece["logprobs"][name]] for name in names}}
    assert_same_text([output(whole)], [output(alone[3])], rounding=0.25)
    assert "".join(piece["text"] for piece in pieces) == "".join(whole["logprobs"]["tokens"])


def output(choice: dict[str, Any]) -> dict[str, Any]:
    """A choice in the form in which engines' outputs are compared."""
    best = [sorted(step.values(), reverse=True)[:2] for step in choice["logprobs"]["top_logprobs"]]
    return {"token_ids": choice["logprobs"]["tokens"], "top2": best}


def metrics(text: str) -> dict[tuple[str, str], float]:
    """Our samples: value by name and the label's value."""
    families = text_string_to_metric_families(text)
    return {
        (sample.name, ",".join(sample.labels.values())): sample.value
        for family in families
        for sample in family.samples
        if sample.name.startswith("toptheta")
    }


@on_the_server
def test_prometheus_scrapes_what_the_statistics_say(server: Server, text_ids: list[int]) -> None:
    server.post("/v1/completions", prompt=text_ids[:600], max_tokens=16, temperature=0, ignore_eos=True)
    server.post("/v1/completions", prompt=text_ids[:20], max_tokens=8, temperature=0, ignore_eos=True)
    stats, answer = server.stats(), server.get("/metrics")
    assert "vllm:generation_tokens_total" in answer.text
    found = metrics(answer.text)
    assert found["toptheta_decode_tokens_total", ""] == stats["decode_tokens"] > 0
    assert found["toptheta_dense_tokens_total", "short_context"] == stats["dense_tokens"]["short_context"] >= 7
    assert found["toptheta_value_bytes_not_read_total", ""] == stats["bytes_not_read"] > 0
    assert stats["value_row_bytes"] == 64 * 2
    assert stats["bytes_not_read"] == 128 * sum(head["rows_cached"] - head["rows_read"] for head in stats["layers"])
    for layer in stats["lost_mass"]:
        assert found["toptheta_lost_mass_count", str(layer["layer"])] == sum(layer["counts"])
    sparse_tokens = stats["decode_tokens"] - stats["dense_tokens"]["short_context"] - stats["asked_tokens"]
    assert found["toptheta_lost_mass_count", "2"] == 9 * sparse_tokens  # query heads


@pytest.mark.nightly
def test_two_api_servers_with_a_key_report_the_same_totals(tmp_path: Path, text_ids: list[int]) -> None:
    body = {"model": "smollm2-135m-instruct", "prompt": text_ids[:300], "max_tokens": 8, "ignore_eos": True}
    key = {"Authorization": "Bearer secret"}
    with serving(tmp_path, "--api-server-count 2 --api-key secret") as server:
        assert "secret" not in server.log.read_text()
        for _ in range(6):
            answer = httpx.post(server.url + "/v1/completions", json=body, headers=key, timeout=300)
            assert answer.status_code == 200, answer.text
        time.sleep(MAX_AGE)
        assert {server.get("/toptheta/stats").status_code for _ in range(4)} == {401}
        api_servers = {int(pid) for pid in re.findall(r"\(ApiServer_\d+ pid=(\d+)\)", server.log.read_text())}
        assert len(api_servers) == 2
        answering: set[int] = set()
        deadline = time.monotonic() + 120
        # every connection may reach another of the two, but an idle one may take all that come one by one
        while answering < api_servers and time.monotonic() < deadline:
            with ThreadPoolExecutor(8) as pool, ExitStack() as open_clients:
                clients = [open_clients.enter_context(httpx.Client(base_url=server.url, headers=key)) for _ in range(8)]
                found = list(pool.map(lambda client: metrics(client.get("/metrics").text), clients))
                answers = list(pool.map(lambda client: client.get("/toptheta/stats").json(), clients))
                answering |= {pid for pid in api_servers if is_connected(pid, server)}
            assert {one["toptheta_decode_tokens_total", ""] for one in found} == {6 * 7}
            assert {answer["decode_tokens"] for answer in answers} == {6 * 7}
        assert answering == api_servers


def is_connected(pid: int, server: Server) -> bool:
    """Whether a client of the server is connected with this process of it."""
    port = int(server.url.rpartition(":")[2])
    connections = psutil.Process(pid).net_connections("tcp")
    return any(one.status == psutil.CONN_ESTABLISHED and one.laddr.port == port for one in connections)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("""--additional-config '{"toptheta": {"weightfloor": 3}}'""", "toptheta.weightfloor: unknown option"),
        ("""--additional-config '{"toptheta": {"thresholds": "nowhere", "target": "k:64"}}'""", "nowhere"),
        ("--target k:1000", "calibrated are "),
        ("--kv-cache-dtype fp8", "--kv-cache-dtype fp8: not supported, only "),
    ],
)
def test_a_mistake_ends_the_start_in_seconds_with_one_reason(arguments: str, words: str) -> None:
    process = subprocess.run(
        serve_command(free_port(), arguments), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert process.returncode != 0
    (line,) = [line for line in process.stderr.splitlines() if not line.startswith("make")]
    assert line.startswith("error: ")
    assert words in line


def test_plain_vllm_is_refused_by_the_backend_with_the_same_words(model: Path) -> None:
    flags = ["--attention-backend", "toptheta", "--kv-cache-dtype", "fp8", "--port", str(free_port())]
    process = subprocess.run(
        [str(Path(sys.prefix, "bin", "vllm")), "serve", str(model), *flags],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode != 0
    last = [line for line in process.stderr.splitlines() if "vllm_toptheta.errors." in line][-1]
    assert "--kv-cache-dtype fp8: not supported, only " in last
