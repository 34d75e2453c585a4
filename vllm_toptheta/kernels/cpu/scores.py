"""Exact scores of some of the keys on CPUs, and which keys every step scores exactly where it skips others."""

from __future__ import annotations

import torch

from vllm_toptheta.kernels.contract import LayerCall
from vllm_toptheta.kernels.cpu.batch import Batch
from vllm_toptheta.kernels.cpu.cache import keys_at, split_cache
from vllm_toptheta.limits import NUM_FIRST_ANCHORS, NUM_LAST_ANCHORS


def exact_scores(call: LayerCall, batch: Batch, positions: torch.Tensor) -> torch.Tensor:
    """Scores of the keys at `positions`, [num_seqs, num_kv_heads, group, width] float32.

    Args:
        call: Of a layer.
        batch: Its sequences.
        positions: [num_seqs, num_kv_heads, width] int64.
    """
    key_cache, _ = split_cache(call.cache.kv_cache)
    query = call.query.float().unflatten(1, (key_cache.shape[1], -1)) * call.layer.softmax_scale
    keys = keys_at(key_cache, batch.blocks, positions)
    return capped(torch.matmul(query, keys.transpose(2, 3)), call.layer.logits_soft_cap)


def capped(scores: torch.Tensor, logits_soft_cap: float | None) -> torch.Tensor:
    """Scores after the soft cap, if there is one."""
    return scores if logits_soft_cap is None else logits_soft_cap * torch.tanh(scores / logits_soft_cap)


def at_an_end(batch: Batch, block_size: int) -> torch.Tensor:
    """[num_seqs, max_len] bool: anchors, and what lies behind a sequence's last page that has codes.

    The page of the last token has none yet, or only since this step.
    """
    position = torch.arange(batch.visible.shape[1])
    last_page = (batch.seq_lens - 1) // block_size * block_size
    first_recent = torch.minimum(batch.seq_lens - NUM_LAST_ANCHORS, last_page)
    return (position < NUM_FIRST_ANCHORS) | (position >= first_recent[:, None])
