"""Has our layers ask vLLM for longer pages, with a tail for value sums and shadow keys or copies.

Replaces `Attention.get_kv_cache_spec` (0.26 to 0.33), which vLLM asks with the configuration, on which the length of a
tail depends. The public `AttentionBackend.customize_spec` came with 0.27 and is not told the configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_toptheta.backend import support_checks
from vllm_toptheta.backend.capabilities import NAME
from vllm_toptheta.backend.hooks.patch import replace
from vllm_toptheta.backend.pages import with_tail, with_tail_rows
from vllm_toptheta.backend.plan import Plan
from vllm_toptheta.support import mixed_field


def install() -> None:
    """Pad our layers' pages; called where layers are built, before vLLM asks what pages they need."""
    from vllm.model_executor.layers.attention import Attention

    replace(Attention, "get_kv_cache_spec", _padding)


def _padding(get_kv_cache_spec: Callable[..., Any]) -> Callable[..., Any]:
    # of the last configuration; a model asks once for every layer
    known: list[tuple[Any, int, bool]] = []

    def get_padded_spec(layer: Any, vllm_config: Any) -> Any:
        spec = get_kv_cache_spec(layer, vllm_config)
        if spec is None or layer.attn_backend.get_name() != NAME:
            return spec
        support_checks.check_no_draft(layer, vllm_config)
        if _splits(vllm_config):
            return with_tail_rows(spec)
        if not known or known[0][0] is not vllm_config:
            is_mixed = mixed_field(vllm_config.model_config.hf_text_config.to_dict()) is not None
            known[:] = [(vllm_config, Plan.code_bytes_of(vllm_config), is_mixed)]
        _, code_bytes, is_mixed = known[0]
        if is_mixed and getattr(spec, "sliding_window", None) is not None:
            # tails would not make pages of two kinds of heads as long as each other; vLLM pads the shorter ones
            return spec
        return with_tail(spec, code_bytes=code_bytes)

    return get_padded_spec


def _splits(vllm_config: Any) -> bool:
    """Whether pages get rows of sums: where they are too long for kernels to take whole, or connectors copy them.

    vLLM's runner for CPUs splits no page, nor need ours it to, and tails are made again there of what connectors bring.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return False
    return bool(vllm_config.model_config.is_hybrid) or vllm_config.kv_transfer_config is not None
