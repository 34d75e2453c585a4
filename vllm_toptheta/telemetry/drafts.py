"""What became of the served model's drafts, as vLLM has counted it."""

from __future__ import annotations

from collections import Counter

from pydantic import BaseModel, Field

_PREFIX = "vllm:spec_decode_num_"


class Drafts(BaseModel):
    """Since the server started, over all engines."""

    verifications: int = Field(description="How often dense attention verified drafts of a request.")
    drafted: int = Field(description="Tokens drafted.")
    accepted: int = Field(description="Those that were accepted.")
    accepted_by_position: list[int] = Field(description="Likewise, by their place behind the token sampled last.")
    tokens_per_verification: float | None = Field(
        description="Tokens that a verification gave, its own included; null before the first."
    )


def drafts() -> Drafts | None:
    """The counters of vLLM's registry; None where nothing is counted (`--disable-log-stats`)."""
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    counts: Counter[str] = Counter()
    by_position: Counter[int] = Counter()
    for metric in get_prometheus_registry().collect():
        for sample in metric.samples:
            if not (sample.name.startswith(_PREFIX) and sample.name.endswith("_total")):
                continue
            name = sample.name.removeprefix(_PREFIX).removesuffix("_total")
            if name == "accepted_tokens_per_pos":
                by_position[int(sample.labels["position"])] += int(sample.value)
            else:
                counts[name] += int(sample.value)
    if "drafts" not in counts:
        return None
    verifications, accepted = counts["drafts"], counts["accepted_tokens"]
    return Drafts(
        verifications=verifications,
        drafted=counts["draft_tokens"],
        accepted=accepted,
        accepted_by_position=[by_position[position] for position in range(len(by_position))],
        tokens_per_verification=1 + accepted / verifications if verifications else None,
    )
