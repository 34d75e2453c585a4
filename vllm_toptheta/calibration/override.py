"""What stands in for a model's attention while it runs over a whole text: the overrides, and what they share.

A model under an override (`model.overriding_attention`) asks it for the attention of every layer. Calibration observes
scores there, evaluation applies thresholds there, and neither knows how a model computes its query, key and value.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vllm_toptheta.reference import causal_scores, dense_attention, row_lse

__all__ = ["AttentionCall", "AttentionOverride", "DenseOverride", "block_bytes_on", "row_blocks", "windowed_attention"]

# small enough to stay in a CPU's cache between the passes over a block
_CPU_BLOCK_BYTES = 2 << 20
# as large as fits without being felt: on a GPU every kernel launch has its price
_GPU_BLOCK_BYTES = 1 << 28


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """What a layer asks for: the attention of the last rows of a sequence, each over the keys up to its own.

    Attributes:
        layer_idx: which layer of the model.
        query: `[num_queries, num_heads, head_size]` float, the last positions, after the position embedding.
        key: `[seq_len, num_kv_heads, head_size]` float, after the position embedding.
        value: `[seq_len, num_kv_heads, head_size]` float.
        softmax_scale: factor on the products of query and key.
        soft_cap: cap on the scores, scaled logits; None for a model without one.
        sinks: `[num_heads]` float32, attention sinks, one logit per head; None for a model without.
    """

    layer_idx: int
    query: Tensor
    key: Tensor
    value: Tensor
    softmax_scale: float
    soft_cap: float | None = None
    sinks: Tensor | None = None

    @property
    def num_before(self) -> int:
        """Keys that come before the first row's own."""
        return len(self.key) - len(self.query)

    @property
    def grouped_sinks(self) -> Tensor | None:
        """The sinks as `[num_kv_heads, group, 1]`."""
        return None if self.sinks is None else self.sinks.view(self.key.shape[1], -1, 1)

    def blocks(self, block_bytes: int | None = None) -> Iterator["AttentionCall"]:
        """Yields calls for consecutive rows, whose scores fit a bound.

        Args:
            block_bytes: as of `row_blocks`; None for what suits the device.
        """
        if block_bytes is None:
            block_bytes = block_bytes_on(self.query.device)
        before = self.num_before
        for start, stop in row_blocks(self.query.shape[1], len(self.key), block_bytes, start=before):
            query = self.query[start - before : stop - before]
            yield replace(self, query=query, key=self.key[:stop], value=self.value[:stop])


class AttentionOverride(ABC):
    """Causal self-attention over one whole sequence, layer by layer."""

    @abstractmethod
    def attend(self, call: AttentionCall) -> Tensor:
        """Returns the attention output of a layer.

        Args:
            call: of all rows of the sequence.

        Returns:
            `[seq_len, num_heads, head_size]` float; the caller casts it to the model's dtype.
        """


class DenseOverride(AttentionOverride):
    """Every key of every row: what sparse attention is compared with."""

    def attend(self, call: AttentionCall) -> Tensor:
        """See `AttentionOverride.attend`."""
        return torch.cat(
            [
                dense_attention(
                    block.query,
                    block.key,
                    block.value,
                    softmax_scale=block.softmax_scale,
                    logits_soft_cap=block.soft_cap,
                    sinks=block.sinks,
                ).output
                for block in call.blocks()
            ]
        )


def windowed_attention(call: AttentionCall, sliding_window: int) -> Tensor:
    """Dense attention of each row over the last `sliding_window` keys up to and including its own, and the sink.

    Args:
        call: of any rows.
        sliding_window: tokens, at least 1.

    Returns:
        `[num_queries, num_heads, head_size]` float32.
    """
    blocks = []
    for block in call.blocks():
        first = max(0, block.num_before + 1 - sliding_window)
        key, value = block.key[first:], block.value[first:].float()
        scores = causal_scores(block.query, key, softmax_scale=block.softmax_scale, logits_soft_cap=block.soft_cap)
        positions = torch.arange(first, len(block.key), device=key.device)
        is_behind = positions <= positions[block.num_before - first :, None] - sliding_window
        scores.masked_fill_(is_behind[:, None, :], -torch.inf)
        if call.sinks is None:
            weights = scores.softmax(dim=-1)
        else:
            weights = (scores - row_lse(scores, call.sinks).unsqueeze(-1)).exp_()
        grouped = weights.unflatten(1, (key.shape[1], -1))
        blocks.append(torch.einsum("qhgn,nhd->qhgd", grouped, value).flatten(1, 2))
    return torch.cat(blocks)


def block_bytes_on(device: torch.device) -> int:
    """Returns the bytes that a block of scores may take on a device.

    Args:
        device: where the scores are.
    """
    return _CPU_BLOCK_BYTES if device.type == "cpu" else _GPU_BLOCK_BYTES


def row_blocks(num_heads: int, seq_len: int, block_bytes: int, *, start: int = 0) -> Iterator[tuple[int, int]]:
    """Cuts the rows of causal attention into blocks whose float32 scores fit a bound.

    Args:
        num_heads: query heads.
        seq_len: keys of the last row.
        block_bytes: bytes that `num_heads * (stop - start) * stop` float32 scores may take; a block has at least one
            row, whatever that takes.
        start: the first row; row i sees i + 1 keys.

    Yields:
        (start, stop), the rows of a block, which see at most `stop` keys.
    """
    scores_per_head = block_bytes // (4 * num_heads)
    while start < seq_len:
        # the largest number of rows with rows * (start + rows) <= scores_per_head
        rows = (math.isqrt(start * start + 4 * scores_per_head) - start) // 2
        stop = min(seq_len, start + max(1, rows))
        yield start, stop
        start = stop
