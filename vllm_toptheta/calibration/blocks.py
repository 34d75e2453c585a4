"""Causal attention a block of rows at a time, so that no more scores exist than a block may take.

Calibration spends most of its time here. On a CPU a block of scores stays in the cache from the product that makes it
to the output; on a GPU it is as large as fits without being felt, because every kernel launch has its price.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_toptheta.calibration.override import AttentionCall, block_bytes_on, row_blocks
from vllm_toptheta.reference import causal_value_mean

__all__ = ["BlockSums", "SampledBlock", "ScoreBlock", "attend_blocks", "sampled_blocks"]


@dataclass(frozen=True)
class ScoreBlock:
    """The scores of consecutive rows of all heads, before the softmax.

    Attributes:
        start: first row of the block; row i sees i + 1 keys.
        stop: one past the last row, and the keys that it sees.
        scores: `[num_kv_heads, group, stop - start, stop]` float32, scaled logits, minus infinity at later keys.
    """

    start: int
    stop: int
    scores: Tensor

    @property
    def rows(self) -> slice:
        """The rows of the block."""
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class BlockSums:
    """What a block of rows adds up to, each `[num_kv_heads, group, stop - start, 1]` float32.

    Attributes:
        start: first row of the block; row i sees i + 1 keys.
        stop: one past the last row.
        largest: m, the largest score of a row, or its sink, scaled logits.
        lost: the sum of exp(s - m) over the keys not kept.
        num_discarded: keys not kept, of the first `stop`: those after the row count as not kept.
    """

    start: int
    stop: int
    largest: Tensor
    lost: Tensor
    num_discarded: Tensor


def attend_blocks(
    call: AttentionCall,
    *,
    select: Callable[[ScoreBlock], Tensor | None],
    report: Callable[[BlockSums], None] | None = None,
    block_bytes: int | None = None,
) -> Tensor:
    """Causal attention over a whole sequence over the keys that `select` chooses, with full compensation.

    The denominator is that of all keys, and of the sink, and what is lost is given to the mean of the values, as in
    `reference.FULL_COMPENSATION`.

    Args:
        call: of all rows of the sequence.
        select: called with each block; returns the thresholds `[num_kv_heads, group, rows]` float32 that the scores
            of the block must reach, scaled logits, or None to keep every key.
        report: called with the sums of each block for which `select` returned thresholds.
        block_bytes: bytes that the scores of a block may take; None for what suits the device.

    Returns:
        `[seq_len, num_heads, head_size]` float32.
    """
    query, key, value, soft_cap = call.query, call.key, call.value, call.soft_cap
    seq_len, num_heads, _ = query.shape
    num_kv_heads = key.shape[1]
    # heads first, and the heads of a group as rows of one product
    queries = (query.float() * call.softmax_scale).transpose(0, 1).unflatten(0, (num_kv_heads, -1))
    keys = key.float().permute(1, 2, 0)
    values = value.float().transpose(0, 1).contiguous()
    value_mean = causal_value_mean(value.float(), seq_len).transpose(0, 1).unsqueeze(1)
    sinks = None if call.grouped_sinks is None else call.grouped_sinks.unsqueeze(-1)
    output = torch.empty_like(queries)
    for start, stop in row_blocks(num_heads, seq_len, block_bytes or block_bytes_on(query.device)):
        rows = queries[:, :, start:stop]
        scores = (rows.flatten(1, 2) @ keys[..., :stop]).unflatten(1, rows.shape[1:3])
        if soft_cap is not None:
            scores.div_(soft_cap).tanh_().mul_(soft_cap)
        in_future = torch.ones(stop - start, stop - start, dtype=torch.bool, device=query.device).triu(1)
        scores[..., start:].masked_fill_(in_future, -torch.inf)
        block = ScoreBlock(start, stop, scores)

        threshold = select(block)
        discarded = num_discarded = lost = None
        if threshold is not None:
            # 1.0 and 0.0: a product with floats is several times faster than masking by booleans
            discarded = torch.lt(scores, threshold.unsqueeze(-1), out=torch.empty_like(scores))
            if report is not None:
                num_discarded = discarded.sum(dim=-1, keepdim=True)
        largest = scores.amax(dim=-1, keepdim=True)
        if sinks is not None:
            largest = torch.maximum(largest, sinks)
        weights = scores.sub_(largest).exp_()
        denominator = weights.sum(dim=-1, keepdim=True)
        if sinks is not None:
            denominator += torch.exp(sinks - largest)
        if discarded is not None:
            # summed by itself: as a difference of two sums near 1 it would be rounding where little is lost
            lost = discarded.mul_(weights).sum(dim=-1, keepdim=True)
            weights.sub_(discarded)
        result = (weights.flatten(1, 2) @ values[:, :stop]).unflatten(1, rows.shape[1:3])
        if lost is not None:
            result.addcmul_(lost, value_mean[:, :, start:stop])
        output[:, :, start:stop] = result.div_(denominator)
        if report is not None and lost is not None and num_discarded is not None:
            report(BlockSums(start, stop, largest, lost, num_discarded))
    return output.flatten(0, 1).transpose(0, 1)


@dataclass(frozen=True)
class SampledBlock:
    """The scores of some of the rows of all heads, before the softmax.

    Attributes:
        rows: which of the sampled rows.
        lengths: `[num_rows]` int64, the keys that they see.
        scores: `[num_kv_heads, group, num_rows, longest]` float32, scaled logits, minus infinity at later keys.
    """

    rows: slice
    lengths: Tensor
    scores: Tensor


def sampled_blocks(call: AttentionCall, lengths: Tensor, *, block_bytes: int | None = None) -> Iterator[SampledBlock]:
    """Yields the scores of sampled rows, as many at a time as a block may hold.

    Args:
        call: of all rows of the sequence.
        lengths: `[num_rows]` int64 ascending, the keys that the rows see; on the host, where its numbers are needed.
        block_bytes: bytes that the scores of a block of rows may take; None for what suits the device.
    """
    query, key, soft_cap = call.query, call.key, call.soft_cap
    num_heads, num_kv_heads = query.shape[1], key.shape[1]
    keys = key.float().permute(1, 2, 0)
    rows_seen = lengths.to(query.device)
    queries = (query[rows_seen - 1].float() * call.softmax_scale).transpose(0, 1).unflatten(0, (num_kv_heads, -1))
    block_rows = max(1, (block_bytes or block_bytes_on(query.device)) // (4 * num_heads * len(query)))
    for start in range(0, len(lengths), block_rows):
        rows = slice(start, start + block_rows)
        longest = int(lengths[rows][-1])
        block = queries[:, :, rows]
        scores = (block.flatten(1, 2) @ keys[..., :longest]).unflatten(1, block.shape[1:3])
        if soft_cap is not None:
            scores.div_(soft_cap).tanh_().mul_(soft_cap)
        in_future = torch.arange(longest, device=query.device) >= rows_seen[rows, None]
        scores.masked_fill_(in_future, -torch.inf)
        yield SampledBlock(rows, rows_seen[rows], scores)
