"""Has vLLM's platforms check our options and the engine's when a configuration is made.

Replaces `Platform.check_and_update_config` (0.26 to 0.33), which every platform is asked before any process is started
or weight is read: a mistake is reported in seconds. Backends that are not vLLM's own are asked only layer by layer,
when a worker builds the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_toptheta.backend import support_checks
from vllm_toptheta.backend.hooks import request_validation
from vllm_toptheta.backend.hooks.patch import replace
from vllm_toptheta.backend.plan import Plan


def install() -> None:
    """Check configurations that select our backend, and from then on what requests ask for."""
    from vllm.platforms import current_platform

    replace(type(current_platform), "check_and_update_config", _checking)


def _checking(check_and_update_config: Callable[..., Any]) -> Callable[..., Any]:
    def check(vllm_config: Any) -> None:
        check_and_update_config(vllm_config)
        if support_checks.is_selected(vllm_config):
            support_checks.check_engine(vllm_config)
            plan = Plan.resolve(vllm_config)
            support_checks.check_plan(plan, vllm_config)
            _leave_drafts_alone(vllm_config)
            request_validation.install()

    return check


def _leave_drafts_alone(vllm_config: Any) -> None:
    """Have layers that draft attend by vLLM's own backend: its V2 runner gives them the served model's by itself."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if current_platform.is_cpu():
        return
    draft = support_checks.draft_of(vllm_config)
    if draft is not None and draft.is_by_model and draft.backend is None:
        vllm_config.speculative_config.attention_backend = AttentionBackendEnum.FLASH_ATTN
