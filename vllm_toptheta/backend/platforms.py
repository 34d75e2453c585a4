"""The hooks into vLLM's platforms: an early check on all of them, and the choice of our backend on CPUs.

Out-of-tree backends have no hooks of their own there, hence the wrapped class methods. They keep the signatures that
they have had since vLLM 0.26, and leave every other backend alone.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from vllm_toptheta.backend import admission, support_checks
from vllm_toptheta.backend.compat import NAME
from vllm_toptheta.backend.plan import Plan


def install(platform: type[Any]) -> None:
    """Wrap the class methods of vLLM's current platform; called once per process."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    toptheta = AttentionBackendEnum[NAME]
    check_and_update_config = platform.check_and_update_config

    def check(vllm_config: Any) -> None:
        check_and_update_config(vllm_config)
        # refused here, a mistake is reported in seconds, before any process is started or weight is read
        if support_checks.is_selected(vllm_config, toptheta):
            support_checks.check_engine(vllm_config)
            plan = Plan.resolve(vllm_config)
            support_checks.check_settings(plan.settings, vllm_config)
            if plan.curve is not None:
                support_checks.check_kernels(plan.architecture)
            admission.install(partial(support_checks.is_selected, toptheta=toptheta))

    platform.check_and_update_config = staticmethod(check)
    if platform.device_type == "cpu":
        _install_selection(platform, toptheta)


def _install_selection(platform: type[Any], toptheta: Any) -> None:
    """vLLM's CPU platform knows one backend for each kind of attention and takes no other."""
    get_attn_backend_cls = platform.get_attn_backend_cls

    def select(selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None) -> str:
        if selected_backend is not toptheta:
            return get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)
        support_checks.check_layer(attn_selector_config)
        return toptheta.get_path()

    platform.get_attn_backend_cls = staticmethod(select)
