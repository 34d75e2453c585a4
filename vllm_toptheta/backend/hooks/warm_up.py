"""Has GPU workers zero the counters when they have warmed up.

Replaces `Worker.compile_or_warm_up_model` (0.26 to 0.33). Warm-up and graph capture decode tokens of requests that
nobody made, and tell no backend when they are done.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_toptheta.backend.hooks.patch import replace
from vllm_toptheta.backend.layers import our_impls


def install() -> None:
    """Forget what warming up counted; called in a worker's process, before it does."""
    from vllm.v1.worker.gpu_worker import Worker

    replace(Worker, "compile_or_warm_up_model", _forgetting)


def _forgetting(warm_up: Callable[..., Any]) -> Callable[..., Any]:
    def warm_up_and_forget(worker: Any) -> Any:
        result = warm_up(worker)
        for impl in our_impls(worker.vllm_config):
            if impl.layer_plan:
                impl.layer_plan.counters.zero_()
        return result

    return warm_up_and_forget
