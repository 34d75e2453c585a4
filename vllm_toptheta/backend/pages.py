"""Room for the page tails in vLLM's KV cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vllm.v1.kv_cache_interface import AttentionSpec, MLAAttentionSpec

from vllm_toptheta.kernels.pages import padded_page_bytes


def with_tail(spec: AttentionSpec, *, code_bytes: int = 0) -> Any:
    """`spec` with pages long enough for a tail; vLLM sizes, allocates and accounts for them.

    Windowed and dense layers get the same page, although they need no tail, because vLLM wants pages of one size in a
    model.

    Args:
        spec: A layer's pages as vLLM makes them; those that have a tail already are left alone.
        code_bytes: Bytes of a token's shadow key or copies in each kv head; 0 without.
    """
    if isinstance(spec, MLAAttentionSpec) or spec.page_size_padded is not None:
        return spec
    return replace(spec, page_size_padded=_page_bytes(spec, code_bytes))


def more_memory(spec: AttentionSpec, code_bytes: int) -> float:
    """By how much shadow keys or copies lengthen a layer's pages, as a share."""
    return _page_bytes(spec, code_bytes) / _page_bytes(spec, 0) - 1


def _page_bytes(spec: AttentionSpec, code_bytes: int) -> int:
    page_codes = spec.num_kv_heads * spec.block_size * code_bytes
    return padded_page_bytes(spec.unpadded_page_size_bytes, spec.num_kv_heads, spec.head_size, code_bytes=page_codes)
