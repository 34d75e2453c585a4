"""What vLLM's workers gain: a method by which the API server asks for statistics, and counters that start at zero."""

from __future__ import annotations

from typing import Any

from vllm_toptheta.backend.compat import NAME
from vllm_toptheta.telemetry.endpoint import STATS_RPC


def install() -> None:
    """Add the method to vLLM's worker base class; `collective_rpc` finds it by name on every rank."""
    from vllm.v1.worker.worker_base import WorkerBase

    setattr(WorkerBase, STATS_RPC, _stats)


def forget_warm_up() -> None:
    """Have GPU workers zero the counters when they have warmed up; called in their process, before they do.

    Warm-up and graph capture decode tokens of requests that nobody made.
    """
    from vllm.v1.worker.gpu_worker import Worker

    warm_up = Worker.compile_or_warm_up_model
    if warm_up.__module__ == __name__:
        return

    def warm_up_and_forget(worker: Any) -> Any:
        result = warm_up(worker)
        for impl in _impls(worker):
            if impl.layer_plan:
                impl.layer_plan.counters.zero_()
        return result

    Worker.compile_or_warm_up_model = warm_up_and_forget


def _stats(worker: Any) -> dict[str, Any] | None:
    """This rank's report in the fields of `telemetry.stats.RankStats`, or None without a TOPTHETA layer."""
    impls = _impls(worker)
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


def _impls(worker: Any) -> list[Any]:
    """The implementations of this rank's TOPTHETA layers."""
    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    return [layer.impl for layer in layers if getattr(layer, "backend", None) and layer.backend.name == NAME]
