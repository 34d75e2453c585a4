"""Top-Theta attention with shadow keys over the paged KV cache in vectorised torch operations, for CPUs.

What `shadow.decode_shadow` is on GPUs, with the cache and the batches of `kernels.cpu`: `write_codes` writes the codes
of pages that became full, `decode_shadow` reads those of all tokens, the exact keys of candidates, and the value rows
of survivors.
"""

from __future__ import annotations

import torch

from vllm_toptheta.kernels.codec import NUM_LEVELS, ShadowProjection
from vllm_toptheta.kernels.cpu.values import (
    ClosedPages,
    DecodeBatch,
    DecodeResult,
    packed_positions,
    split_cache,
    token_rows,
    weigh_values,
)

MIDDLE = (NUM_LEVELS - 1) / 2
QUERY_LEVELS = 127
_HIGHEST = 1e30  # magnitude of a threshold: differences of two are no NaN


def write_codes(
    kv_cache: torch.Tensor, codes: torch.Tensor, pages: ClosedPages, *, projection: ShadowProjection
) -> None:
    """Write the shadow keys of every page in `pages`, from the keys in it and nothing else.

    Args:
        kv_cache: The pages' rows must have been written.
        codes: [num_blocks, num_kv_heads, block_size, code_bytes] uint8, written in place (`pages.codes_view`).
        pages: Which pages, from `ClosedPages.of_step`.
        projection: Of the layer.
    """
    key_cache, _ = split_cache(kv_cache)
    blocks = pages.blocks[pages.valid]
    centred = key_cache[blocks].float() - projection.key_mean[:, None]
    steps = torch.matmul(centred, projection.encoder)
    lower, upper = torch.floor(steps + NUM_LEVELS // 2).clamp(0, NUM_LEVELS - 1).to(torch.uint8).chunk(2, dim=-1)
    codes[blocks] = lower | upper << 4


def decode_shadow(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    codes: torch.Tensor,
    batch: DecodeBatch,
    *,
    projection: ShadowProjection,
    threshold: torch.Tensor,
    margin: torch.Tensor,
    scale: torch.Tensor,
    num_sink: int,
    num_recent: int,
    softmax_scale: float,
    logits_soft_cap: float | None = None,
    denominator_compensation: bool = True,
    value_sum: torch.Tensor | None = None,
) -> DecodeResult:
    """One new token per sequence: score every shadow key, read the exact keys of candidates and survivors' value rows.

    Args:
        query: [num_seqs, num_heads, head_size].
        kv_cache: See the head of `kernels.cpu`.
        codes: [num_blocks, num_kv_heads, block_size, code_bytes] uint8, of all full pages.
        batch: The sequences.
        projection: Of the layer, what `codes` were written with.
        threshold: [num_seqs, num_heads] float32, scaled logits; -inf keeps every key.
        margin: [num_seqs, num_heads] float32, scaled logits: how far below the threshold a candidate's shadow may be.
        scale: [num_seqs, num_heads] float32, r: a key that is not read enters the denominator as r * exp(threshold).
        num_sink, num_recent: Tokens at either end that are always candidates, as are those in the page of the new one.
        softmax_scale: Factor on q . k.
        logits_soft_cap: Cap c of c * tanh(s / c), or None.
        denominator_compensation: Whether discarded keys enter the softmax denominator.
        value_sum: [num_blocks, num_kv_heads, head_size] float32, running sums of full pages, for the value-mean
            compensation; None switches it off.

    Returns:
        Among the rest `keys_read`, the candidates; `lost_mass` is an estimate as far as it lies in keys not read.
    """
    num_seqs, num_heads, head_size = query.shape
    num_kv_heads, block_size = kv_cache.shape[1:3]
    grouped = query.float().view(num_seqs, num_kv_heads, -1, head_size)
    # also those of unwritten pages are numbers, unlike what keys in such memory may score
    shadows = _shadow_scores(grouped, codes, batch, projection, softmax_scale, logits_soft_cap)
    floor = (threshold - margin).view(num_seqs, num_kv_heads, -1, 1)
    position = torch.arange(batch.visible.shape[1])
    # the page of the last token has no codes yet, or only since this step
    last_page = (batch.seq_lens - 1) // block_size * block_size
    first_recent = torch.minimum(batch.seq_lens - num_recent, last_page)
    at_an_end = (position < num_sink) | (position >= first_recent[:, None])
    candidates = ((shadows >= floor).any(dim=2) | at_an_end[:, None]) & batch.visible[:, None]

    key_cache, value_cache = split_cache(kv_cache)
    positions, valid = packed_positions(candidates)
    keys = token_rows(key_cache, batch.blocks, positions)
    scores = torch.matmul(grouped * softmax_scale, keys.transpose(2, 3))
    if logits_soft_cap is not None:
        scores = logits_soft_cap * torch.tanh(scores / logits_soft_cap)
    theta = threshold.clamp(-_HIGHEST, _HIGHEST).view(num_seqs, num_kv_heads, -1)
    survivors = (scores >= theta[..., None]) & valid[:, :, None]
    maximum = torch.maximum(scores.where(survivors, -torch.inf).amax(dim=3), theta)
    weights = torch.exp(scores - maximum[..., None]).where(valid[:, :, None], 0.0)
    kept = weights.where(survivors, 0.0)
    kept_sum = kept.sum(dim=3)
    keys_read = candidates.sum(dim=2)
    num_unread = (batch.seq_lens[:, None] - keys_read)[..., None]
    unread_sum = scale.view_as(theta) * num_unread * torch.exp(theta - maximum)
    lost_sum = weights.where(~survivors, 0.0).sum(dim=3) + unread_sum
    total = kept_sum + lost_sum
    # scores far below the threshold leave no trace in either sum
    lost_mass = torch.where(total > 0, lost_sum / total, 1.0)
    total = total.clamp(min=torch.finfo(torch.float32).tiny)

    read = survivors.any(dim=2)
    if value_sum is not None:
        read |= valid & batch.is_open[:, None].expand_as(candidates).gather(2, positions)
    index, valid = packed_positions(read)
    positions = positions.gather(2, index)
    output = weigh_values(
        kept.gather(3, index[:, :, None].expand(-1, -1, kept.shape[2], -1)).where(valid[:, :, None], 0.0),
        kept_sum,
        lost_mass,
        token_rows(value_cache, batch.blocks, positions),
        positions,
        valid,
        batch,
        denominator=total if denominator_compensation else None,
        value_sum=value_sum,
    )
    return DecodeResult(
        output=output.view(num_seqs, num_heads, head_size),
        value_rows_read=valid.sum(dim=2),
        lost_mass=lost_mass.view(num_seqs, num_heads),
        keys_read=keys_read,
    )


def _shadow_scores(
    grouped: torch.Tensor,
    codes: torch.Tensor,
    batch: DecodeBatch,
    projection: ShadowProjection,
    softmax_scale: float,
    logits_soft_cap: float | None,
) -> torch.Tensor:
    """Scores of shadow keys, [num_seqs, num_kv_heads, group, max_len] float32, anything behind a sequence's end."""
    channels = torch.einsum("nhgd,hrd->nhgr", grouped, projection.decoder)
    step = channels.abs().amax(dim=-1) / QUERY_LEVELS
    step = torch.where(step > 0, step, 1.0)
    query_codes = torch.floor(channels / step[..., None] + 0.5)
    offset = torch.einsum("nhgd,hd->nhg", grouped, projection.key_mean) - step * MIDDLE * query_codes.sum(dim=-1)
    packed = codes.index_select(0, batch.blocks.flatten())
    packed = packed.view(*batch.blocks.shape, *packed.shape[1:]).transpose(3, 4)
    lower, upper = query_codes[:, None].chunk(2, dim=-1)
    # sums of products of integers this small are exact in float32
    products = torch.matmul(lower, (packed & (NUM_LEVELS - 1)).float()) + torch.matmul(upper, (packed >> 4).float())
    products = products.permute(0, 2, 3, 1, 4).flatten(3)
    scores = (softmax_scale * offset)[..., None] + (softmax_scale * step)[..., None] * products
    if logits_soft_cap is not None:
        scores = logits_soft_cap * torch.tanh(scores / logits_soft_cap)
    return scores
