"""What stands in for a model's attention while it runs over a whole text: the routes, and what they share.

A model put on a route (`model.routed`) asks it for the attention of every layer. Calibration observes scores there,
evaluation applies thresholds there, and neither knows how a model computes its query, key and value.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from vllm_toptheta.reference import causal_scores, dense_attention

__all__ = ["AttentionRoute", "DenseRoute", "block_bytes_on", "row_blocks", "windowed_attention"]

# small enough to stay in a CPU's cache between the passes over a block
_CPU_BLOCK_BYTES = 2 << 20
# as large as fits without being felt: on a GPU every kernel launch has its price
_GPU_BLOCK_BYTES = 1 << 28


class AttentionRoute(ABC):
    """Causal self-attention over one whole sequence, layer by layer."""

    @abstractmethod
    def attend(
        self,
        layer_idx: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        softmax_scale: float,
        soft_cap: float | None,
    ) -> Tensor:
        """Returns the attention output of a layer.

        Args:
            layer_idx: which layer of the model asks.
            query: `[seq_len, num_heads, head_size]` float, after the position embedding.
            key: `[seq_len, num_kv_heads, head_size]` float, after the position embedding.
            value: `[seq_len, num_kv_heads, head_size]` float.
            softmax_scale: factor on the products of query and key.
            soft_cap: cap on the scores, scaled logits; None for a model without one.

        Returns:
            `[seq_len, num_heads, head_size]` float; the caller casts it to the model's dtype.
        """


class DenseRoute(AttentionRoute):
    """Every key of every row: what sparse attention is compared with."""

    def attend(
        self,
        layer_idx: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        softmax_scale: float,
        soft_cap: float | None,
    ) -> Tensor:
        """See `AttentionRoute.attend`."""
        return torch.cat(
            [
                dense_attention(
                    query[start:stop],
                    key[:stop],
                    value[:stop],
                    softmax_scale=softmax_scale,
                    logits_soft_cap=soft_cap,
                ).output
                for start, stop in row_blocks(query.shape[1], query.shape[0], block_bytes_on(query.device))
            ]
        )


def windowed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    softmax_scale: float,
    soft_cap: float | None,
    sliding_window: int,
) -> Tensor:
    """Dense attention of each query over the last `sliding_window` keys up to and including its own.

    Args:
        query: `[seq_len, num_heads, head_size]` float.
        key: `[seq_len, num_kv_heads, head_size]` float.
        value: `[seq_len, num_kv_heads, head_size]` float.
        softmax_scale: factor on the products of query and key.
        soft_cap: cap on the scores, scaled logits; None for a model without one.
        sliding_window: tokens, at least 1.

    Returns:
        `[seq_len, num_heads, head_size]` float32.
    """
    seq_len, num_heads, _ = query.shape
    num_kv_heads = key.shape[1]
    blocks = []
    for start, stop in row_blocks(num_heads, seq_len, block_bytes_on(query.device)):
        first = max(0, start + 1 - sliding_window)
        scores = causal_scores(
            query[start:stop], key[first:stop], softmax_scale=softmax_scale, logits_soft_cap=soft_cap
        )
        positions = torch.arange(first, stop, device=query.device)
        is_behind = positions <= positions[start - first :, None] - sliding_window
        weights = scores.masked_fill(is_behind[:, None, :], -torch.inf).softmax(dim=-1)
        grouped = weights.unflatten(1, (num_kv_heads, -1))
        blocks.append(torch.einsum("qhgn,nhd->qhgd", grouped, value[first:stop].float()).flatten(1, 2))
    return torch.cat(blocks)


def block_bytes_on(device: torch.device) -> int:
    """Returns the bytes that a block of scores may take on a device.

    Args:
        device: where the scores are.
    """
    return _CPU_BLOCK_BYTES if device.type == "cpu" else _GPU_BLOCK_BYTES


def row_blocks(num_heads: int, seq_len: int, block_bytes: int) -> Iterator[tuple[int, int]]:
    """Cuts the rows of causal attention into blocks whose float32 scores fit a bound.

    Args:
        num_heads: query heads.
        seq_len: rows, and keys of the last row.
        block_bytes: bytes that `num_heads * (stop - start) * stop` float32 scores may take; a block has at least one
            row, whatever that takes.

    Yields:
        (start, stop), the rows of a block, which see at most `stop` keys.
    """
    scores_per_head = block_bytes // (4 * num_heads)
    start = 0
    while start < seq_len:
        # the largest number of rows with rows * (start + rows) <= scores_per_head
        rows = (math.isqrt(start * start + 4 * scores_per_head) - start) // 2
        stop = min(seq_len, start + max(1, rows))
        yield start, stop
        start = stop
