"""What vLLM's workers gain.

A method by which the API server asks for statistics, counters that start at zero, and an eye on who stands in which row
of the batch.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from vllm_toptheta.backend.compat import NAME, follow_batches
from vllm_toptheta.backend.guard import LayerGuard
from vllm_toptheta.backend.plan import Plan
from vllm_toptheta.backend.requests import RequestLevels
from vllm_toptheta.backend.support_checks import FLOAT8_CACHE_DTYPES
from vllm_toptheta.telemetry.reader import STATS_RPC

_REQUESTS = "toptheta_requests"  # a runner's `RequestLevels`


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
        for impl in _impls(worker.vllm_config):
            if impl.layer_plan:
                impl.layer_plan.counters.zero_()
        return result

    Worker.compile_or_warm_up_model = warm_up_and_forget


def request_levels(
    plan: Plan, vllm_config: Any, max_num_rows: int, device: torch.device | str = "cpu"
) -> RequestLevels:
    """What the requests of this rank ask for, the same for all of its layers; the first call makes it.

    Raises:
        UnsupportedError: The model runner does not tell which request stands in which row of a batch.
    """
    for impl in _impls(vllm_config):
        if impl.requests is not None:
            return impl.requests
    if plan.levels.refusal is None:
        follow_batches(vllm_config, _follow)
    return RequestLevels(plan.levels, max_num_rows, device)


def _follow(runner: Any, new_requests: Any, running: Any, req_ids: Any) -> None:
    if not hasattr(runner, _REQUESTS):
        found = (impl.requests for impl in _impls(runner.vllm_config) if impl.requests is not None)
        setattr(runner, _REQUESTS, next(found, None))
    requests = getattr(runner, _REQUESTS)
    if requests is not None:
        requests.step(new_requests, running, req_ids)


def _stats(worker: Any) -> dict[str, Any] | None:
    """This rank's report in the fields of `telemetry.stats.RankStats`, or None without a TOPTHETA layer."""
    impls = _impls(worker.vllm_config)
    plan = next((impl.plan for impl in impls if impl.plan is not None), None)
    if plan is None:
        return None
    counters = [impl.layer_plan.counters for impl in impls if impl.layer_plan]
    layers = [record for layer in counters for record in layer.heads()]
    # every layer decodes every token
    totals = counters[0].totals.tolist() if counters else [0] * 5
    decode_tokens, dense_tokens, _, decode_steps, asked_tokens = totals
    requests = next(impl.requests for impl in impls if impl.plan is not None)
    return {
        "mode": plan.settings.mode,
        "guard": plan.guard_state,
        "target": plan.curve and plan.curve.label,
        "compensation": plan.settings.compensation,
        "min_context": plan.min_sparse_context,
        "levels": plan.levels.labels,
        "thresholds": plan.model_id,
        "calibrated_lengths": plan.curve and (plan.curve.min_length, plan.curve.max_length),
        "num_layers": plan.architecture.num_layers,
        "num_kv_heads": plan.architecture.num_kv_heads,
        "value_row_bytes": plan.architecture.head_size * _element_bytes(worker.vllm_config),
        "decode_steps": decode_steps,
        "decode_tokens": decode_tokens,
        "dense_tokens": dense_tokens,
        "asked_tokens": asked_tokens,
        "requests": dict(requests.counts),
        "layers": layers,
        "lost_mass": [layer.histogram() for layer in counters],
        "guarded": [
            _guard_state(impl.layer_plan.counters.layer, impl.layer_plan.guard, relaxes=plan.settings.guard == "relax")
            for impl in impls
            if impl.layer_plan and impl.layer_plan.guard
        ],
    }


def _guard_state(layer: int, guard: LayerGuard, *, relaxes: bool) -> dict[str, Any]:
    lowered_by = guard.relaxation if relaxes else 0.0
    return {
        "layer": layer,
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


def _impls(vllm_config: Any) -> list[Any]:
    """The implementations of this rank's TOPTHETA layers."""
    layers = vllm_config.compilation_config.static_forward_context.values()
    return [layer.impl for layer in layers if getattr(layer, "backend", None) and layer.backend.name == NAME]
