"""What became of drafts, from counters as vLLM makes them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from prometheus_client import CollectorRegistry, Counter
from vllm.v1.metrics import prometheus

from tests.telemetry.drafted import counting
from vllm_toptheta.telemetry.drafts import Drafts, drafts


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> CollectorRegistry:
    made = CollectorRegistry()
    monkeypatch.setattr(prometheus, "get_prometheus_registry", lambda: made)
    return made


def test_counters_are_added_up_over_engines(registry: CollectorRegistry) -> None:
    count = counting(registry, positions=3)
    count("0", [3, 1, 0])
    count("1", [2])
    Counter("vllm:request_success", "Another.", registry=registry).inc(7)
    assert drafts() == Drafts(
        verifications=4, drafted=12, accepted=6, accepted_by_position=[3, 2, 1], tokens_per_verification=2.5
    )


def test_before_the_first_draft(registry: CollectorRegistry) -> None:
    counting(registry, positions=2)("0", [])
    assert drafts() == Drafts(
        verifications=0, drafted=0, accepted=0, accepted_by_position=[0, 0], tokens_per_verification=None
    )


def test_without_vllms_statistics(registry: CollectorRegistry) -> None:
    assert drafts() is None


def test_the_names_are_vllms() -> None:
    from types import SimpleNamespace

    from vllm.v1.spec_decode.metrics import SpecDecodingProm, SpecDecodingStats

    registry = prometheus_registry()
    make: Callable[..., SpecDecodingProm] = SpecDecodingProm
    config = SimpleNamespace(num_speculative_tokens=3)
    counters = make(config, ["model_name", "engine"], {0: ["m", "0"]})
    try:
        stats = SpecDecodingStats.new(3)
        stats.observe_draft(num_draft_tokens=3, num_accepted_tokens=2)
        counters.observe(stats, 0)
        found = drafts()
        assert found is not None
        assert (found.verifications, found.drafted, found.accepted_by_position) == (1, 3, [1, 1, 0])
        assert found.tokens_per_verification == 3
    finally:
        for name in ("drafts", "draft_tokens", "accepted_tokens", "accepted_tokens_per_pos"):
            registry.unregister(registry._names_to_collectors[f"vllm:spec_decode_num_{name}"])


def prometheus_registry() -> CollectorRegistry:
    """That of this process, in which vLLM counts."""
    found: CollectorRegistry = prometheus.get_prometheus_registry()
    return found
