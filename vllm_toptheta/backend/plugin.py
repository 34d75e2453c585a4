"""Registration with vLLM (entry point group `vllm.general_plugins`).

vLLM calls `register` once in every process: the API server before it parses its flags, the engine, each worker. It must
therefore be cheap, idempotent, and free of anything that needs a device. What is changed only where our layers run is
installed by the backends.
"""

from __future__ import annotations


def register() -> None:
    """Make `--attention-backend toptheta` known to this process."""
    from vllm_toptheta.backend.hooks import (
        backend_name,
        config_check,
        cpu_selection,
        draft_length,
        lossy_cache,
        self_drafts,
        worker_stats,
    )

    for hook in (backend_name, config_check, cpu_selection, draft_length, lossy_cache, self_drafts, worker_stats):
        hook.install()
