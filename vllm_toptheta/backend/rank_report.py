"""What one rank has to say when the API server asks for statistics."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch

from vllm_toptheta.backend.guard import LayerGuard
from vllm_toptheta.backend.layers import our_impls
from vllm_toptheta.backend.loss_watch import MAX_SHARE, LossWatch
from vllm_toptheta.backend.plan import Plan
from vllm_toptheta.limits import FLOAT8_CACHE_DTYPES


def rank_report(vllm_config: Any) -> dict[str, Any] | None:
    """This rank's report in the fields of `telemetry.stats.RankStats`, or None without a TOPTHETA layer."""
    impls = our_impls(vllm_config)
    plan = next((impl.plan for impl in impls if impl.plan is not None), None)
    if plan is None:
        return None
    layer_plans = [impl.layer_plan for impl in impls if impl.layer_plan]
    counters = [layer.counters for layer in layer_plans]
    layers = [record for layer in counters for record in layer.heads()]
    # every layer decodes every token
    totals = counters[0].settled().totals.tolist() if counters else [0] * 5
    decode_tokens, dense_tokens, _, decode_steps, asked_tokens = totals
    requests = next(impl.requests for impl in impls if impl.plan is not None)
    return {
        "mode": plan.settings.mode,
        "guard": plan.guard,
        "target": plan.thresholds and plan.thresholds.label,
        "compensation": plan.settings.compensation,
        "min_context": plan.dense_rule.max_len,
        "min_step_tokens": plan.dense_rule.min_step_tokens,
        "choices": plan.choices.labels,
        "promised": promised_of(plan),
        "draft_tokens": plan.settings.most_draft_tokens if plan.settings.lossless else None,
        "max_lost_mass": plan.settings.max_lost_mass,
        "thresholds": plan.model_id,
        "calibrated_lengths": _calibrated_lengths(plan),
        "num_layers": plan.architecture.num_layers,
        "num_kv_heads": plan.architecture.num_kv_heads,
        "value_row_bytes": plan.architecture.head_size * _element_bytes(vllm_config),
        "decode_steps": decode_steps,
        "decode_tokens": decode_tokens,
        "dense_tokens": dense_tokens,
        "asked_tokens": asked_tokens,
        "requests": {kind: requests.counts[kind] for kind in plan.choices.kinds},
        "layers": layers,
        "lost_mass": [layer.histogram() for layer in counters],
        "guarded": [
            _guard_state(layer.counters.layer, layer.guard, relaxes=plan.settings.guard == "relax")
            for layer in layer_plans
            if layer.guard
        ],
        "beyond_evidence": beyond_evidence({layer.watch for layer in layer_plans if layer.watch is not None}),
    }


def beyond_evidence(watches: Collection[LossWatch]) -> dict[str, Any] | None:
    """A plain record of what is lost beyond what was measured, in the fields of `stats.BeyondEvidence`.

    Args:
        watches: Those of the rank, one for each group of layers that vLLM builds metadata for.
    """
    if not watches:
        return None
    return {
        "max_share": MAX_SHARE,
        "is_alarming": any(watch.is_alarming for watch in watches),
        "alarms": sum(watch.alarms for watch in watches),
        "layers": [
            {"layer": layer, "lost_mass_p99": watch.known[layer], "share": share}
            for watch in watches
            for layer, share in watch.shares.items()
        ],
    }


def promised_of(plan: Plan) -> dict[str, Any] | None:
    """A plain record of what is promised, in the fields of `stats.Promised`."""
    if plan.promised is None:
        return None
    promise = plan.promised.served
    return {
        "text": plan.promised.line,
        "max_loss": promise.max_loss,
        "max_kl": promise.max_kl,
        "max_length": promise.max_length,
        "change_percent": promise.worst.change_percent,
        "change_error": promise.worst.change_error,
        "kl_divergence": promise.worst.kl_divergence,
        "differences": list(plan.differences),
    }


def _calibrated_lengths(plan: Plan) -> tuple[int, int] | None:
    return None if plan.thresholds is None or plan.thresholds.is_relative else plan.thresholds.length_range


def _guard_state(layer: int, guard: LayerGuard, *, relaxes: bool) -> dict[str, Any]:
    lowered_by = guard.relaxation if relaxes else 0.0
    return {
        "layer": layer,
        "max_lost_mass": guard.bound,
        "share_above": guard.share_above,
        "alarms": guard.alarms,
        "lowered_by": None if math.isinf(lowered_by) else lowered_by,
    }


def _element_bytes(config: Any) -> int:
    """Bytes of a cached element."""
    name = config.cache_config.cache_dtype
    if name in FLOAT8_CACHE_DTYPES:
        return 1
    return config.model_config.dtype.itemsize if name == "auto" else getattr(torch, name).itemsize
