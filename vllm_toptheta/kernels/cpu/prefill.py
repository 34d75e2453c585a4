"""Attention of a prompt's tokens over the paged KV cache in torch operations, for CPUs: dense, or by thresholds.

The cache is laid out as `cpu.cache` says; the chunk's own keys and values are in it already.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from vllm_toptheta.kernels.cpu.cache import split_cache

BLOCK_BYTES = 16 << 20  # that the scores of a block of rows may take


def prefill(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    *,
    seq_len: int,
    softmax_scale: float,
    logits_soft_cap: float | None = None,
    sliding_window: int | None = None,
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

    Returns:
        [num_tokens, num_heads, head_size] in the query's dtype.
    """
    num_tokens, num_heads, head_size = query.shape
    num_kv_heads = kv_cache.shape[1]
    key, value = (cached.to(query.dtype) for cached in _cached(kv_cache, block_table, seq_len))
    queries = query.transpose(0, 1)
    if num_tokens == seq_len and sliding_window is None and logits_soft_cap is None:
        return _scaled_dot_product(queries, key, value, softmax_scale, is_causal=True)
    row = torch.arange(seq_len - num_tokens, seq_len)[:, None]
    column = torch.arange(seq_len)
    visible = column <= row
    if sliding_window is not None:
        visible &= column > row - sliding_window
    if logits_soft_cap is None:
        return _scaled_dot_product(queries, key, value, softmax_scale, attn_mask=visible)
    grouped = queries.reshape(num_kv_heads, -1, head_size)
    scores = torch.matmul(grouped.float(), key.float().transpose(1, 2)).view(num_heads, num_tokens, seq_len)
    scores = logits_soft_cap * torch.tanh(scores * (softmax_scale / logits_soft_cap))
    weights = scores.masked_fill_(~visible, -torch.inf).softmax(dim=2)
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


def sparse_prefill(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    *,
    seq_len: int,
    threshold: torch.Tensor,
    softmax_scale: float,
    logits_soft_cap: float | None = None,
    denominator_compensation: bool = True,
    value_mean_compensation: bool = True,
) -> torch.Tensor:
    """Causal Top-Theta attention of a chunk of one sequence's tokens, the last ones cached.

    Every row is what `values.decode` would make of it: the token's scores against its own threshold.

    Args:
        query: [num_tokens, num_heads, head_size].
        kv_cache: See the head of `cpu.cache`.
        block_table: [max_blocks] integer, the sequence's blocks.
        seq_len: Cached tokens, the chunk included.
        threshold: [num_tokens, num_heads] float32, scaled logits; minus infinity keeps every key.
        softmax_scale: Factor on q . k.
        logits_soft_cap: Cap c of c * tanh(s / c), or None.
        denominator_compensation: Sum the softmax denominator over all keys instead of the survivors.
        value_mean_compensation: Give the lost mass to the mean of the values that a row sees.

    Returns:
        [num_tokens, num_heads, head_size] float32.
    """
    num_tokens, num_heads, head_size = query.shape
    num_kv_heads = kv_cache.shape[1]
    key, value = (cached.float() for cached in _cached(kv_cache, block_table, seq_len))
    queries = (query.float() * softmax_scale).transpose(0, 1).unflatten(0, (num_kv_heads, -1))
    thetas = threshold.T.unflatten(0, (num_kv_heads, -1))[..., None]
    context = seq_len - num_tokens
    lengths = torch.arange(context + 1, seq_len + 1)
    mean = value.cumsum(dim=1)[:, None, context:] / lengths[:, None] if value_mean_compensation else None
    output = torch.empty_like(queries)
    rows_at_once = max(1, BLOCK_BYTES // (4 * num_heads * seq_len))
    for start in range(0, num_tokens, rows_at_once):
        rows = slice(start, min(start + rows_at_once, num_tokens))
        longest = context + rows.stop
        scores = torch.matmul(queries[:, :, rows].flatten(1, 2), key[:, :longest].transpose(1, 2))
        scores = scores.view(num_kv_heads, -1, rows.stop - rows.start, longest)
        if logits_soft_cap is not None:
            scores = logits_soft_cap * torch.tanh(scores / logits_soft_cap)
        scores.masked_fill_(torch.arange(longest) >= lengths[rows, None], -torch.inf)
        # a masked score never reaches a threshold: minus infinity minus minus infinity is NaN, which compares false
        survives = scores - thetas[:, :, rows] >= 0
        numerators = (scores - scores.amax(dim=-1, keepdim=True)).exp()
        total = numerators.sum(dim=-1, keepdim=True)
        kept = numerators.where(survives, 0.0)
        kept_sum = kept.sum(dim=-1, keepdim=True)
        denominator = total if denominator_compensation else kept_sum.clamp(min=torch.finfo(torch.float32).tiny)
        block = torch.matmul(kept.flatten(1, 2), value[:, :longest]).view(*kept.shape[:3], head_size) / denominator
        if mean is not None:
            # without the exact denominator nothing is known to be lost, unless no key survived at all
            known_lost = (total - kept_sum) / total if denominator_compensation else (kept_sum == 0).float()
            block += known_lost * mean[:, :, rows]
        output[:, :, rows] = block
    return output.flatten(0, 1).transpose(0, 1)


def _cached(kv_cache: torch.Tensor, block_table: torch.Tensor, seq_len: int) -> tuple[torch.Tensor, ...]:
    """Keys and values of a sequence, [num_kv_heads, seq_len, head_size] each."""
    _, num_kv_heads, block_size, width = kv_cache.shape
    blocks = block_table[: -(-seq_len // block_size)].long()
    return tuple(
        cache.index_select(0, blocks).transpose(0, 1).reshape(num_kv_heads, -1, width // 2)[:, :seq_len]
        for cache in split_cache(kv_cache)
    )
