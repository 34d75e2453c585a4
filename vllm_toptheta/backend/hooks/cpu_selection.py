"""Has vLLM's CPU platform choose our backend.

Replaces `CpuPlatform.get_attn_backend_cls` (0.26 to 0.33), which knows one backend for each kind of attention, takes no
other, and does not ask one what it supports. Every other backend is left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_toptheta.backend import support_checks
from vllm_toptheta.backend.capabilities import NAME
from vllm_toptheta.backend.hooks.patch import replace


def install() -> None:
    """Let CPUs be served; does nothing on other platforms."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        replace(type(current_platform), "get_attn_backend_cls", _selecting)


def _selecting(get_attn_backend_cls: Callable[..., str]) -> Callable[..., str]:
    def select(selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None) -> str:
        if getattr(selected_backend, "name", None) != NAME:
            return get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)
        support_checks.check_layer(selected_backend.get_class(), attn_selector_config)
        return str(selected_backend.get_path())

    return select
