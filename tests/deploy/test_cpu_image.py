"""The CPU image's steps, run as written, and its server: unprivileged, without a network, on a read-only root."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.deploy import cpu_image
from tests.deploy.image import ROOT

pytestmark = [
    pytest.mark.image,
    # the image installs vLLM anew, which takes minutes
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        sys.platform != "linux" or os.geteuid() != 0 or shutil.which("apt-get") is None,
        reason="the steps need overlays on a Debian root, hence root",
    ),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    scratch = tmp_path_factory.mktemp("image")
    try:
        done = subprocess.run(cpu_image.command(scratch), cwd=ROOT, capture_output=True, text=True, check=False)
    finally:
        shutil.rmtree(scratch)  # gigabytes
    assert done.returncode == 0, done.stderr[-8000:]
    return json.loads(done.stdout)


def test_the_health_check_succeeds_and_the_server_answers(report: dict[str, Any]) -> None:
    answer = json.loads(report["answer"])
    assert "Paris" in answer["choices"][0]["message"]["content"]


def test_it_runs_as_the_image_s_user_and_writes_nothing(report: dict[str, Any]) -> None:
    assert report["user"] == "2000:0"
    assert "Read-only file system" in report["writes_root"]


def test_it_needs_no_network(report: dict[str, Any]) -> None:
    assert "Network is unreachable" in report["leaves_network"]


def test_asked_to_stop_it_finishes_what_it_has_accepted(report: dict[str, Any]) -> None:
    assert report["exit_code"] == 0, report["log"][-4000:]
    assert json.loads(report["last"])["usage"]["completion_tokens"] == cpu_image.LAST_TOKENS


def test_its_routes_and_metrics_are_there(report: dict[str, Any]) -> None:
    stats = json.loads(report["stats"])
    assert (stats["mode"], stats["target"], stats["thresholds"]) == ("values", "floor:2", None)
    assert "toptheta_value_rows_read_total{" in report["metrics"]
    assert "vllm:generation_tokens_total{" in report["metrics"]


@pytest.mark.parametrize("place", ["stats", "metrics", "log"])
def test_what_was_asked_and_answered_is_nowhere_told(report: dict[str, Any], place: str) -> None:
    assert report[place]
    for word in ("France", "Paris", "capital"):
        assert word not in report[place]


def test_every_package_is_the_pinned_one(report: dict[str, Any]) -> None:
    installed = {package["name"].lower().replace("_", "-"): package["version"] for package in report["packages"]}
    lines = Path(ROOT / "deploy/docker/constraints-cpu.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    # ours, the name shim for vLLM, and what a virtual environment brings
    assert set(installed) - set(pins) <= {"vllm-toptheta", "vllm", "pip", "setuptools"}
    assert {name: version.partition("+")[0] for name, version in installed.items() if name in pins} == {
        name: pins[name] for name in installed if name in pins
    }
