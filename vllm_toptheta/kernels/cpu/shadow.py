"""Top-Theta attention of one new token per sequence that reads most keys as shadows, on CPUs: mode `shadow`.

What `gpu.shadow.decode` is on GPUs, but that no step is so short that all keys are read.
"""

from __future__ import annotations

import torch

from vllm_toptheta.kernels.codec import NUM_LEVELS, ShadowCodec
from vllm_toptheta.kernels.contract import Layer, LayerCall
from vllm_toptheta.kernels.cpu.batch import Batch
from vllm_toptheta.kernels.cpu.cache import packed_positions, split_cache, values_at
from vllm_toptheta.kernels.cpu.scores import at_an_end, capped, exact_scores
from vllm_toptheta.kernels.cpu.scratch import Counted, CpuScratch
from vllm_toptheta.kernels.cpu.thresholds import thresholds_at, unread_ratios_at
from vllm_toptheta.kernels.cpu.values import weigh_values, with_sinks

MIDDLE = (NUM_LEVELS - 1) / 2
QUERY_LEVELS = 127
_HIGHEST = 1e30  # magnitude of a threshold: differences of two are no NaN


def keep_survivors(batch: Batch, call: LayerCall, scratch: CpuScratch) -> None:
    """Score every shadow key, read the exact keys of candidates and survivors' value rows.

    The lost mass that is counted is an estimate as far as it lies in keys that are not read.
    """
    layer, codes = call.layer, call.cache.codes
    thresholds, shadow = layer.thresholds, layer.shadow
    if thresholds is None or shadow is None or codes is None:
        raise ValueError("shadow: None, expected a layer with thresholds and shadow keys")
    num_seqs, num_heads, head_size = call.query.shape
    num_kv_heads, block_size = call.cache.kv_cache.shape[1:3]
    grouped = call.query.float().view(num_seqs, num_kv_heads, -1, head_size)
    # also those of unwritten pages are numbers, unlike what keys in such memory may score
    shadows = _shadow_scores(grouped, codes, batch, layer, shadow.codec)
    _, value_cache = split_cache(call.cache.kv_cache)
    threshold = thresholds_at(
        thresholds,
        batch,
        lambda positions: exact_scores(call, batch, positions[:, None].expand(-1, num_kv_heads, -1)).flatten(1, 2),
        layer.sinks,
    )
    floor = (threshold - shadow.margin).view(num_seqs, num_kv_heads, -1, 1)
    candidates = ((shadows >= floor).any(dim=2) | at_an_end(batch, block_size)[:, None]) & batch.visible[:, None]

    positions, valid = packed_positions(candidates)
    scores = exact_scores(call, batch, positions)
    theta = threshold.clamp(-_HIGHEST, _HIGHEST).view(num_seqs, num_kv_heads, -1)
    survivors = (scores >= theta[..., None]) & valid[:, :, None]
    maximum, of_sink = with_sinks(torch.maximum(scores.where(survivors, -torch.inf).amax(dim=3), theta), layer.sinks)
    weights = torch.exp(scores - maximum[..., None]).where(valid[:, :, None], 0.0)
    kept = weights.where(survivors, 0.0)
    kept_sum = kept.sum(dim=3)
    keys_read = candidates.sum(dim=2)
    num_unread = (batch.seq_lens[:, None] - keys_read)[..., None]
    ratio = unread_ratios_at(shadow, batch.log_lengths)
    unread_sum = ratio.view_as(theta) * num_unread * torch.exp(theta - maximum)
    lost_sum = weights.where(~survivors, 0.0).sum(dim=3) + unread_sum
    total = kept_sum + lost_sum + of_sink
    # scores far below the threshold leave no trace in either sum
    lost_mass = torch.where(total > 0, lost_sum / total, 1.0)
    total = total.clamp(min=torch.finfo(torch.float32).tiny)

    read = survivors.any(dim=2)
    if call.cache.value_sum is not None:
        read |= valid & batch.is_open[:, None].expand_as(candidates).gather(2, positions)
    index, valid = packed_positions(read)
    positions = positions.gather(2, index)
    output = weigh_values(
        kept.gather(3, index[:, :, None].expand(-1, -1, kept.shape[2], -1)).where(valid[:, :, None], 0.0),
        kept_sum + of_sink,
        lost_mass,
        values_at(value_cache, batch.blocks, positions),
        positions,
        valid,
        batch,
        denominator=total if layer.denominator_compensation else None,
        value_sum=call.cache.value_sum,
    )
    call.output.copy_(output.view(num_seqs, num_heads, head_size))
    rows_read = valid.sum(dim=2)
    lost_mass = lost_mass.view(num_seqs, num_heads)
    scratch.add(layer.counters, Counted(batch.totals, batch.is_counted, rows_read, lost_mass, keys_read))


def _shadow_scores(
    grouped: torch.Tensor, codes: torch.Tensor, batch: Batch, layer: Layer, codec: ShadowCodec
) -> torch.Tensor:
    """Scores of shadow keys, [num_seqs, num_kv_heads, group, max_len] float32, anything behind a sequence's end."""
    channels = torch.einsum("nhgd,hrd->nhgr", grouped, codec.decoder)
    step = channels.abs().amax(dim=-1) / QUERY_LEVELS
    step = torch.where(step > 0, step, 1.0)
    query_codes = torch.floor(channels / step[..., None] + 0.5)
    offset = torch.einsum("nhgd,hd->nhg", grouped, codec.key_mean) - step * MIDDLE * query_codes.sum(dim=-1)
    packed = codes.index_select(0, batch.blocks.flatten())
    packed = packed.view(*batch.blocks.shape, *packed.shape[1:]).transpose(3, 4)
    lower, upper = query_codes[:, None].chunk(2, dim=-1)
    # sums of products of integers this small are exact in float32
    products = torch.matmul(lower, (packed & (NUM_LEVELS - 1)).float()) + torch.matmul(upper, (packed >> 4).float())
    products = products.permute(0, 2, 3, 1, 4).flatten(3)
    scores = (layer.softmax_scale * offset)[..., None] + (layer.softmax_scale * step)[..., None] * products
    return capped(scores, layer.logits_soft_cap)
