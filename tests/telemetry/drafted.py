"""Counters of drafts as vLLM makes them, in a registry of their own."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter

_LABELS = ["model_name", "engine"]


def counting(registry: CollectorRegistry, *, positions: int) -> Callable[[str, list[int]], None]:
    """Make the counters; what is returned takes an engine, and how many drafts each verification accepted."""
    counters = {
        name: Counter(f"vllm:spec_decode_num_{name}", "Drafts.", _LABELS, registry=registry)
        for name in ("drafts", "draft_tokens", "accepted_tokens")
    }
    by_position = Counter(
        "vllm:spec_decode_num_accepted_tokens_per_pos", "Drafts.", [*_LABELS, "position"], registry=registry
    )

    def count(engine: str, accepted: list[int]) -> None:
        added = {"drafts": len(accepted), "draft_tokens": positions * len(accepted), "accepted_tokens": sum(accepted)}
        for name, counter in counters.items():
            counter.labels("m", engine).inc(added[name])
        for position in range(positions):
            by_position.labels("m", engine, str(position)).inc(sum(one > position for one in accepted))

    return count
