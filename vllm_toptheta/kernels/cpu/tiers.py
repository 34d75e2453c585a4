"""Top-Theta attention of one new token per sequence by tiers, on CPUs: exact rows, copies, and the mean value.

`reference.tiers` has the formulas. What `gpu.tiers.decode` is on GPUs, but that no step is so short that all keys are
read.
"""

from __future__ import annotations

import torch

from vllm_toptheta.kernels.codec import NUM_LEVELS, VALUE_LEVELS, TierCodec
from vllm_toptheta.kernels.contract import LayerCall
from vllm_toptheta.kernels.cpu.batch import Batch
from vllm_toptheta.kernels.cpu.cache import packed_positions, split_cache, values_at
from vllm_toptheta.kernels.cpu.scores import at_an_end, capped, exact_scores
from vllm_toptheta.kernels.cpu.scratch import Counted, CpuScratch
from vllm_toptheta.kernels.cpu.thresholds import anchor_lse, thresholds_at
from vllm_toptheta.kernels.cpu.values import weigh_values, with_sinks
from vllm_toptheta.kernels.pages import CopyViews
from vllm_toptheta.limits import NUM_FIRST_ANCHORS

QUERY_LEVELS = 127


def weigh(batch: Batch, call: LayerCall, scratch: CpuScratch) -> None:
    """Score the copies of all keys, read heavy rows exactly and light values as copies."""
    layer, codes = call.layer, call.cache.codes
    thresholds, tiers = layer.thresholds, layer.tiers
    if thresholds is None or tiers is None or codes is None:
        raise ValueError("tiers: None, expected a layer with thresholds and copies")
    copies = CopyViews.of(codes, call.query.shape[2])
    num_seqs, num_heads, head_size = call.query.shape
    num_kv_heads, block_size = call.cache.kv_cache.shape[1:3]
    grouped = call.query.float().view(num_seqs, num_kv_heads, -1, head_size)
    key_cache, value_cache = split_cache(call.cache.kv_cache)
    always = at_an_end(batch, block_size) | batch.is_dense
    scores = _copy_scores(grouped, key_cache, copies, batch, tiers.codec) * layer.softmax_scale
    # what memory without copies holds may be anything, NaN included
    scores = capped(scores, layer.logits_soft_cap).where(~always[:, None, None], -torch.inf)

    anchor_scores = exact_scores(call, batch, batch.anchors[:, None].expand(-1, num_kv_heads, -1)).flatten(1, 2)
    theta = thresholds_at(thresholds, batch, lambda positions: anchor_scores, layer.sinks)
    theta = theta.view(num_seqs, num_kv_heads, -1, 1)
    heavy = anchor_lse(anchor_scores, layer.sinks).view_as(theta) + tiers.log_heavy
    is_exact = ((scores >= heavy).any(dim=2) | always[:, None]) & batch.visible[:, None]
    scores = scores.where(~is_exact[:, :, None], -torch.inf)
    is_light = (scores >= theta).any(dim=2) & batch.visible[:, None] & ~is_exact

    exact_positions, exact_valid = packed_positions(is_exact)
    exact = exact_scores(call, batch, exact_positions).where(exact_valid[:, :, None], -torch.inf)
    scores = scores.where(batch.visible[:, None, None], -torch.inf)
    maximum, of_sink = with_sinks(torch.maximum(exact.amax(dim=3), scores.amax(dim=3)), layer.sinks)
    maximum = maximum[..., None]
    survives = (exact >= theta) & exact_valid[:, :, None]
    kept = torch.exp(exact - maximum).where(survives, 0.0)
    weights = torch.exp(scores - maximum)
    light = weights.where(scores >= theta, 0.0)
    of_keys = torch.exp(exact - maximum).sum(dim=3) + weights.sum(dim=3)
    total = of_keys + of_sink
    kept_sum = kept.sum(dim=3) + light.sum(dim=3)
    lost_mass = ((of_keys - kept_sum) / total).clamp(min=0.0)
    kept_sum = kept_sum + of_sink

    read = survives.any(dim=2)
    if call.cache.value_sum is not None:
        read |= exact_valid & batch.is_open[:, None].expand_as(is_exact).gather(2, exact_positions)
    index, valid = packed_positions(read)
    positions = exact_positions.gather(2, index)
    denominator = total if layer.denominator_compensation else None
    output = weigh_values(
        kept.gather(3, index[:, :, None].expand(-1, -1, kept.shape[2], -1)).where(valid[:, :, None], 0.0),
        kept_sum,
        lost_mass,
        values_at(value_cache, batch.blocks, positions),
        positions,
        valid,
        batch,
        denominator=denominator,
        value_sum=call.cache.value_sum,
    )
    divisor = kept_sum.clamp(min=torch.finfo(torch.float32).tiny) if denominator is None else denominator
    output += _weigh_copies(light, is_light, copies, batch, tiers.codec) / divisor[..., None]
    call.output.copy_(output.view(num_seqs, num_heads, head_size))
    counted = Counted(
        batch.totals,
        batch.is_counted,
        value_rows_read=valid.sum(dim=2),
        lost_mass=lost_mass.view(num_seqs, num_heads),
        keys_read=is_exact.sum(dim=2),
        copies_read=is_light.sum(dim=2),
    )
    scratch.add(layer.counters, counted)


