"""Thresholds relative to the row: no calibration, and a guarantee for every key.

    anchors      the first 16 and the last 128 keys of a row that sees n keys
    anchor_lse   = ln sum over anchors of exp(s_j)
    theta        = anchor_lse + ln(weight_floor / n)

The anchors are some of the row's keys, so anchor_lse <= lse = ln sum over all keys of exp(s_j), and a key below theta
has the softmax weight p_j = exp(s_j - lse) <= exp(s_j - anchor_lse) < weight_floor / n. So:

    every key whose softmax weight reaches weight_floor / n survives, in every row of every model,
    the largest weight that is dropped is below weight_floor / n, and
    with the exact denominator and the mean of all values for the lost mass, the output is off by
        sum over dropped keys of p_j (v_j - mean v),
    whose norm is at most weight_floor (n - survivors) / n * max_j |v_j - mean v|, and about
    sqrt(weight_floor / n) times the spread of the values where what is dropped does not depend on them, since
    sum over dropped p_j^2 <= weight_floor / n.

In floating point, both sides of the comparison are rounded: a key can be dropped whose weight exceeds the floor by the
relative error of exp(s_j) and of the sum, a few units in 10^-6 for scores of the size of 10 in float32.

A soft cap and the softmax scale are part of the scores. A row that sees a window of the keys has the anchors among
them only: a smaller sum, so the bound still holds.

An attention sink, a logit of a head that takes a share of the softmax without having a key or a value (gpt-oss,
https://arxiv.org/abs/2508.10925; vLLM's `Attention(sinks=)`), is one more term of both sums:

    lse         = ln (exp(sink) + sum over all keys of exp(s_j))
    anchor_lse  = ln (exp(sink) + sum over anchors of exp(s_j))   still at most lse

so the guarantee holds as it stands, of weights in the softmax with the sink: a key below theta weighs less than
weight_floor / n. A row that gives most of its mass to the sink therefore reads fewer keys.
"""

import torch
from torch import Tensor

from vllm_toptheta.limits import NUM_FIRST_ANCHORS, NUM_LAST_ANCHORS
from vllm_toptheta.reference.scores import row_lse

__all__ = ["anchor_lse", "is_anchor", "relative_threshold"]


def is_anchor(num_keys: Tensor, seq_len: int) -> Tensor:
    """Returns which keys are anchors of rows that see the first keys of a sequence.

    Args:
        num_keys: `[...]` int64, keys that each row sees, at most `seq_len`.
        seq_len: keys of the sequence.

    Returns:
        `[..., seq_len]` bool.
    """
    position = torch.arange(seq_len, device=num_keys.device)
    end = num_keys.unsqueeze(-1)
    return ((position < NUM_FIRST_ANCHORS) | (position >= end - NUM_LAST_ANCHORS)) & (position < end)


def anchor_lse(scores: Tensor, num_keys: Tensor, *, sinks: Tensor | None = None) -> Tensor:
    """Returns ln sum over a row's anchors, and its sink, of exp(s_j), at most the log-sum-exp of all of its scores.

    Args:
        scores: `[num_queries, num_heads, seq_len]` float, scaled logits after the soft cap, minus infinity at keys that
            a row does not see.
        num_keys: `[num_queries]` int64, keys up to and including each row's own; those outside of a window count.
        sinks: `[num_heads]` float, logits that the heads add to their denominators as they are; None without.

    Returns:
        `[num_queries, num_heads]` of the same dtype, natural logarithm.
    """
    anchors = is_anchor(num_keys, scores.shape[-1])
    return row_lse(scores.masked_fill(~anchors[:, None], -torch.inf), sinks)


def relative_threshold(scores: Tensor, num_keys: Tensor, weight_floor: float, *, sinks: Tensor | None = None) -> Tensor:
    """Returns theta = anchor_lse + ln(weight_floor / n) of every row.

    Args:
        scores, num_keys, sinks: as for `anchor_lse`.
        weight_floor: what a key must weigh to be sure to survive, in multiples of the average weight 1 / n; 0 keeps
            everything.

    Returns:
        `[num_queries, num_heads]` of the dtype of `scores`, scaled logits.

    Raises:
        ValueError: `weight_floor` is negative or not finite.
    """
    if not 0 <= weight_floor < float("inf"):
        raise ValueError(f"weight_floor: must be finite and not negative, got {weight_floor}")
    log_floor = torch.tensor(weight_floor, dtype=scores.dtype, device=scores.device).log()
    return anchor_lse(scores, num_keys, sinks=sinks) + (log_floor - num_keys.to(scores.dtype).log())[:, None]
