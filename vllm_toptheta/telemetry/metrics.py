"""The statistics as Prometheus metrics, added to what vLLM exposes.

They are made from the engine's totals at each scrape, not counted in the API server: several API servers of one engine
then expose the same totals, and nothing is added up twice by `PROMETHEUS_MULTIPROC_DIR`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from vllm_toptheta.telemetry.stats import Stats


class StatsCollector(Collector):
    """Metric families of one set of statistics.

    Args:
        stats: What the workers have counted.
    """

    def __init__(self, stats: Stats) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """Yield the families; see docs/operations.md."""
        stats = self._stats
        yield _info(stats)
        yield from _promise(stats)
        yield _counter("toptheta_decode_steps", "Engine steps that decoded at least one token.", stats.decode_steps)
        yield _counter("toptheta_decode_tokens", "Tokens decoded.", stats.decode_tokens)
        dense = CounterMetricFamily("toptheta_dense_tokens", "Tokens decoded densely, by reason.", labels=["reason"])
        for reason, tokens in stats.dense_tokens.items():
            dense.add_metric([reason], tokens)
        yield dense
        yield _counter("toptheta_asked_tokens", "Tokens decoded as their request asked for.", stats.asked_tokens)
        requests = CounterMetricFamily("toptheta_requests", "Requests that named a way to decode.", labels=["kind"])
        for kind, number in stats.requests.items():
            requests.add_metric([kind], number)
        yield requests
        yield _counter(
            "toptheta_value_bytes_not_read", "Bytes of cached values that need not be read.", stats.bytes_not_read
        )
        yield _per_layer(
            "toptheta_value_rows_cached",
            "Value rows in the cache, summed over decoded tokens and kv heads.",
            ((head.layer, head.rows_cached) for head in stats.layers),
        )
        yield _per_layer(
            "toptheta_value_rows_read",
            "Value rows read from the cache, summed over decoded tokens and kv heads.",
            ((head.layer, head.rows_read) for head in stats.layers),
        )
        keys_read = [(head.layer, head.keys_read) for head in stats.layers if head.keys_read is not None]
        if keys_read:
            yield _per_layer(
                "toptheta_keys_read",
                "Keys read from the cache, summed over decoded tokens and kv heads; as many are cached as value rows.",
                keys_read,
            )
        copies_read = [(head.layer, head.copies_read) for head in stats.layers if head.copies_read is not None]
        if copies_read:
            yield _per_layer(
                "toptheta_value_copies_read",
                "Copies of values read instead of rows, summed over decoded tokens and kv heads.",
                copies_read,
            )
        lost_mass = HistogramMetricFamily(
            "toptheta_lost_mass",
            "Softmax mass of the keys whose values were not read, per decoded token and query head.",
            labels=["layer"],
        )
        for layer in stats.lost_mass:
            cumulative = list(accumulate(layer.counts))
            buckets = [(repr(edge), count) for edge, count in zip(stats.lost_mass_edges, cumulative, strict=True)]
            lost_mass.add_metric([str(layer.layer)], [*buckets, ("+Inf", cumulative[-1])], layer.sum)
        yield lost_mass
        yield _per_layer(
            "toptheta_guard_alarms",
            "Windows of tokens too many of which lost more than the bound.",
            ((state.layer, state.alarms) for state in stats.guarded),
        )
        lowered = GaugeMetricFamily(
            "toptheta_guard_lowered_by",
            "By how much the guard has lowered thresholds, scaled logits; +Inf where every key is kept.",
            labels=["layer"],
        )
        for state in stats.guarded:
            lowered.add_metric([str(state.layer)], math.inf if state.lowered_by is None else state.lowered_by)
        yield lowered
        yield from _beyond_evidence(stats)


def exposition(stats: Stats | None) -> bytes:
    """The answer to a scrape, in Prometheus' text format as vLLM gives it.

    Args:
        stats: The statistics; None if there are none, and then only vLLM's metrics are exposed.
    """
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    registry = CollectorRegistry()
    registry.register(get_prometheus_registry())
    if stats is not None:
        registry.register(StatsCollector(stats))
    return generate_latest(registry)


def _info(stats: Stats) -> InfoMetricFamily:
    return InfoMetricFamily(
        "toptheta_thresholds",
        "The thresholds in use.",
        value={
            "model": stats.thresholds or "",
            "mode": stats.mode,
            "target": stats.target or "",
            "compensation": stats.compensation,
            "draft_tokens": str(stats.draft_tokens or ""),
            "min_context": str(stats.min_context),
            "min_step_tokens": str(stats.min_step_tokens),
            "dense_layers": ",".join(map(str, stats.dense_layers)),
        },
    )


def _promise(stats: Stats) -> Iterator[GaugeMetricFamily]:
    """What is promised, if anything is."""
    promised = stats.promised
    if promised is None:
        return
    figures = {
        "loss_percent": ("Change of perplexity that is promised at most, percent.", promised.max_loss),
        "kl": ("KL divergence from dense attention that is promised at most, nats per token.", promised.max_kl),
        "measured_loss_percent": ("Change of perplexity that was measured, percent.", promised.change_percent),
        "measured_kl": ("KL divergence that was measured, nats per token.", promised.kl_divergence),
        "max_tokens": ("Tokens up to which the promise was measured.", promised.max_length),
        "differences": ("In how many ways the server is not what was measured.", len(promised.differences)),
    }
    for name, (documentation, value) in figures.items():
        if value is not None:
            yield GaugeMetricFamily(f"toptheta_promised_{name}", documentation, value=value)


def _beyond_evidence(stats: Stats) -> Iterator[Metric]:
    """What is lost beyond what was measured, where that is known."""
    beyond = stats.beyond_evidence
    if beyond is None:
        return
    share = GaugeMetricFamily(
        "toptheta_beyond_evidence_share",
        "Share of the last window's tokens that lost more than 1 % did where the promise was measured.",
        labels=["layer"],
    )
    for one in beyond.layers:
        share.add_metric([str(one.layer)], one.share)
    yield share
    yield GaugeMetricFamily(
        "toptheta_beyond_evidence_alarm",
        "1 while live text loses more than was measured for the promise.",
        value=beyond.is_alarming,
    )
    yield _counter(
        "toptheta_beyond_evidence_alarms",
        "Times that live text began to lose more than was measured for the promise.",
        beyond.alarms,
    )


def _counter(name: str, documentation: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(name, documentation, value=value)


def _per_layer(name: str, documentation: str, values: Iterable[tuple[int, int]]) -> CounterMetricFamily:
    totals: defaultdict[int, int] = defaultdict(int)
    for layer, value in values:
        totals[layer] += value
    family = CounterMetricFamily(name, documentation, labels=["layer"])
    for layer, total in totals.items():
        family.add_metric([str(layer)], total)
    return family
