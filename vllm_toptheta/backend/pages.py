"""Room for the page tails in vLLM's KV cache: behind each page, or in rows of it where vLLM splits pages."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from math import gcd
from typing import Any

from vllm.v1.kv_cache_interface import AttentionSpec, MLAAttentionSpec

from vllm_toptheta.kernels.pages import padded_page_bytes
from vllm_toptheta.limits import MAX_SPLIT_TOKENS


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


def with_tail_rows(spec: AttentionSpec) -> Any:
    """`spec` with a row of value sums behind every few tokens, so that vLLM can split its pages into as many.

    For pages as long as the states of other layers, which kernels that take a page at once do not take whole. There are
    such specs since vLLM 0.32; in two bytes a number, a row of keys and values is as long as the sums.

    Args:
        spec: A layer's pages as vLLM makes them, of a multiple of 16 tokens.
    """
    tokens = gcd(spec.block_size, MAX_SPLIT_TOKENS)
    return replace(spec, tokens_per_state=Fraction(tokens, tokens + 1))


def tokens_of_row(spec: Any) -> int | None:
    """Tokens in front of each row of `with_tail_rows`; None of other pages.

    Args:
        spec: Of pages, whole or split; None where vLLM asks before there are any.
    """
    ratio = getattr(spec, "tokens_per_state", 1)
    return ratio.numerator if isinstance(ratio, Fraction) else None


def more_memory(spec: AttentionSpec, code_bytes: int) -> float:
    """By how much shadow keys or copies lengthen a layer's pages, as a share."""
    return _page_bytes(spec, code_bytes) / _page_bytes(spec, 0) - 1


def _page_bytes(spec: AttentionSpec, code_bytes: int) -> int:
    page_codes = spec.num_kv_heads * spec.block_size * code_bytes
    return padded_page_bytes(spec.unpadded_page_size_bytes, spec.num_kv_heads, spec.head_size, code_bytes=page_codes)
