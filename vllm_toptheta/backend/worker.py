"""The method that vLLM's workers gain, so that the API server can ask them for statistics."""

from __future__ import annotations

from typing import Any

from vllm_toptheta.telemetry.endpoint import STATS_RPC


def install() -> None:
    """Add the method to vLLM's worker base class; `collective_rpc` finds it by name on every rank."""
    from vllm.v1.worker.worker_base import WorkerBase

    setattr(WorkerBase, STATS_RPC, _stats)


def _stats(worker: Any) -> dict[str, Any] | None:
    """This rank's report in the fields of `telemetry.stats.RankStats`, or None without a TOPTHETA layer."""
    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    impls = [layer.impl for layer in layers if getattr(layer, "backend", None) and layer.backend.name == "TOPTHETA"]
    plans = [impl.plan for impl in impls if impl.plan is not None]
    if not plans:
        return None
    plan = plans[0]
    return {
        "mode": plan.settings.mode,
        "target_k": plan.settings.target_k,
        "thresholds": plan.model_id,
        "dense_layers": sorted(plan.dense_layers),
        "layers": [record for impl in impls if impl.layer_plan for record in impl.layer_plan.counters.snapshot()],
    }
