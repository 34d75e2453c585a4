"""Adds the method to vLLM's workers by which the API server asks for statistics.

`collective_rpc` finds a method of `WorkerBase` (0.26 to 0.33) by its name on every rank. The public way is a flag,
`--worker-extension-cls`, which takes one class, and which every user would have to give.
"""

from __future__ import annotations

from typing import Any

from vllm_toptheta.backend.hooks import sleep
from vllm_toptheta.backend.rank_report import rank_report
from vllm_toptheta.telemetry.reader import STATS_RPC


def install() -> None:
    """Add the method to all workers."""
    from vllm.v1.worker.worker_base import WorkerBase

    setattr(WorkerBase, STATS_RPC, _stats)


def _stats(worker: Any) -> dict[str, Any] | None:
    return sleep.last_report(worker) or rank_report(worker.vllm_config)
