"""The statistics as they are served: records per layer and kv head, summed over ranks."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, Field

from vllm_toptheta.limits import LOST_MASS_EDGES
from vllm_toptheta.telemetry.drafts import Drafts


class HeadStats(BaseModel):
    """What decoding did to one kv head of one layer since the server started."""

    layer: int
    kv_head: int
    decode_tokens: int = Field(description="Tokens decoded; on every rank that holds the head.")
    dense_tokens: int = Field(description="Those among them whose context was too short for thresholds.")
    asked_tokens: int = Field(description="Those among them that were decoded as their request asked for.")
    rows_cached: int = Field(description="Value rows in the cache, summed over decode tokens.")
    rows_read: int = Field(description="Value rows fetched from the cache, summed over decode tokens.")
    keys_read: int | None = Field(
        default=None,
        description="Keys fetched from the cache, of as many as rows_cached; null in mode values, which reads all.",
    )
    copies_read: int | None = Field(
        default=None,
        description="Copies of values fetched from the cache instead of rows; null where there are none.",
    )
    lost_mass_mean: float = Field(
        description="Softmax mass of the rows not read, mean over query heads and tokens to which the server's "
        "thresholds applied."
    )


class LostMass(BaseModel):
    """Lost softmax mass in one layer, over query heads and tokens to which the server's thresholds applied."""

    layer: int
    counts: list[int] = Field(description="Pairs of token and query head in each bucket of lost_mass_edges.")
    sum: float = Field(description="Lost mass summed over the pairs.")


class GuardState(BaseModel):
    """What the guard makes of one layer."""

    layer: int
    max_lost_mass: float = Field(
        description="What a token of a query head may lose here, rounded up to an edge of the histogram."
    )
    share_above: float = Field(description="Share of the last window's tokens, of all heads, that lost more.")
    alarms: int = Field(description="Windows in which that share was too large, since the server started.")
    lowered_by: float | None = Field(description="Of the thresholds, scaled logits; null where every key is kept.")


class LayerBeyondEvidence(BaseModel):
    """What one layer loses beyond what was known of it."""

    layer: int
    lost_mass_p99: float = Field(description="What 1 % of the tokens lost more than, where it was measured.")
    share: float = Field(description="Share of the last window's tokens, of all heads, that surely lost more.")


class BeyondEvidence(BaseModel):
    """Whether live text loses more than the evidence of the promise knew."""

    max_share: float = Field(description="Mean share of the layers above which there is an alarm.")
    is_alarming: bool = Field(description="Whether there is an alarm on any rank.")
    alarms: int = Field(description="Alarms that began since the server started; of the rank with the most.")
    layers: list[LayerBeyondEvidence] = Field(
        description="Of the rank that is worse off, without layers whose p99 lies in the last bucket; empty before the "
        "first window."
    )


class Promised(BaseModel):
    """What the server promises by what toptheta tune measured, and where it is not served as it was measured."""

    text: str = Field(description="The promise and the figures, in a sentence.")
    max_loss: float | None = Field(description="Change of perplexity that is promised at most, percent.")
    max_kl: float | None = Field(description="KL divergence from dense attention likewise, nats per token.")
    max_length: int = Field(description="Tokens up to which it was measured.")
    change_percent: float = Field(description="Change of perplexity that was measured, at the worst length.")
    change_error: float = Field(description="Its standard error.")
    kl_divergence: float = Field(description="That was measured at that length.")
    differences: list[str] = Field(description="Where the server is not what was measured; empty if nowhere.")


