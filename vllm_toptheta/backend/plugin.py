"""Registration with vLLM (entry point group `vllm.general_plugins`).

vLLM calls `register` once in every process: the API server before it parses its flags, the engine, each worker. It must
therefore be cheap, idempotent, and free of anything that needs a device.
"""

from __future__ import annotations

import copyreg
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

NAME = "TOPTHETA"
CPU_BACKEND = "vllm_toptheta.backend.cpu.CpuTopThetaBackend"


def register() -> None:
    """Make `--attention-backend toptheta` known to this process."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if NAME in AttentionBackendEnum.__members__:
        return
    if not current_platform.is_cpu():
        # the name stays unknown here, so vLLM's own error lists the backends there are
        return
    register_backend(NAME, CPU_BACKEND)
    copyreg.pickle(AttentionBackendEnum, _reduce)

    from vllm_toptheta.backend import cpu_platform, worker

    cpu_platform.install(type(current_platform))
    worker.install()


def _reduce(member: AttentionBackendEnum) -> tuple[Any, ...]:
    """Pickle our member by name.

    A spawned process unpickles its config before it loads plugins, and enum members pickle by a value that it does not
    know yet.
    """
    if member.name == NAME:
        return _restore, (member.name,)
    return type(member), (member.value,)


def _restore(name: str) -> AttentionBackendEnum:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    register()
    return AttentionBackendEnum[name]
