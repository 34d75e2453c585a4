"""Has GPU workers say what they counted while their memory is away.

Replaces `Worker.sleep` and `Worker.wake_up` (0.26 to 0.33). Counters sleep with a worker's other state, and whoever
scrapes `/metrics` asks for them: reading memory that is not mapped ends the process. vLLM tells no backend.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_toptheta.backend.hooks.patch import replace
from vllm_toptheta.backend.rank_report import rank_report

_ASLEEP = "toptheta_report"  # of a worker that sleeps


def install() -> None:
    """Keep a worker's report while it sleeps; called in its process, before it does."""
    from vllm.v1.worker.gpu_worker import Worker

    replace(Worker, "sleep", _reporting)
    replace(Worker, "wake_up", _forgetting)


def last_report(worker: Any) -> dict[str, Any] | None:
    """What a worker that sleeps had counted when it fell asleep; None of one that is awake."""
    return getattr(worker, _ASLEEP, None)


def _reporting(sleep: Callable[..., Any]) -> Callable[..., Any]:
    def report_and_sleep(worker: Any, *args: Any, **kwargs: Any) -> Any:
        # of a worker that is put to sleep again, the memory is away already
        setattr(worker, _ASLEEP, last_report(worker) or rank_report(worker.vllm_config))
        return sleep(worker, *args, **kwargs)

    return report_and_sleep


def _forgetting(wake_up: Callable[..., Any]) -> Callable[..., Any]:
    def wake_up_and_forget(worker: Any, *args: Any, **kwargs: Any) -> Any:
        result = wake_up(worker, *args, **kwargs)
        # counters are among what comes back whatever else is asked for
        setattr(worker, _ASLEEP, None)
        return result

    return wake_up_and_forget
