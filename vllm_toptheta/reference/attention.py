"""Attention over contiguous keys and values: dense, exact top-k, and Top-Theta, in plain PyTorch.

This is the truth that kernels and backends are compared with. One path serves all three: dense attention is a
threshold of minus infinity, top-k is a threshold at the k-th largest score of each row.

Conventions, for one sequence: query `[num_queries, num_heads, head_size]`, key and value
`[seq_len, num_kv_heads, head_size]`, any float dtype, finite. The queries are the last `num_queries` positions, so
query i sees the n = seq_len - num_queries + i + 1 keys up to and including its own. Query head h reads kv head
h // (num_heads // num_kv_heads). Everything is computed in float32, or in float64 where the inputs are float64.

Memory grows with num_heads * num_queries * seq_len. A caller bounds it by calling once per chunk of queries, with
`query[a:b]`, `key[:prefix + b]` and `value[:prefix + b]`, where prefix = seq_len - num_queries: rows do not depend on
each other, so the result is that of one call (to the rounding of the matrix products).

Source of the method: Top-Theta Attention, arXiv 2502.08363.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from vllm_toptheta.reference.compensation import FULL_COMPENSATION, Compensation, causal_value_mean
from vllm_toptheta.reference.scores import (
    causal_scores,
    count,
    group_counts,
    group_rows,
    kept,
    row_lengths,
    ungroup_rows,
)
from vllm_toptheta.reference.thresholds import (
    Phase,
    keep_last,
    kth_largest_score,
    per_row,
    score_threshold,
    select_survivors,
    thresholded_rows,
)

__all__ = [
    "AttentionResult",
    "Placement",
    "dense_attention",
    "top_k_attention",
    "top_theta_attention",
]

Placement = Literal["pre_softmax", "post_softmax"]


@dataclass(frozen=True)
class AttentionResult:
    """The output of an attention call, and what it read and lost.

    Attributes:
        output: `[num_queries, num_heads, head_size]`, float32 or float64.
        num_survivors: `[num_queries, num_heads]` int64, keys kept by the head.
        value_rows_read: `[num_queries, num_kv_heads]` int64, value rows kept by any query head of the group and read
            exactly.
        keys_read: `[num_queries, num_kv_heads]` int64, keys read exactly: the candidates, or all that the row sees.
        lost_mass: `[num_queries, num_heads]`, of the dtype of `output`, 1 - sum of the survivors' weights: 0 where
            everything survives, 1 where nothing does. What the denominator knows of it.
        true_lost_mass: the same shape, the share of the dense softmax that does not survive.
        thresholded: `[num_queries]` bool, rows whose keys the threshold decided on; the others kept all of them.
        survivors: `[num_queries, num_heads, seq_len]` bool; None from the paged form.
        copies_read: `[num_queries, num_kv_heads]` int64, values kept by any query head of the group and read as copies;
            None from attention without copies.
    """

    output: Tensor
    num_survivors: Tensor
    value_rows_read: Tensor
    keys_read: Tensor
    lost_mass: Tensor
    true_lost_mass: Tensor
    thresholded: Tensor
    survivors: Tensor | None
    copies_read: Tensor | None = None


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    softmax_scale: float,
    logits_soft_cap: float | None = None,
    sinks: Tensor | None = None,
) -> AttentionResult:
    """Causal softmax attention over all keys: Top-Theta attention with a threshold of minus infinity.

    Args:
        query: `[num_queries, num_heads, head_size]` float, the last `num_queries` positions.
        key: `[seq_len, num_kv_heads, head_size]` float.
        value: `[seq_len, num_kv_heads, head_size]` float.
        softmax_scale: factor on the products of query and key.
        logits_soft_cap: cap on the scores, scaled logits, positive; None for a model without one.
        sinks: as for `top_theta_attention`.

    Returns:
        The result, with every key a survivor and a lost mass of exactly 0.

    Raises:
        ValueError: the arguments do not fit each other; the message starts with the name of one.
    """
    return top_theta_attention(
        query,
        key,
        value,
        threshold=-torch.inf,
        target_k=0,
        softmax_scale=softmax_scale,
        logits_soft_cap=logits_soft_cap,
        sinks=sinks,
    )


def top_k_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    target_k: int,
    softmax_scale: float,
    compensation: Compensation = FULL_COMPENSATION,
    logits_soft_cap: float | None = None,
    phase: Phase = "both",
    num_prompt_tokens: int = 0,
    sinks: Tensor | None = None,
) -> AttentionResult:
    """Causal attention over the keys with the k largest scores of each row.

    Every score that reaches the k-th largest survives, so a tie there keeps more than k keys, as a threshold at that
    score does. Rows that see at most k keys are dense. This is what each layer applies during top-k at calibration.

    Args:
        query: `[num_queries, num_heads, head_size]` float, the last `num_queries` positions.
        key: `[seq_len, num_kv_heads, head_size]` float.
        value: `[seq_len, num_kv_heads, head_size]` float.
        target_k: k, keys to keep per row and query head, at least 1.
        softmax_scale: factor on the products of query and key.
        compensation: what makes up for the discarded keys; `exp_threshold` takes the k-th largest score for theta.
        logits_soft_cap: cap on the scores, scaled logits, positive; None for a model without one.
        phase: which rows are sparse, see `thresholds.thresholded_rows`; the others are dense.
        num_prompt_tokens: tokens of the sequence that are its prompt.
        sinks: as for `top_theta_attention`.

    Returns:
        The result.

    Raises:
        ValueError: the arguments do not fit each other; the message starts with the name of one.
    """
    scores = causal_scores(query, key, softmax_scale=softmax_scale, logits_soft_cap=logits_soft_cap)
    _check_sinks(sinks, scores)
    threshold = kth_largest_score(scores, target_k)
    thresholded = thresholded_rows(
        row_lengths(scores), target_k=target_k, phase=phase, num_prompt_tokens=num_prompt_tokens
    )
    survivors = select_survivors(scores, threshold)
    return _attend(scores, value, survivors, threshold, thresholded, compensation, sinks)


def top_theta_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    threshold: Tensor | float,
    target_k: int,
    softmax_scale: float,
    placement: Placement = "pre_softmax",
    compensation: Compensation = FULL_COMPENSATION,
    cap_k: int | None = None,
    logits_soft_cap: float | None = None,
    phase: Phase = "both",
    num_prompt_tokens: int = 0,
    candidates: Tensor | None = None,
    shadow_scores: Tensor | None = None,
    sinks: Tensor | None = None,
) -> AttentionResult:
    """Causal attention over the keys whose score reaches a threshold.

    For each row, with scores s_j, m = max_j s_j, survivors S = {j : s_j >= theta} and the denominator
    Z = sum_{j in S} exp(s_j - m) + missing, where `compensation` says what is known of missing:

        p_j = exp(s_j - m) / Z,   lost = missing / Z,   output = sum_{j in S} p_j v_j + lost * mean_j(v_j)

    the last term with value mean compensation only. A row whose Z is 0 (no survivors, nothing known to be missing)
    has no weights and a lost mass of 1. The threshold of minus infinity is dense attention, to the bit.

    An attention sink of a head is a logit without a key and a value (gpt-oss, https://arxiv.org/abs/2508.10925). It
    takes part in m, and Z = exp(sink - m) + sum_{j in S} exp(s_j - m) + missing: what it weighs is no lost mass,
    because dense attention has no value for it either. Weights and lost mass add up to 1 - exp(sink - m) / Z.

    Args:
        query: `[num_queries, num_heads, head_size]` float, the last `num_queries` positions.
        key: `[seq_len, num_kv_heads, head_size]` float.
        value: `[seq_len, num_kv_heads, head_size]` float.
        threshold: theta, a number or a tensor that broadcasts to `[num_queries, num_heads]`, compared in the dtype
            of the computation: scaled logits before softmax, a probability after it. A tie survives.
        target_k: the k that the threshold was calibrated for; rows that see at most k keys keep them all.
        softmax_scale: factor on the products of query and key.
        placement: whether the threshold applies to scores (`pre_softmax`) or to the dense probabilities
            (`post_softmax`). It changes which keys survive, nothing else.
        compensation: what makes up for the discarded keys.
        cap_k: if given, at most this many survivors are kept, the last ones by position, at least 1. Rows that are
            not thresholded are not capped.
        logits_soft_cap: cap on the scores, scaled logits, positive; None for a model without one.
        phase: which rows are thresholded, see `thresholds.thresholded_rows`; the others are dense.
        num_prompt_tokens: tokens of the sequence that are its prompt.
        candidates: `[num_queries, num_heads, seq_len]` bool, the keys that may survive in thresholded rows, as
            `shadow.candidate_keys` finds them; None for all.
        shadow_scores: `[num_queries, num_heads, seq_len]` float, from `shadow.shadow_scores`, what the denominator
            `shadow` takes for the scores of keys that are no candidates; None for other denominators.
        sinks: `[num_heads]` float, one logit per head, which neither `softmax_scale` nor the soft cap applies to; None
            for a model without.

    Returns:
        The result.

    Raises:
        ValueError: the arguments do not fit each other; the message starts with the name of one.
    """
    if placement not in get_args(Placement):
        raise ValueError(f"placement: {placement!r} is none of {', '.join(get_args(Placement))}")
    scores = causal_scores(query, key, softmax_scale=softmax_scale, logits_soft_cap=logits_soft_cap)
    _check_sinks(sinks, scores)
    theta = per_row("threshold", threshold, scores[..., 0])
    if placement == "post_softmax":
        theta = score_threshold(scores, theta, sinks=sinks)
    survivors = select_survivors(scores, theta)
    if candidates is not None:
        survivors = survivors & candidates
    if cap_k is not None:
        survivors = keep_last(survivors, cap_k)
    thresholded = thresholded_rows(
        row_lengths(scores), target_k=target_k, phase=phase, num_prompt_tokens=num_prompt_tokens
    )
    estimates = None
    if candidates is not None and shadow_scores is not None:
        estimates = torch.where(candidates, scores, shadow_scores).masked_fill(scores == -torch.inf, -torch.inf)
    return _attend(scores, value, survivors, theta, thresholded, compensation, sinks, candidates, estimates)


def _check_sinks(sinks: Tensor | None, scores: Tensor) -> None:
    num_heads = scores.shape[1]
    if sinks is not None and sinks.shape != (num_heads,):
        raise ValueError(f"sinks: shape {list(sinks.shape)} is not one logit for each of {num_heads} query heads")


def _attend(
    scores: Tensor,
    value: Tensor,
    survivors: Tensor,
    threshold: Tensor,
    thresholded: Tensor,
    compensation: Compensation,
    sinks: Tensor | None = None,
    candidates: Tensor | None = None,
    estimates: Tensor | None = None,
) -> AttentionResult:
    """Weighs the values of the survivors, and in rows that are not thresholded of all keys.

    Scores, survivors, candidates and estimates of scores are `[num_queries, num_heads, seq_len]`, threshold
    `[num_queries, num_heads]` in scaled logits, thresholded `[num_queries]`, sinks `[num_heads]` or None.
    """
    num_queries, num_heads, seq_len = scores.shape
    num_kv_heads = value.shape[1]
    if value.shape[0] != seq_len or num_heads % num_kv_heads:
        raise ValueError(f"value: shape {list(value.shape)} does not fit {seq_len} keys and {num_heads} query heads")
    value = value.to(scores.dtype)
    lengths = row_lengths(scores)
    if not bool(thresholded.all()):
        survivors = torch.where(thresholded[:, None, None], survivors, scores > -torch.inf)
    read, keys_read = None, lengths[:, None].expand(-1, num_kv_heads)
    if candidates is not None:
        visible = scores > -torch.inf
        read = torch.where(thresholded[:, None, None], candidates & visible, visible)
        keys_read = group_counts(read, num_kv_heads)

    largest = scores.amax(dim=-1)
    of_sink: Tensor | float = 0.0
    if sinks is not None:
        sinks = sinks.to(scores.dtype)
        largest = torch.maximum(largest, sinks)
        of_sink = torch.exp(sinks - largest)
    exponentials = torch.exp(scores - largest.unsqueeze(-1))
    of_survivors = kept(exponentials, survivors)
    num_survivors = count(survivors)
    missing = compensation.missing_mass(
        exponentials,
        survivors,
        num_discarded=lengths[:, None] - num_survivors,
        relative_threshold=threshold - largest,
        candidates=read,
        # an estimate above the largest score is an error of the estimate, and must not overflow
        estimates=None if estimates is None else torch.exp((estimates - largest.unsqueeze(-1)).clamp(max=0.0)),
    )
    denominator = of_survivors.sum(dim=-1) + missing + of_sink
    has_mass = denominator > 0
    denominator = torch.where(has_mass, denominator, 1.0)
    lost_mass = torch.where(has_mass, missing / denominator, 1.0)
    true_lost_mass = lost_mass
    if compensation.denominator != "exact":
        true_lost_mass = kept(exponentials, ~survivors).sum(dim=-1) / (exponentials.sum(dim=-1) + of_sink)

    sums = group_rows(of_survivors, num_kv_heads) @ value.transpose(0, 1)
    output = ungroup_rows(sums, num_heads) / denominator.unsqueeze(-1)
    if compensation.value_mean:
        mean = causal_value_mean(value, num_queries).repeat_interleave(num_heads // num_kv_heads, dim=1)
        output = output + lost_mass.unsqueeze(-1) * mean
    return AttentionResult(
        output=output.contiguous(),
        num_survivors=num_survivors,
        value_rows_read=group_counts(survivors, num_kv_heads),
        keys_read=keys_read,
        lost_mass=lost_mass,
        true_lost_mass=true_lost_mass,
        thresholded=thresholded,
        survivors=survivors,
    )
