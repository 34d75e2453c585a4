"""Shadow keys: a copy of every key in few bits, whose scores say which keys are worth reading exactly.

The score of a query with a key is a sum over channels, and after a change of basis few of them carry nearly all of it.
So a key is centred, projected to `num_channels` directions, and each of these is stored in 4 bits, in steps of a fixed
size:

    code = clamp(floor(8 + (key - key_mean) @ encoder), 0, 15)          [num_channels]
    q . key  ~  q . key_mean + (q @ decoder.T) . (code - 7.5)

The directions maximise what is kept of the scores: with C the covariance of the keys and M the second moment of the
queries of the group, they are the leading eigenvectors of M^(1/2) C M^(1/2), seen from the keys by M^(1/2), from the
queries by M^(-1/2). Steps are the best ones for a normal distribution in 16 levels (J. Max, "Quantizing for minimum
distortion", IRE Trans. Inf. Theory, 1960). Nothing but the codes is stored with a key: no scale is read while
scanning. docs/lab.md compares this format with others.

Queries take part as integers of 8 bits, one scale per head, so a sum of products of codes is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "KeyProjection",
    "ShadowQuery",
    "always_candidates",
    "candidate_keys",
    "encode_keys",
    "fit_projection",
    "pack_codes",
    "quantize_query",
    "shadow_scores",
    "unpack_codes",
]

NUM_LEVELS = 16
MIDDLE = (NUM_LEVELS - 1) / 2
STEP = 0.3352  # standard deviations
QUERY_LEVELS = 127
_MIN_MOMENT = 1e-4  # of the queries in a direction, relative to the mean one: bounds the inverse


@dataclass(frozen=True)
class KeyProjection:
    """What the keys of a layer are projected on; float32.

    Attributes:
        encoder: `[num_kv_heads, head_size, num_channels]`, from keys to steps.
        decoder: `[num_kv_heads, num_channels, head_size]`, from steps to keys.
        key_mean: `[num_kv_heads, head_size]`.
    """

    encoder: Tensor
    decoder: Tensor
    key_mean: Tensor


@dataclass(frozen=True)
class ShadowQuery:
    """A query as the scan of shadow keys takes it.

    Attributes:
        codes: `[num_queries, num_heads, num_channels]` int8.
        step: `[num_queries, num_heads]` float32, scaled logits per unit of a sum of products of codes.
        offset: `[num_queries, num_heads]` float32, scaled logits that are the same for all keys.
    """

    codes: Tensor
    step: Tensor
    offset: Tensor


def fit_projection(
    key_mean: Tensor, key_covariance: Tensor, query_moment: Tensor, *, num_channels: int
) -> KeyProjection:
    """Returns the projection that keeps most of the scores, from moments that a calibration can accumulate.

    Args:
        key_mean: `[num_kv_heads, head_size]` float.
        key_covariance: `[num_kv_heads, head_size, head_size]` float.
        query_moment: `[num_kv_heads, head_size, head_size]` float, mean of q q^T over the queries of the group.
        num_channels: even, at most head_size.

    Raises:
        ValueError: `num_channels` is odd or more than there are.
    """
    head_size = key_mean.shape[-1]
    if num_channels % 2 or not 2 <= num_channels <= head_size:
        raise ValueError(f"num_channels: {num_channels} is not an even number up to head_size, which is {head_size}")
    moments, axes = torch.linalg.eigh(query_moment.double())
    moments = torch.maximum(moments, _MIN_MOMENT * moments.mean(dim=-1, keepdim=True))
    root = axes @ torch.diag_embed(moments.sqrt()) @ axes.mT
    inverse_root = axes @ torch.diag_embed(moments.rsqrt()) @ axes.mT
    variances, directions = torch.linalg.eigh(root @ key_covariance.double() @ root)
    # eigenvalues ascend
    variances, directions = variances.flip(-1)[:, :num_channels], directions.flip(-1)[..., :num_channels]
    largest = variances[:, :1].clamp(min=torch.finfo(torch.float32).tiny)
    # a direction without variance gets a step all the same
    step = STEP * torch.maximum(variances, 1e-12 * largest).sqrt()
    return KeyProjection(
        encoder=(root @ directions / step[:, None, :]).float().contiguous(),
        decoder=((inverse_root @ directions) * step[:, None, :]).mT.float().contiguous(),
        key_mean=key_mean.float().contiguous(),
    )


def encode_keys(key: Tensor, projection: KeyProjection) -> Tensor:
    """Returns the codes of keys, `[seq_len, num_kv_heads, num_channels]` uint8 from 0 to 15.

    Args:
        key: `[seq_len, num_kv_heads, head_size]` float, after rotary embedding.
        projection: of the layer.
    """
    steps = torch.einsum("nhd,hdr->nhr", key.float() - projection.key_mean, projection.encoder)
    return torch.floor(steps + NUM_LEVELS // 2).clamp(0, NUM_LEVELS - 1).to(torch.uint8)


def pack_codes(codes: Tensor) -> Tensor:
    """Returns codes `[..., num_channels]` as `[..., num_channels // 2]` uint8.

    Byte j holds channel j in its lower half and channel j + num_channels // 2 in its upper half.
    """
    lower, upper = codes.chunk(2, dim=-1)
    return lower | upper << 4


def unpack_codes(packed: Tensor) -> Tensor:
    """The inverse of `pack_codes`."""
    return torch.cat([packed & 15, packed >> 4], dim=-1)


def quantize_query(query: Tensor, projection: KeyProjection, *, softmax_scale: float) -> ShadowQuery:
    """Returns queries as the scan takes them.

    Args:
        query: `[num_queries, num_heads, head_size]` float.
        projection: of the layer.
        softmax_scale: factor on the products of query and key.
    """
    num_kv_heads = len(projection.key_mean)
    grouped = query.float().unflatten(1, (num_kv_heads, -1))
    channels = torch.einsum("thgd,hrd->thgr", grouped, projection.decoder)
    step = channels.abs().amax(dim=-1) / QUERY_LEVELS
    step = torch.where(step > 0, step, 1.0)
    codes = torch.floor(channels / step[..., None] + 0.5)
    offset = torch.einsum("thgd,hd->thg", grouped, projection.key_mean) - step * MIDDLE * codes.sum(dim=-1)
    return ShadowQuery(
        codes=codes.to(torch.int8).flatten(1, 2),
        step=(softmax_scale * step).flatten(1, 2),
        offset=(softmax_scale * offset).flatten(1, 2),
    )


def shadow_scores(query: ShadowQuery, codes: Tensor, *, logits_soft_cap: float | None = None) -> Tensor:
    """Returns the scores of shadow keys, `[num_queries, num_heads, seq_len]` float32, scaled logits, without a mask.

    Args:
        query: from `quantize_query`.
        codes: `[seq_len, num_kv_heads, num_channels]` uint8, from `encode_keys`.
        logits_soft_cap: cap on the scores, or None.
    """
    # products of integers this small are exact in float32, and so are their sums
    grouped = query.codes.float().unflatten(1, (codes.shape[1], -1))
    products = torch.einsum("thgr,nhr->thgn", grouped, codes.float()).flatten(1, 2)
    scores = query.offset[..., None] + query.step[..., None] * products
    if logits_soft_cap is not None:
        scores = logits_soft_cap * torch.tanh(scores / logits_soft_cap)
    return scores


def always_candidates(row_lengths: Tensor, seq_len: int, *, num_sink: int, num_recent: int, block_size: int) -> Tensor:
    """Returns the keys that are read exactly whatever their shadows score, `[num_rows, seq_len]` bool.

    Margins are calibrated on softmax mass, much of which the first keys hold, and the last ones have no codes yet.

    Args:
        row_lengths: `[num_rows]` int64, keys that each row sees; its own is the last of them.
        seq_len: keys, at least as many as any row sees.
        num_sink: first keys that are always read.
        num_recent: last keys of a row that are always read; those in the page of the last one are as well.
        block_size: tokens of a page.
    """
    positions = torch.arange(seq_len, device=row_lengths.device)
    last_page = (row_lengths - 1) // block_size * block_size
    first_recent = torch.minimum(row_lengths - num_recent, last_page)
    at_an_end = (positions < num_sink) | (positions >= first_recent[:, None])
    return at_an_end & (positions < row_lengths[:, None])


def candidate_keys(
    scores: Tensor,
    floor: Tensor,
    *,
    num_kv_heads: int,
    num_sink: int,
    num_recent: int,
    block_size: int,
) -> Tensor:
    """Returns which keys are read exactly for the last query of a sequence, or for its last queries, as bool.

    A key is read for all heads of a group if any of them wants it, or if it is one of `always_candidates`.

    Args:
        scores: `[num_heads, seq_len]` float, of shadow keys; of several queries `[num_queries, num_heads, seq_len]`.
        floor: `[num_heads]` or `[num_queries, num_heads]` float, threshold minus margin, scaled logits.
        num_kv_heads: of the layer.
        num_sink: first keys that are always read.
        num_recent: last keys that are always read; those in the page of the last one are as well.
        block_size: tokens of a page.

    Returns:
        `[num_kv_heads, seq_len]`, or `[num_queries, num_kv_heads, seq_len]` without the keys after a query.
    """
    seq_len, num_queries = scores.shape[-1], 1 if scores.dim() == 2 else len(scores)
    row_lengths = torch.arange(seq_len - num_queries + 1, seq_len + 1, device=scores.device)
    always = always_candidates(
        row_lengths, seq_len, num_sink=num_sink, num_recent=num_recent, block_size=block_size
    ).unsqueeze(1)
    wanted: Tensor = (scores >= floor.unsqueeze(-1)).unflatten(-2, (num_kv_heads, -1)).any(dim=-2)
    visible = (torch.arange(seq_len, device=scores.device) < row_lengths[:, None]).unsqueeze(1)
    candidates: Tensor = (wanted & visible) | always
    return candidates[0] if scores.dim() == 2 else candidates
