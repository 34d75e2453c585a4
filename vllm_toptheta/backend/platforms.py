"""vLLM's CPU platform knows one attention backend; these two hooks let it choose ours, or refuse.

Out-of-tree backends have no hook of their own there, hence the two wrapped class methods. Both keep the signature that
they have had since vLLM 0.26, and leave every other backend alone.
"""

from __future__ import annotations

from typing import Any

from vllm_toptheta.backend import gates
from vllm_toptheta.backend.plan import Plan


def install(platform: type[Any]) -> None:
    """Wrap the class methods of vLLM's `CpuPlatform`; called once per process."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    toptheta = AttentionBackendEnum["TOPTHETA"]
    get_attn_backend_cls = platform.get_attn_backend_cls
    check_and_update_config = platform.check_and_update_config

    def select(selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None) -> str:
        if selected_backend is not toptheta:
            return get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)
        gates.check_layer(attn_selector_config)
        return toptheta.get_path()

    def check(vllm_config: Any) -> None:
        check_and_update_config(vllm_config)
        # refused here, a mistake is reported in seconds, before any process is started or weight is read
        if gates.is_selected(vllm_config, toptheta):
            gates.check_engine(vllm_config)
            Plan.resolve(vllm_config)

    platform.get_attn_backend_cls = staticmethod(select)
    platform.check_and_update_config = staticmethod(check)
