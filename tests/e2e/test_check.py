"""What `toptheta serve --check` accepts answers, also where vLLM's configuration alone would not tell."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.calibration.tiny_model import save_model_dir, tiny_config, tiny_model
from tests.e2e.generate import ENVIRONMENT
from tests.e2e.ports import free_port
from tests.e2e.server import running

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

OVERRIDES = json.dumps({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})

# sizes that no other engine is started with: of heads, groups, pages and the cache's dtype
SERVED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "72": (
        {"head_dim": 72, "num_attention_heads": 17, "num_key_value_heads": 1, "hidden_size": 68},
        ["--block-size", "48", "--dtype", "float32"],
    ),
    "112 with copies": (
        {"head_dim": 112},
        ["--mode", "shadow", "--block-size", "256", "--dtype", "float16", "--always-shadow"],
    ),
    "192": ({"head_dim": 192}, ["--kv-cache-dtype=bfloat16", "--block-size", "16", "--hf-overrides", OVERRIDES]),
    "512": ({"head_dim": 512}, ["-tp", "2", "--dtype", "bfloat16"]),
}


@pytest.mark.nightly
@pytest.mark.parametrize("name", SERVED)
def test_what_the_check_accepts_answers(name: str, tmp_path: Path) -> None:
    change, flags = SERVED[name]
    model = save_model_dir(tmp_path / "tiny", tiny_model(tiny_config(**change)))
    port = free_port()
    command = ["toptheta", "serve", str(model), "--max-num-seqs", "2", "--enforce-eager", *flags, "--port", str(port)]
    command += ["--min-context", "0"]
    checked = subprocess.run([*command, "--check"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    with running(command, port, tmp_path, environment=ENVIRONMENT) as server:
        # beyond the anchors, so that thresholds apply
        body = {"model": str(model), "prompt": "a word and another " * 15, "max_tokens": 8, "ignore_eos": True}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=300)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 8
        stats = server.stats()
        assert stats["decode_tokens"] > sum(stats["dense_tokens"].values())


def test_what_the_check_refuses_is_refused_by_serve_at_once(tmp_path: Path) -> None:
    model = save_model_dir(tmp_path / "tiny")
    command = ["toptheta", "serve", str(model), "--block-size", "8"]
    for words in ([], ["--check"]):
        process = subprocess.run([*command, *words], capture_output=True, text=True, timeout=60, check=False)
        assert process.returncode == 2
        assert process.stdout == ""
        assert process.stderr.startswith("error: --block-size 8: not supported, only multiples of 16")
