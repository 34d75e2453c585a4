"""Scores of causal attention, and the shapes in which the query heads of a kv head share its keys and values."""

import torch
from torch import Tensor

__all__ = ["causal_scores", "group_counts", "group_rows", "row_lengths", "ungroup_rows"]


def causal_scores(query: Tensor, key: Tensor, *, softmax_scale: float, logits_soft_cap: float | None = None) -> Tensor:
    """Returns the scores s_j = softmax_scale * q . k_j, soft-capped to cap * tanh(s_j / cap) if a cap is given.

    Args:
        query: `[num_queries, num_heads, head_size]` float, the last `num_queries` positions.
        key: `[seq_len, num_kv_heads, head_size]` float.
        softmax_scale: factor on the products.
        logits_soft_cap: cap, scaled logits, positive; None for a model without one.

    Returns:
        `[num_queries, num_heads, seq_len]` float32 or float64, scaled logits, minus infinity at the keys that come
        after the query.

    Raises:
        ValueError: the shapes do not fit each other, or `logits_soft_cap` is not positive.
    """
    num_queries, num_heads, head_size = query.shape
    seq_len, num_kv_heads, _ = key.shape
    if not 1 <= num_queries <= seq_len:
        raise ValueError(f"query: {num_queries} queries are not the last of {seq_len} positions")
    if num_heads % num_kv_heads:
        raise ValueError(f"query: {num_heads} query heads do not share {num_kv_heads} kv heads evenly")
    if key.shape[2] != head_size:
        raise ValueError(f"key: head_size is {key.shape[2]}, that of query is {head_size}")
    if logits_soft_cap is not None and logits_soft_cap <= 0:
        raise ValueError(f"logits_soft_cap: must be positive, got {logits_soft_cap}")

    dtype = torch.promote_types(torch.result_type(query, key), torch.float32)
    # the heads of a group become rows of one product, so that keys are not repeated for them
    products = group_rows(query.to(dtype), num_kv_heads) @ key.to(dtype).permute(1, 2, 0)
    scores = ungroup_rows(products, num_heads) * softmax_scale
    if logits_soft_cap is not None:
        scores = logits_soft_cap * torch.tanh(scores / logits_soft_cap)
    positions = torch.arange(seq_len, device=query.device)
    in_future = positions > positions[seq_len - num_queries :, None]
    return scores.masked_fill(in_future[:, None, :], -torch.inf)


def row_lengths(scores: Tensor) -> Tensor:
    """Keys seen by each query, `[num_queries]` int64, from scores `[num_queries, num_heads, seq_len]`."""
    num_queries, _, seq_len = scores.shape
    return torch.arange(seq_len - num_queries + 1, seq_len + 1, device=scores.device)


def group_rows(rows: Tensor, num_kv_heads: int) -> Tensor:
    """`[num_queries, num_heads, x]` to `[num_kv_heads, num_queries_per_kv * num_queries, x]`."""
    return rows.transpose(0, 1).reshape(num_kv_heads, -1, rows.shape[-1])


def ungroup_rows(rows: Tensor, num_heads: int) -> Tensor:
    """The inverse of `group_rows`."""
    return rows.reshape(num_heads, -1, rows.shape[-1]).transpose(0, 1)


def group_counts(keys: Tensor, num_kv_heads: int) -> Tensor:
    """Keys `[num_queries, num_heads, seq_len]` that any head of a group has, `[num_queries, num_kv_heads]` int64."""
    of_groups: Tensor = keys.unflatten(1, (num_kv_heads, -1)).any(dim=2)
    return of_groups.sum(dim=-1)
