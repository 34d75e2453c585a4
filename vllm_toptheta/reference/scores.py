"""Scores of causal attention, and the shapes in which the query heads of a kv head share its keys and values."""

import torch
from torch import Tensor

__all__ = [
    "causal_scores",
    "count",
    "group_any",
    "group_counts",
    "group_rows",
    "kept",
    "mask_future",
    "row_lengths",
    "row_lse",
    "ungroup_rows",
]


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
    return mask_future(scores)


def mask_future(scores: Tensor) -> Tensor:
    """Sets scores `[num_queries, num_heads, seq_len]` to minus infinity, in place, where a key comes after the query.

    Only the positions of the queries themselves can.
    """
    num_queries, _, seq_len = scores.shape
    in_future = torch.ones(num_queries, num_queries, dtype=torch.bool, device=scores.device).triu(1)
    scores[..., seq_len - num_queries :].masked_fill_(in_future[:, None, :], -torch.inf)
    return scores


def row_lengths(scores: Tensor) -> Tensor:
    """Keys seen by each query, `[num_queries]` int64, from scores `[num_queries, num_heads, seq_len]`."""
    num_queries, _, seq_len = scores.shape
    return torch.arange(seq_len - num_queries + 1, seq_len + 1, device=scores.device)


def row_lse(scores: Tensor, sinks: Tensor | None = None) -> Tensor:
    """ln of the softmax denominator of every row, `[...]`, from scores `[..., seq_len]`.

    Attention sinks, float logits that broadcast to `[...]`, are one more term each; None for a model without.
    """
    lse = scores.logsumexp(dim=-1)
    return lse if sinks is None else torch.logaddexp(lse, sinks.to(lse.dtype))


def group_rows(rows: Tensor, num_kv_heads: int) -> Tensor:
    """`[num_queries, num_heads, x]` to `[num_kv_heads, num_queries_per_kv * num_queries, x]`."""
    return rows.transpose(0, 1).reshape(num_kv_heads, -1, rows.shape[-1])


def ungroup_rows(rows: Tensor, num_heads: int) -> Tensor:
    """The inverse of `group_rows`."""
    return rows.reshape(num_heads, -1, rows.shape[-1]).transpose(0, 1)


# On CPUs, torch's masked_fill, where, any and sum of booleans take 3 to 100 times as long as a product or a maximum.


def kept(values: Tensor, keys: Tensor) -> Tensor:
    """Finite `values` where `keys`, bool of the same shape, is true, and 0 elsewhere."""
    return values * keys.view(torch.uint8).to(values.dtype)


def count(keys: Tensor) -> Tensor:
    """How many of the last dimension of `keys`, bool, are true, int64."""
    return keys.view(torch.uint8).sum(dim=-1, dtype=torch.int32).long()


def group_any(keys: Tensor, num_kv_heads: int) -> Tensor:
    """Keys `[num_queries, num_heads, seq_len]` that any head of a group has, `[num_queries, num_kv_heads, seq_len]`."""
    of_groups: Tensor = keys.view(torch.uint8).unflatten(1, (num_kv_heads, -1)).amax(dim=2)
    return of_groups.view(torch.bool)


def group_counts(keys: Tensor, num_kv_heads: int) -> Tensor:
    """Keys `[num_queries, num_heads, seq_len]` that any head of a group has, `[num_queries, num_kv_heads]` int64."""
    return count(group_any(keys, num_kv_heads))
