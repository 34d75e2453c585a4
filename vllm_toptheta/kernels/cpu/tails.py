"""The page tails on CPUs: running value sums, and codes where a layer has shadow keys."""

from __future__ import annotations

import torch

from vllm_toptheta.kernels.codec import NUM_LEVELS, ShadowCodec
from vllm_toptheta.kernels.contract import Layer, LayerCache, TailStep, check_tails
from vllm_toptheta.kernels.cpu.batch import ClosedPages
from vllm_toptheta.kernels.cpu.cache import split_cache


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
