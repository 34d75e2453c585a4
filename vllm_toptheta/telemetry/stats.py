"""The statistics as they are served: one record per layer and kv head, summed over ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, Field


class HeadStats(BaseModel):
    """What decoding did to one kv head of one layer since the server started."""

    layer: int
    kv_head: int
    decode_tokens: int = Field(description="Tokens decoded.")
    dense_tokens: int = Field(description="Those among them whose context was too short for thresholds.")
    rows_cached: int = Field(description="Value rows in the cache, summed over decode tokens.")
    rows_read: int = Field(description="Value rows fetched from the cache, summed over decode tokens.")
    lost_mass_mean: float = Field(description="Softmax mass of the rows not read, mean over tokens and query heads.")


class RankStats(BaseModel):
    """What one worker reports."""

    mode: str
    target_k: int
    thresholds: str | None = Field(
        description="The model that the thresholds were calibrated on; null if none are used."
    )
    dense_layers: list[int] = Field(description="Layers that read everything; they are not listed under layers.")
    layers: list[HeadStats]


class Stats(RankStats):
    """What `GET /toptheta/stats` answers."""

    rows_read_share: float | None = Field(description="rows_read / rows_cached over all layers; null before decoding.")


def merge(ranks: Iterable[dict[str, Any]]) -> Stats:
    """Add up the ranks' reports: tensor-parallel ranks hold different heads, pipeline ranks different layers."""
    reports = [RankStats.model_validate(rank) for rank in ranks]
    heads: dict[tuple[int, int], HeadStats] = {}
    for head in (head for report in reports for head in report.layers):
        key = head.layer, head.kv_head
        heads[key] = _add(heads[key], head) if key in heads else head
    layers = [heads[key] for key in sorted(heads)]
    cached = sum(head.rows_cached for head in layers)
    return Stats(
        **reports[0].model_dump(exclude={"layers", "dense_layers"}),
        dense_layers=sorted({layer for report in reports for layer in report.dense_layers}),
        layers=layers,
        rows_read_share=sum(head.rows_read for head in layers) / cached if cached else None,
    )


def _add(one: HeadStats, other: HeadStats) -> HeadStats:
    tokens = one.decode_tokens + other.decode_tokens
    lost = one.lost_mass_mean * one.decode_tokens + other.lost_mass_mean * other.decode_tokens
    return HeadStats(
        layer=one.layer,
        kv_head=one.kv_head,
        decode_tokens=tokens,
        dense_tokens=one.dense_tokens + other.dense_tokens,
        rows_cached=one.rows_cached + other.rows_cached,
        rows_read=one.rows_read + other.rows_read,
        lost_mass_mean=lost / max(1, tokens),
    )
