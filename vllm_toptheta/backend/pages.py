"""Room for the page tails in vLLM's KV cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vllm.v1.kv_cache_interface import AttentionSpec, MLAAttentionSpec

from vllm_toptheta.kernels.pages import padded_page_bytes


def with_tail(spec: AttentionSpec) -> Any:
    """`spec` with pages long enough for a tail; vLLM sizes, allocates and accounts for them.

    Windowed layers get the same page, although they need no tail, because vLLM wants pages of one size in a model.
    """
    if isinstance(spec, MLAAttentionSpec) or spec.page_size_padded is not None:
        return spec
    page_bytes = padded_page_bytes(spec.unpadded_page_size_bytes, spec.num_kv_heads, spec.head_size)
    return replace(spec, page_size_padded=page_bytes)
