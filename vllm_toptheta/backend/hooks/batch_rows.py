"""Has vLLM's model runners tell which request stands in which row of a batch.

Replaces `GPUModelRunner._prepare_inputs` of the V1 runner, from which that of CPUs derives, or `prepare_inputs` of the
V2 runner (both in 0.26 to 0.33), which run before the metadata of every step is built. Metadata names no requests.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from vllm_toptheta.backend.hooks.patch import replace
from vllm_toptheta.backend.layers import our_impls
from vllm_toptheta.errors import UnsupportedError

_REQUESTS = "toptheta_requests"  # of a runner: its `RequestOffsets`, or None


def install(vllm_config: Any) -> None:
    """Follow the batches of the engine's model runner; called in a worker.

    Args:
        vllm_config: Says which of the runners it is.

    Raises:
        UnsupportedError: The runner does not have the method that is looked for.
    """
    if vllm_config.use_v2_model_runner:
        module, method, requests_and_rows = "vllm.v1.worker.gpu.model_runner", "prepare_inputs", _v2_requests_and_rows
    else:
        module, method, requests_and_rows = "vllm.v1.worker.gpu_model_runner", "_prepare_inputs", _v1_requests_and_rows
    runner_class = importlib.import_module(module).GPUModelRunner
    if not hasattr(runner_class, method):
        raise UnsupportedError(
            f"{module} does not tell which request stands in which row of a batch",
            field="per_request",
            remedy="Set it to false",
        )

    def following(prepare: Callable[..., Any]) -> Callable[..., Any]:
        def prepare_and_follow(runner: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            inputs = prepare(runner, scheduler_output, *args, **kwargs)
            requests = _requests_of(runner)
            if requests is not None:
                resumed = scheduler_output.scheduled_cached_reqs.resumed_req_ids
                requests.step(scheduler_output.scheduled_new_reqs, *requests_and_rows(runner, inputs), resumed)
            return inputs

        return prepare_and_follow

    replace(runner_class, method, following)


def _requests_of(runner: Any) -> Any:
    if not hasattr(runner, _REQUESTS):
        found = (impl.requests for impl in our_impls(runner.vllm_config) if impl.requests is not None)
        setattr(runner, _REQUESTS, next(found, None))
    return getattr(runner, _REQUESTS)


def _v1_requests_and_rows(runner: Any, inputs: Any) -> tuple[Any, Any]:
    return runner.requests, runner.input_batch.req_ids


def _v2_requests_and_rows(runner: Any, inputs: Any) -> tuple[Any, Any]:
    return runner.req_states.req_id_to_index, inputs.req_ids
