"""Registration with vLLM (entry point group `vllm.general_plugins`).

vLLM calls `register` once in every process: the API server before it parses its flags, the engine, each worker. It must
therefore be cheap, idempotent, and free of anything that needs a device.
"""

from __future__ import annotations

CPU_BACKEND = "vllm_toptheta.backend.cpu.CpuTopThetaBackend"
GPU_BACKEND = "vllm_toptheta.backend.gpu.GpuTopThetaBackend"


def register() -> None:
    """Make `--attention-backend toptheta` known to this process."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from vllm_toptheta.backend import compat, platforms, worker

    if compat.NAME in AttentionBackendEnum.__members__:
        return
    compat.register_name(CPU_BACKEND if current_platform.is_cpu() else GPU_BACKEND)
    platforms.install(type(current_platform))
    worker.install()
