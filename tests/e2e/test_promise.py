"""A server whose store says what floors were measured to cost: what it says, serves, and lets requests name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.server import Server, serving
from tests.quality_factory import make_evidence, make_promise
from vllm_toptheta import store

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900), pytest.mark.xdist_group("promise")]

LINE = "promised: perplexity within 0.5 % up to 512 tokens, measured +0.31 +- 0.08 % at 512 tokens on prose.txt"


@pytest.fixture(scope="module")
def promising(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of the demo model that promises, and is not what was measured in one way."""
    folder = tmp_path_factory.mktemp("promise")
    store.record_quality(
        folder / "stores" / model.name,
        make_evidence(
            make_promise(1.5, lengths=(512,)),
            make_promise(0.5, lengths=(512,), preset="high", max_loss=0.2),
            dtype="float32",
            weights_sha256=store.weights_sha256(model),
        ),
        model=store.ModelIdentity(id=model.name),
        architecture=store.read_architecture(model),
    )
    arguments = f"--thresholds {folder / 'stores'} --dtype bfloat16 --max-model-len 512"
    with serving(folder, arguments) as server:
        yield server


def test_the_promise_is_said_and_served(promising: Server) -> None:
    log, stats = promising.log.read_text(), promising.stats()
    assert f"{LINE}; but dtype bfloat16, measured with float32" in log
    assert log.count(f"toptheta: {LINE}") == 1
    assert log.count("measured otherwise: dtype bfloat16, measured with float32") == 1
    assert (stats["target"], stats["min_context"]) == ("floor:1.5", 512 - 256)
    assert stats["promised"]["text"] == LINE
    assert stats["promised"]["differences"] == ["dtype bfloat16, measured with float32"]
    assert "toptheta_promised_loss_percent 0.5" in promising.get("/metrics").text


def test_requests_name_presets_that_the_store_has(promising: Server, text_ids: list[int]) -> None:
    before = promising.stats()
    body = {"prompt": text_ids[:400], "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    promising.post("/v1/completions", **body, vllm_xargs={"toptheta": "high"})
    after = promising.stats()
    assert after["requests"]["floor"] - before["requests"]["floor"] == 1
    assert after["asked_tokens"] - before["asked_tokens"] == 7
    asked = {"model": "smollm2-135m-instruct", **body, "vllm_xargs": {"toptheta": "exact"}}
    answer = httpx.post(f"{promising.url}/v1/completions", json=asked, timeout=60)
    assert answer.status_code == 400
    assert "can ask for dense, floor:1.5, high, floor:0 to 1000, not for 'exact'" in answer.json()["error"]["message"]
