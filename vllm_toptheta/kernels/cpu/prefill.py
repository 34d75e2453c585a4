"""Dense attention of a prompt's tokens over the paged KV cache in torch operations, for CPUs.

The cache is laid out as `cpu.cache` says; the chunk's own keys and values are in it already.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from vllm_toptheta.kernels.cpu.cache import split_cache


def prefill(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    *,
    seq_len: int,
    softmax_scale: float,
    logits_soft_cap: float | None = None,
    sliding_window: int | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Dense causal attention of a chunk of one sequence's tokens, the last ones cached.

    Args:
        query: [num_tokens, num_heads, head_size].
        kv_cache: See the head of `cpu.cache`.
        block_table: [max_blocks] integer, the sequence's blocks.
        seq_len: Cached tokens, the chunk included.
        softmax_scale: Factor on q . k.
        logits_soft_cap: Cap c of c * tanh(s / c), or None.
        sliding_window: Number of most recent keys that are seen, or None for all.
        sinks: As of `Layer`.

    Returns:
        [num_tokens, num_heads, head_size] in the query's dtype.
    """
    num_tokens, num_heads, head_size = query.shape
    num_kv_heads = kv_cache.shape[1]
    key, value = (cached.to(query.dtype) for cached in _cached(kv_cache, block_table, seq_len))
    queries = query.transpose(0, 1)
    is_plain = logits_soft_cap is None and sinks is None
    if num_tokens == seq_len and sliding_window is None and is_plain:
        return _scaled_dot_product(queries, key, value, softmax_scale, is_causal=True)
    row = torch.arange(seq_len - num_tokens, seq_len)[:, None]
    column = torch.arange(seq_len)
    visible = column <= row
    if sliding_window is not None:
        visible &= column > row - sliding_window
    if is_plain:
        return _scaled_dot_product(queries, key, value, softmax_scale, attn_mask=visible)
    grouped = queries.reshape(num_kv_heads, -1, head_size)
    scores = torch.matmul(grouped.float(), key.float().transpose(1, 2)).view(num_heads, num_tokens, seq_len)
    if logits_soft_cap is None:
        scores *= softmax_scale
    else:
        scores = logits_soft_cap * torch.tanh(scores * (softmax_scale / logits_soft_cap))
    weights = scores.masked_fill_(~visible, -torch.inf).softmax(dim=2)
    if sinks is not None:
        # the share of the softmax that the sink leaves to the keys
        weights *= torch.sigmoid(scores.logsumexp(dim=2) - sinks.float()[:, None])[..., None]
    output = torch.matmul(weights.view(num_kv_heads, -1, seq_len), value.float()).view(queries.shape)
    return output.transpose(0, 1).to(query.dtype)


def _scaled_dot_product(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, softmax_scale: float, **mask: Any
) -> torch.Tensor:
    """torch's attention of [num_heads, num_tokens, head_size] queries, as [num_tokens, num_heads, head_size]."""
    output = F.scaled_dot_product_attention(
        query[None], key[None], value[None], scale=softmax_scale, enable_gqa=len(query) != len(key), **mask
    )
    return output[0].transpose(0, 1)


def _cached(kv_cache: torch.Tensor, block_table: torch.Tensor, seq_len: int) -> tuple[torch.Tensor, ...]:
    """Keys and values of a sequence, [num_kv_heads, seq_len, head_size] each."""
    _, num_kv_heads, block_size, width = kv_cache.shape
    blocks = block_table[: -(-seq_len // block_size)].long()
    return tuple(
        cache.index_select(0, blocks).transpose(0, 1).reshape(num_kv_heads, -1, width // 2)[:, :seq_len]
        for cache in split_cache(kv_cache)
    )