class InForce(BaseModel):
    """What the server was started with."""

    mode: str
    guard: str = Field(
        description="off, warn or relax; off with calibrated shadow keys, by which what is lost is only estimated."
    )
    max_lost_mass: float = Field(
        description="What a token of a query head may lose before the guard counts it, where a layer has no bound of "
        "its own (guarded)."
    )
    target: str | None = Field(description="What the thresholds aim at, floor:2 or k:128; null if none are used.")
    compensation: str
    min_context: int = Field(description="Sequences of at most this many tokens are dense.")
    min_step_tokens: int = Field(description="All sequences are dense in a step of fewer tokens, over all of them.")
    thresholds: str | None = Field(
        description="The model that something was calibrated on; null where thresholds are relative to each row."
    )
    calibrated_lengths: tuple[int, int] | None = Field(
        description="Tokens between which calibrated thresholds follow the length; null of others."
    )
    choices: list[str] = Field(description="What a request can ask for in vllm_xargs.toptheta.")
    promised: Promised | None = Field(description="What the server promises; null if nothing.")
    draft_tokens: int | None = Field(
        None,
        description="Tokens that are drafted before they are verified densely: then decoded tokens are drafts; null "
        "where they are what is answered.",
    )
    num_layers: int
    num_kv_heads: int
    value_row_bytes: int = Field(description="Bytes of one cached value row: head size times bytes of an element.")


class RankStats(InForce):
    """What one worker reports."""

    decode_steps: int
    decode_tokens: int
    dense_tokens: int
    asked_tokens: int
    requests: dict[str, int]
    layers: list[HeadStats]
    lost_mass: list[LostMass]
    guarded: list[GuardState] = Field(description="Of every layer under guard; of the rank that is worse off.")
    beyond_evidence: BeyondEvidence | None


class Stats(InForce):
    """What `GET /toptheta/stats` answers."""

    dense_layers: list[int] = Field(description="Layers that read everything: those not listed under layers.")
    collected_at: float = Field(description="When the workers were asked, in seconds since 1970.")
    decode_steps: int = Field(description="Engine steps that decoded at least one token.")
    decode_tokens: int = Field(description="Tokens decoded.")
    dense_tokens: dict[str, int] = Field(description="Those that were decoded densely, by reason.")
    asked_tokens: int = Field(description="Tokens decoded as their request asked for.")
    requests: dict[str, int] = Field(description="Requests that named a way to decode, by its kind.")
    rows_read_share: float | None = Field(description="rows_read / rows_cached over all layers; null before decoding.")
    keys_read_share: float | None = Field(
        description="keys_read / rows_cached over all layers; null in mode values, and before decoding."
    )
    copies_read_share: float | None = Field(
        description="copies_read / rows_cached over all layers; null where there are none, and before decoding."
    )
    bytes_not_read: int = Field(description="Bytes of cached values that thresholds made unnecessary to read.")
    lost_mass_edges: list[float] = Field(description="Upper edges of the buckets in lost_mass, included.")
    layers: list[HeadStats]
    lost_mass: list[LostMass]
    guarded: list[GuardState] = Field(description="Of every layer under guard; of the rank that is worse off.")
    beyond_evidence: BeyondEvidence | None = Field(
        description="What is lost beyond what was measured for the promise; null where that is not known."
    )
    drafts: Drafts | None = Field(None, description="What became of drafts; null where none are made, or not counted.")


def merge(replicas: Iterable[Iterable[dict[str, Any]]]) -> Stats:
    """Add up the ranks' reports.

    Tensor-parallel ranks hold different heads and pipeline ranks different layers, yet all of a replica's ranks decode
    the same tokens.

    Args:
        replicas: The reports of each data-parallel replica's ranks, in the fields of `RankStats`.
    """
    engines = [[RankStats.model_validate(rank) for rank in ranks] for ranks in replicas]
    reports = [report for engine in engines for report in engine]
    heads: dict[tuple[int, int], HeadStats] = {}
    for head in (head for report in reports for head in report.layers):
        key = head.layer, head.kv_head
        heads[key] = _add_heads(heads[key], head) if key in heads else head
    lost_mass: dict[int, LostMass] = {}
    for one in (one for report in reports for one in report.lost_mass):
        lost_mass[one.layer] = _add_lost_mass(lost_mass[one.layer], one) if one.layer in lost_mass else one
    layers = [heads[key] for key in sorted(heads)]
    cached, read = (sum(getattr(head, name) for head in layers) for name in ("rows_cached", "rows_read"))
    return Stats(
        **reports[0].model_dump(include=set(InForce.model_fields)),
        dense_layers=sorted(set(range(reports[0].num_layers)) - {head.layer for head in layers}),
        collected_at=time.time(),
        decode_steps=_over_replicas(engines, "decode_steps"),
        decode_tokens=_over_replicas(engines, "decode_tokens"),
        dense_tokens={"short_context": _over_replicas(engines, "dense_tokens")},
        asked_tokens=_over_replicas(engines, "asked_tokens"),
        requests=_requests(engines),
        rows_read_share=read / cached if cached else None,
        keys_read_share=_share(layers, "keys_read"),
        copies_read_share=_share(layers, "copies_read"),
        bytes_not_read=(cached - read) * reports[0].value_row_bytes,
        lost_mass_edges=list(LOST_MASS_EDGES),
        layers=layers,
        lost_mass=[lost_mass[layer] for layer in sorted(lost_mass)],
        guarded=_worst(state for report in reports for state in report.guarded),
        beyond_evidence=_beyond_evidence([one.beyond_evidence for one in reports if one.beyond_evidence is not None]),
    )