def _copy_scores(
    grouped: torch.Tensor, key_cache: torch.Tensor, copies: CopyViews, batch: Batch, codec: TierCodec
) -> torch.Tensor:
    """q . k of the copies, [num_seqs, num_kv_heads, group, max_len] float32; anything where there are none.

    Args:
        grouped: [num_seqs, num_kv_heads, group, head_size] float32, queries.
        key_cache: As of `split_cache`.
    """
    turned = torch.matmul(grouped, codec.rotation.mT)
    step = turned.abs().amax(dim=-1, keepdim=True) / QUERY_LEVELS
    step = torch.where(step > 0, step, 1.0)
    query_codes = torch.floor(turned / step + 0.5)
    centre = key_cache[batch.blocks[:, 0], :, 1:NUM_FIRST_ANCHORS].float().mean(dim=2)
    offset = torch.einsum("nhgd,nhd->nhg", grouped, centre)
    packed = copies.key_codes[batch.blocks].transpose(3, 4)
    lower, upper = query_codes[:, None].chunk(2, dim=-1)
    # sums of products of integers this small are exact in float32
    products = torch.matmul(lower, (packed & (NUM_LEVELS - 1)).float()) + torch.matmul(upper, (packed >> 4).float())
    products = products.permute(0, 2, 3, 1, 4).flatten(3) - (NUM_LEVELS - 1) / 2 * query_codes.sum(-1, keepdim=True)
    key_step = copies.key_step[batch.blocks].transpose(1, 2).flatten(2).float()
    return offset[..., None] + step * products * key_step[:, :, None]


def _weigh_copies(
    weights: torch.Tensor, is_light: torch.Tensor, copies: CopyViews, batch: Batch, codec: TierCodec
) -> torch.Tensor:
    """Sum of weights times copies of values, [num_seqs, num_kv_heads, group, head_size] float32.

    Args:
        weights: [num_seqs, num_kv_heads, group, max_len] float32.
        is_light: [num_seqs, num_kv_heads, max_len] bool, positions of which copies are read.
    """
    num_kv_heads, block_size = copies.key_step.shape[1:]
    positions, valid = packed_positions(is_light)
    block = batch.blocks[:, None].expand(-1, num_kv_heads, -1).gather(2, positions // block_size)
    at = (block, torch.arange(num_kv_heads)[:, None], positions % block_size)
    packed, step = copies.value_codes[at], copies.value_step[at].float()
    quarters = [(packed >> shift & (VALUE_LEVELS - 1)).float() for shift in (0, 2, 4, 6)]
    levels = torch.cat(quarters, dim=-1) - (VALUE_LEVELS - 1) / 2
    at_positions = positions[:, :, None].expand(-1, -1, weights.shape[2], -1)
    scaled = (weights.gather(3, at_positions) * step[:, :, None]).where(valid[:, :, None], 0.0)
    return torch.matmul(torch.matmul(scaled, levels), codec.rotation)
