"""Tiers: heavy keys are read exactly, light ones as copies in few bits, the mass of the others goes to the mean value.

Every key has a copy in 4 bits a channel, and every value one in 2. They need no calibration: a fixed rotation makes the
channels of a row alike, whatever the model, so one step for all of a row's channels is enough.

    centre   mu = mean of the keys 1 to 15 of the sequence, because keys have a mean, which would take up the levels
    key      y = R (k - mu),  step = max |y| / 8,  code = clamp(floor(y / step + 8), 0, 15)
             k ~ mu + R^T (step (code - 7.5))
    value    y = R v,  u = clamp(floor(2 y / max |y| + 2), 0, 3) - 1.5,  step = sum y^2 / sum y u
             v ~ R^T (step u), so that what is lost of a value is at right angles to it
    query    c = round(R q / s), s = max |R q| / 127: scores are sums of products of integers, times s and step

R is `rotation.rotation`, steps are float16. With s~_j the score of a copy, n keys, and the anchors of `relative`:

    exact    anchors, keys in the page of the newest token, and keys with s~_j >= anchor_lse + ln(heavy) in some head of
             the group; a head keeps those whose exact score reaches theta = anchor_lse + ln(weight_floor / n)
    light    other keys with s~_j >= theta are weighed by s~_j, and their value is its copy
    below    everything else enters the softmax denominator by s~_j, or by the exact score where that was read

A key that is light for one head may weigh nothing in another of its group. With exact rows instead of copies, what is
read is what thresholds alone read. docs/lab.md compares this format with others.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_toptheta.limits import NUM_ANCHORS, NUM_FIRST_ANCHORS
from vllm_toptheta.reference.compensation import causal_value_mean
from vllm_toptheta.reference.relative import anchor_lse, is_anchor
from vllm_toptheta.reference.scores import (
    causal_scores,
    group_any,
    group_rows,
    kept,
    mask_future,
    row_lengths,
    row_lse,
    ungroup_rows,
)
from vllm_toptheta.reference.thresholds import select_survivors
from vllm_toptheta.rotation import rotation

__all__ = [
    "KeyCopies",
    "TieredResult",
    "ValueCopies",
    "copy_keys",
    "copy_scores",
    "copy_values",
    "key_centre",
    "tiered_attention",
]

KEY_LEVELS = 16
VALUE_LEVELS = 4
QUERY_LEVELS = 127
_LEAST_STEP = 2.0**-24  # of float16


@dataclass(frozen=True)
class KeyCopies:
    """Copies of keys.

    Attributes:
        codes: `[seq_len, num_kv_heads, head_size]` uint8, 0 to 15, of rotated channels.
        step: `[seq_len, num_kv_heads]` float16.
        centre: `[num_kv_heads, head_size]` float32.
    """

    codes: Tensor
    step: Tensor
    centre: Tensor


@dataclass(frozen=True)
class ValueCopies:
    """Copies of values.

    Attributes:
        codes: `[seq_len, num_kv_heads, head_size]` uint8, 0 to 3, of rotated channels.
        step: `[seq_len, num_kv_heads]` float16.
    """

    codes: Tensor
    step: Tensor

    def decoded(self) -> Tensor:
        """Returns the values that they stand for, `[seq_len, num_kv_heads, head_size]` float32."""
        rotated = (self.codes.float() - (VALUE_LEVELS - 1) / 2) * self.step.float().unsqueeze(-1)
        return rotated @ rotation(rotated.shape[-1]).to(rotated.device)


@dataclass(frozen=True)
class TieredResult:
    """The output of tiered attention, and what it read and lost.

    Attributes:
        output: `[num_queries, num_heads, head_size]` float32.
        exact: `[num_queries, num_kv_heads, seq_len]` bool, keys that are read exactly.
        survivors: `[num_queries, num_heads, seq_len]` bool, keys whose values are weighed, exact or light.
        lost_mass: `[num_queries, num_heads]` float32, share of the softmax that is not weighed, by the scores known.
        true_lost_mass: the same shape, by the exact scores.
    """

    output: Tensor
    exact: Tensor
    survivors: Tensor
    lost_mass: Tensor
    true_lost_mass: Tensor


def key_centre(key: Tensor) -> Tensor:
    """Returns what the keys of a sequence are centred by, `[num_kv_heads, head_size]` float32.

    The first key is left out: models make it unlike all others.

    Args:
        key: `[seq_len, num_kv_heads, head_size]` float, at least 16 keys where copies are made of them.
    """
    return key[1:NUM_FIRST_ANCHORS].float().mean(dim=0)


def copy_keys(key: Tensor, centre: Tensor) -> KeyCopies:
    """Returns the copies of keys.

    Args:
        key: `[seq_len, num_kv_heads, head_size]` float, after rotary embedding.
        centre: `[num_kv_heads, head_size]` float32, `key_centre` of their sequence.
    """
    rotated = _rotated(key.float() - centre)
    step = _as_float16(rotated.abs().amax(dim=-1) / (KEY_LEVELS // 2))
    codes = torch.floor(rotated / step.float().unsqueeze(-1) + KEY_LEVELS // 2).clamp(0, KEY_LEVELS - 1)
    return KeyCopies(codes.to(torch.uint8), step, centre)


def copy_values(value: Tensor) -> ValueCopies:
    """Returns the copies of values, `[seq_len, num_kv_heads, head_size]` float."""
    rotated = _rotated(value.float())
    largest = rotated.abs().amax(dim=-1, keepdim=True).clamp(min=_LEAST_STEP)
    codes = torch.floor(2 * rotated / largest + VALUE_LEVELS // 2).clamp(0, VALUE_LEVELS - 1)
    levels = codes - (VALUE_LEVELS - 1) / 2
    step = rotated.square().sum(dim=-1) / (rotated * levels).sum(dim=-1).clamp(min=_LEAST_STEP)
    return ValueCopies(codes.to(torch.uint8), _as_float16(step))


def _rotated(rows: Tensor) -> Tensor:
    return rows @ rotation(rows.shape[-1]).to(rows.device).mT


def _as_float16(step: Tensor) -> Tensor:
    return step.clamp(_LEAST_STEP, torch.finfo(torch.float16).max).half()


def copy_scores(
    query: Tensor, copies: KeyCopies, *, softmax_scale: float, logits_soft_cap: float | None = None
) -> Tensor:
    """Returns the scores of copies, `[num_queries, num_heads, seq_len]` float32, scaled logits, without a mask.

    Args:
        query: `[num_queries, num_heads, head_size]` float.
        copies: of the keys.
        softmax_scale: factor on the products of query and key.
        logits_soft_cap: cap on the scores, or None.
    """
    num_kv_heads = len(copies.centre)
    grouped = query.float().unflatten(1, (num_kv_heads, -1))
    rotated = _rotated(grouped)
    step = rotated.abs().amax(dim=-1, keepdim=True) / QUERY_LEVELS
    step = torch.where(step > 0, step, 1.0)
    codes = torch.floor(rotated / step + 0.5)
    # products of integers this small are exact in float32, and so are their sums
    products = torch.einsum("thgd,nhd->thgn", codes, copies.codes.float())
    products = products - (KEY_LEVELS - 1) / 2 * codes.sum(dim=-1, keepdim=True)
    offset = torch.einsum("thgd,hd->thg", grouped, copies.centre)
    scores = softmax_scale * (offset.unsqueeze(-1) + step * products * copies.step.float().mT[None, :, None])
    if logits_soft_cap is not None:
        scores = logits_soft_cap * torch.tanh(scores / logits_soft_cap)
    return scores.flatten(1, 2)


def tiered_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    weight_floor: float,
    heavy: float,
    block_size: int,
    softmax_scale: float,
    logits_soft_cap: float | None = None,
    keys: KeyCopies | None = None,
    values: ValueCopies | None = None,
    score_copies: Tensor | None = None,
    sinks: Tensor | None = None,
) -> TieredResult:
    """Causal attention of the last queries of a sequence by tiers; each row as a decode step of its length.

    Args:
        query: `[num_queries, num_heads, head_size]` float, the last `num_queries` positions.
        key: `[seq_len, num_kv_heads, head_size]` float.
        value: `[seq_len, num_kv_heads, head_size]` float.
        weight_floor: as for `relative.relative_threshold`, above 0.
        heavy: what a key must weigh at least to be read exactly, in multiples of what all anchors of the row, and its
            sink, weigh; at least 0.
        block_size: tokens of a page; those in the page of the newest token have no copies yet.
        softmax_scale: factor on the products of query and key.
        logits_soft_cap: cap on the scores, scaled logits, positive; None for a model without one.
        keys: copies of the keys, for repeated calls; None makes them.
        values: likewise of the values.
        score_copies: `[num_queries, num_heads, seq_len]` float32, taken instead of the scores of copies.
        sinks: `[num_heads]` float, one logit per head, a term of anchor_lse and of the denominator, and no lost mass;
            None for a model without.

    Returns:
        The result; rows that see no key but anchors are dense.
    """
    num_kv_heads = key.shape[1]
    group = query.shape[1] // num_kv_heads
    scores = causal_scores(query, key, softmax_scale=softmax_scale, logits_soft_cap=logits_soft_cap).float()
    num_seen = row_lengths(scores)
    lse = anchor_lse(scores, num_seen, sinks=sinks)
    theta = lse + (math.log(weight_floor) - num_seen.float().log())[:, None]
    # of anchors alone nothing is dropped
    theta = theta.masked_fill((num_seen <= NUM_ANCHORS)[:, None], -torch.inf)
    if score_copies is None:
        keys = copy_keys(key, key_centre(key)) if keys is None else keys
        score_copies = copy_scores(query, keys, softmax_scale=softmax_scale, logits_soft_cap=logits_soft_cap)

    position = torch.arange(key.shape[0], device=key.device)
    last_page = (num_seen - 1) // block_size * block_size
    exact = (is_anchor(num_seen, len(key)) | (position >= last_page[:, None]))[:, None]
    is_seen = (position < num_seen[:, None])[:, None]
    if heavy:
        exact = exact | group_any(score_copies >= (lse + math.log(heavy)).unsqueeze(-1), num_kv_heads)
        exact = exact & is_seen
    else:
        exact = is_seen.expand(-1, num_kv_heads, -1)
    is_exact = exact.repeat_interleave(group, dim=1)
    known = mask_future(torch.where(is_exact, scores, score_copies))
    survivors = select_survivors(known, theta)

    largest = known.amax(dim=-1, keepdim=True)
    if sinks is not None:
        largest = torch.maximum(largest, sinks.float()[:, None])
    exponentials = torch.exp(known - largest)
    total = exponentials.sum(dim=-1)
    if sinks is not None:
        total = total + torch.exp(sinks.float() - largest[..., 0])
    of_survivors = kept(exponentials, survivors)
    of_exact = kept(of_survivors, is_exact)
    values = copy_values(value) if values is None else values
    sums = torch.zeros_like(query, dtype=torch.float32)
    for rows, of_tier in ((value.float(), of_exact), (values.decoded(), of_survivors - of_exact)):
        sums = sums + ungroup_rows(group_rows(of_tier, num_kv_heads) @ rows.transpose(0, 1), query.shape[1])
    lost_mass = ((exponentials.sum(dim=-1) - of_survivors.sum(dim=-1)) / total).clamp(min=0.0)
    mean = causal_value_mean(value.float(), len(query)).repeat_interleave(group, dim=1)
    return TieredResult(
        output=sums / total.unsqueeze(-1) + lost_mass.unsqueeze(-1) * mean,
        exact=exact,
        survivors=survivors,
        lost_mass=lost_mass,
        true_lost_mass=kept((scores - row_lse(scores, sinks).unsqueeze(-1)).exp(), ~survivors).sum(dim=-1),
    )
