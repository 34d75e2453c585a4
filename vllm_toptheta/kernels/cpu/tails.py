"""The page tails on CPUs: running value sums, and codes where a layer has shadow keys or copies."""

from __future__ import annotations

import torch

from vllm_toptheta.kernels.codec import LARGEST_STEP, LEAST_STEP, NUM_LEVELS, VALUE_LEVELS, ShadowCodec, TierCodec
from vllm_toptheta.kernels.contract import Layer, LayerCache, TailStep, check_tails
from vllm_toptheta.kernels.cpu.batch import ClosedPages
from vllm_toptheta.kernels.cpu.cache import split_cache
from vllm_toptheta.kernels.pages import CopyViews
from vllm_toptheta.limits import NUM_FIRST_ANCHORS


def write_tails(step: TailStep, cache: LayerCache, layer: Layer) -> None:
    """Write the tails of all pages that a step's tokens fill, before anything of the step is decoded.

    Args:
        step: The step, with all of its tokens, prepared (`batch.prepare_tails`).
        cache: The layer's pages; the tokens' keys and values must have been written.
        layer: The layer.

    Raises:
        ValueError: A shape, dtype or stride is not as the records describe it; the message starts with the field's
            name.
    """
    check_tails(cache, layer)
    if step.prepared is None:
        return
    if cache.value_sum is not None:
        _write_value_sums(cache.kv_cache, cache.value_sum, step.prepared)
    if layer.shadow is not None and cache.codes is not None:
        _write_codes(cache.kv_cache, cache.codes, step.prepared, layer.shadow.codec)
    if layer.tiers is not None and cache.codes is not None:
        _write_copies(cache.kv_cache, cache.codes, step.prepared, layer.tiers.codec)


def _write_value_sums(kv_cache: torch.Tensor, value_sum: torch.Tensor, pages: ClosedPages) -> None:
    """Write the running value sum of every page.

    A page's sum is made from its predecessor's sum and its own rows, never by adding tokens one at a time, so writing
    it again (a step repeated, a token rejected and replaced) gives the same sum, up to rounding.
    """
    _, value_cache = split_cache(kv_cache)
    sums = value_cache[pages.blocks].sum(dim=3, dtype=torch.float32)
    sums.masked_fill_(~pages.valid[:, :, None, None], 0.0)
    sums = sums.cumsum(dim=1)
    # a sequence may begin behind a prefix that another one computes in this very step: first those that others stand on
    pending = torch.ones(len(pages.blocks), dtype=torch.bool)
    while bool(pending.any()):
        unwritten = pages.blocks[pending][pages.valid[pending]]
        ready = pending & (pages.is_first | ~torch.isin(pages.previous, unwritten))
        before = value_sum[pages.previous[ready]].masked_fill(pages.is_first[ready, None, None], 0.0)
        value_sum[pages.blocks[ready][pages.valid[ready]]] = (before[:, None] + sums[ready])[pages.valid[ready]]
        pending &= ~ready


def _write_codes(kv_cache: torch.Tensor, codes: torch.Tensor, pages: ClosedPages, codec: ShadowCodec) -> None:
    """Write the shadow keys of every page, from the keys in it and nothing else."""
    key_cache, _ = split_cache(kv_cache)
    blocks = pages.blocks[pages.valid]
    centred = key_cache[blocks].float() - codec.key_mean[:, None]
    steps = torch.matmul(centred, codec.encoder)
    lower, upper = torch.floor(steps + NUM_LEVELS // 2).clamp(0, NUM_LEVELS - 1).to(torch.uint8).chunk(2, dim=-1)
    codes[blocks] = lower | upper << 4


def _write_copies(kv_cache: torch.Tensor, codes: torch.Tensor, pages: ClosedPages, codec: TierCodec) -> None:
    """Write the copies of every page, from the keys and values in it and the first keys of the sequence."""
    key_cache, value_cache = split_cache(kv_cache)
    views = CopyViews.of(codes, len(codec.rotation))
    blocks = pages.blocks[pages.valid]
    starts = pages.sequence_start[:, None].expand_as(pages.blocks)[pages.valid]
    centre = key_cache[starts, :, 1:NUM_FIRST_ANCHORS].float().mean(dim=2, keepdim=True)

    keys = torch.matmul(key_cache[blocks].float() - centre, codec.rotation.mT)
    step = _as_float16(keys.abs().amax(dim=-1) / (NUM_LEVELS // 2))
    levels = torch.floor(keys / step.float()[..., None] + NUM_LEVELS // 2).clamp(0, NUM_LEVELS - 1)
    lower, upper = levels.to(torch.uint8).chunk(2, dim=-1)
    views.key_codes[blocks], views.key_step[blocks] = lower | upper << 4, step

    values = torch.matmul(value_cache[blocks].float(), codec.rotation.mT)
    largest = values.abs().amax(dim=-1, keepdim=True).clamp(min=LEAST_STEP)
    levels = torch.floor(2 * values / largest + VALUE_LEVELS // 2).clamp(0, VALUE_LEVELS - 1)
    overlap = (values * (levels - (VALUE_LEVELS - 1) / 2)).sum(dim=-1).clamp(min=LEAST_STEP)
    quarters = levels.to(torch.uint8).chunk(4, dim=-1)
    views.value_codes[blocks] = quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6
    views.value_step[blocks] = _as_float16(values.square().sum(dim=-1) / overlap)


def _as_float16(step: torch.Tensor) -> torch.Tensor:
    return step.clamp(LEAST_STEP, LARGEST_STEP).half()