def _beyond_evidence(reports: list[BeyondEvidence]) -> BeyondEvidence | None:
    if not reports:
        return None
    worst: dict[int, LayerBeyondEvidence] = {}
    for one in (one for report in reports for one in report.layers):
        if one.layer not in worst or one.share > worst[one.layer].share:
            worst[one.layer] = one
    return BeyondEvidence(
        max_share=reports[0].max_share,
        is_alarming=any(report.is_alarming for report in reports),
        alarms=max(report.alarms for report in reports),
        layers=[worst[layer] for layer in sorted(worst)],
    )


def _share(layers: list[HeadStats], field: str) -> float | None:
    """What of a count that some heads have comes on a cached row of theirs."""
    counted = [head for head in layers if getattr(head, field) is not None]
    cached = sum(head.rows_cached for head in counted)
    return sum(getattr(head, field) for head in counted) / cached if cached else None


def _worst(states: Iterable[GuardState]) -> list[GuardState]:
    """One state for each layer, of ranks that guard heads of their own."""
    worst: dict[int, GuardState] = {}
    for state in states:
        other = worst.get(state.layer)
        if other is None or _severity(state) > _severity(other):
            worst[state.layer] = state
    return [worst[layer] for layer in sorted(worst)]


def _severity(state: GuardState) -> tuple[float, float]:
    return math.inf if state.lowered_by is None else state.lowered_by, state.share_above


def _over_replicas(engines: list[list[RankStats]], field: str) -> int:
    """Sum of a count over replicas, in each of which it is that of the rank furthest ahead."""
    return sum(max(getattr(report, field) for report in engine) for engine in engines)


def _requests(engines: list[list[RankStats]]) -> dict[str, int]:
    """Requests by what they asked for; all ranks of a replica see the same ones."""
    total: Counter[str] = Counter()
    for engine in engines:
        furthest = max(engine, key=lambda report: sum(report.requests.values()))
        total.update(furthest.requests)
    return dict(sorted(total.items()))


def _add_heads(one: HeadStats, other: HeadStats) -> HeadStats:
    sparse = [head.decode_tokens - head.dense_tokens - head.asked_tokens for head in (one, other)]
    lost = one.lost_mass_mean * sparse[0] + other.lost_mass_mean * sparse[1]
    return HeadStats(
        layer=one.layer,
        kv_head=one.kv_head,
        decode_tokens=one.decode_tokens + other.decode_tokens,
        dense_tokens=one.dense_tokens + other.dense_tokens,
        asked_tokens=one.asked_tokens + other.asked_tokens,
        rows_cached=one.rows_cached + other.rows_cached,
        rows_read=one.rows_read + other.rows_read,
        keys_read=_sum(one.keys_read, other.keys_read),
        copies_read=_sum(one.copies_read, other.copies_read),
        lost_mass_mean=lost / max(1, sum(sparse)),
    )


def _sum(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one + other


def _add_lost_mass(one: LostMass, other: LostMass) -> LostMass:
    counts = [a + b for a, b in zip(one.counts, other.counts, strict=True)]
    return LostMass(layer=one.layer, counts=counts, sum=one.sum + other.sum)
