"""Adds `TOPTHETA` to vLLM's `AttentionBackendEnum`, and lets that member pickle.

vLLM parses `--attention-backend` by this enum. From 0.27 on `register_backend` adds a name; 0.26 takes members only, so
there one is made by hand. A spawned process unpickles its configuration before it loads plugins, and in all versions
(0.26 to 0.33) members pickle by a value that it does not know yet; hence a reducer of our own.
"""

from __future__ import annotations

import copyreg
from typing import TYPE_CHECKING, Any

from vllm_toptheta.backend.capabilities import NAME

if TYPE_CHECKING:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

CPU_BACKEND = "vllm_toptheta.backend.cpu.CpuTopThetaBackend"
GPU_BACKEND = "vllm_toptheta.backend.gpu.GpuTopThetaBackend"


def install() -> None:
    """Make `--attention-backend toptheta` known to this process, with the current platform's class."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if NAME in AttentionBackendEnum.__members__:
        return
    class_path = CPU_BACKEND if current_platform.is_cpu() else GPU_BACKEND
    if hasattr(AttentionBackendEnum, "register"):
        register_backend(NAME, class_path)
    else:
        register_backend(_new_member(AttentionBackendEnum, class_path), class_path)
    copyreg.pickle(AttentionBackendEnum, _reduce)


def _new_member(enum: Any, value: str) -> Any:
    """What later versions do in `AttentionBackendEnum.register`: an enum member made after its class."""
    member = object.__new__(enum)
    member._name_, member._value_ = NAME, value
    setattr(enum, NAME, member)
    enum._member_map_[NAME] = member
    enum._value2member_map_[value] = member
    enum._member_names_.append(NAME)
    return member


def _reduce(member: AttentionBackendEnum) -> tuple[Any, ...]:
    """Pickle our member by name, and the others as ever."""
    if member.name == NAME:
        return _restore, (member.name,)
    return type(member), (member.value,)


def _restore(name: str) -> AttentionBackendEnum:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    install()
    return AttentionBackendEnum[name]
