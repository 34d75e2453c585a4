"""What shadow keys do while a model reads a text: moments of keys and queries, shortfalls of scores, candidates.

Pure functions of tensors. `shadow.ShadowCalibration` adds up what they return.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_toptheta.calibration.blocks import sampled_blocks
from vllm_toptheta.calibration.override import AttentionCall
from vllm_toptheta.reference import (
    KeyProjection,
    ShadowQuery,
    always_candidates,
    encode_keys,
    quantize_query,
    row_lse,
    shadow_scores,
)

__all__ = [
    "MARGIN_EDGES",
    "AlwaysRead",
    "CandidateMeasures",
    "KeyMoments",
    "CandidateRows",
    "key_moments",
    "measure_candidates",
    "shortfall_histogram",
]

# margins that can come out, scaled logits: 2 % apart, so that their number does not grow with the size of scores
_FIRST_MARGIN, _RATIO, _NUM_MARGINS = 0.01, 1.02, 582
MARGIN_EDGES = torch.cat([torch.zeros(1), _FIRST_MARGIN * _RATIO ** torch.arange(_NUM_MARGINS)])
# integers add up to the same sum in any order, which floats on a GPU do not
_UNITS_PER_MASS = 1 << 40


@dataclass(frozen=True)
class AlwaysRead:
    """Which keys are candidates whatever they score; in tokens.

    Attributes:
        num_sink: the first ones.
        num_recent: the last ones.
        block_size: of a page; that of the newest token has no codes yet.
    """

    num_sink: int
    num_recent: int
    block_size: int

    def mask(self, lengths: Tensor, seq_len: int) -> Tensor:
        """Returns `[num_rows, seq_len]` bool for rows that see `lengths` keys."""
        return always_candidates(
            lengths, seq_len, num_sink=self.num_sink, num_recent=self.num_recent, block_size=self.block_size
        )


@dataclass(frozen=True)
class KeyMoments:
    """Moments of a sequence, float32.

    Attributes:
        num_keys: keys behind them.
        key_mean: `[num_kv_heads, head_size]`.
        key_covariance: `[num_kv_heads, head_size, head_size]`, over the keys themselves (division by their number).
        query_moment: `[num_kv_heads, head_size, head_size]`, mean of q q^T over the queries of the group.
    """

    num_keys: int
    key_mean: Tensor
    key_covariance: Tensor
    query_moment: Tensor


@dataclass(frozen=True)
class CandidateMeasures:
    """What every sampled row reads and leaves unread with some margins.

    Attributes:
        unread_mass: `[num_heads, num_rows]` float32, share of the softmax that no candidate holds.
        estimate: the same shape, what r = 1 makes of that: exp(theta - m) for each such key, over the denominator.
        candidates: `[num_kv_heads, num_rows]` int64, keys.
    """

    unread_mass: Tensor
    estimate: Tensor
    candidates: Tensor


def key_moments(query: Tensor, key: Tensor) -> KeyMoments:
    """Returns the moments from which a projection is fitted.

    Args:
        query: `[seq_len, num_heads, head_size]` float.
        key: `[num_keys, num_kv_heads, head_size]` float, at least one.
    """
    keys = key.float().transpose(0, 1)
    mean = keys.mean(dim=1)
    centred = keys - mean[:, None]
    # the queries of a group one below the other
    queries = query.float().transpose(0, 1).unflatten(0, (key.shape[1], -1)).flatten(1, 2)
    return KeyMoments(
        num_keys=len(key),
        key_mean=mean,
        key_covariance=centred.mT @ centred / len(key),
        query_moment=queries.mT @ queries / queries.shape[1],
    )


@dataclass(frozen=True)
class CandidateBlock:
    """Some of the rows, for all heads; scores are scaled logits.

    Attributes:
        lengths: `[num_rows]` int64, the keys that the rows see.
        scores: `[num_heads, num_rows, longest]` float32, minus infinity at later keys.
        shadow_scores: the same shape, of the keys' shadows, later keys included.
        thresholds: `[num_heads, num_rows, 1]` float32.
        always_read: `[num_rows, longest]` bool, keys that are candidates whatever they score.
    """

    lengths: Tensor
    scores: Tensor
    shadow_scores: Tensor
    thresholds: Tensor
    always_read: Tensor


@dataclass(frozen=True)
class CandidateRows:
    """Sampled rows of a layer, and what chooses the keys for them.

    Attributes:
        call: of all rows of the sequence.
        lengths: `[num_rows]` int64 ascending, the keys that the sampled rows see; on the host.
        thresholds: `[num_rows, num_heads]` float32, scaled logits.
        projection: of the layer.
        always_read: keys that are candidates whatever they score.
        block_bytes: bytes that the scores of a block of rows may take; None for what suits the device.
    """

    call: AttentionCall
    lengths: Tensor
    thresholds: Tensor
    projection: KeyProjection
    always_read: AlwaysRead
    block_bytes: int | None = None

    @property
    def sinks(self) -> Tensor | None:
        """Of the layer, `[num_heads, 1]` float32; None without."""
        return None if self.call.sinks is None else self.call.sinks[:, None]

    def blocks(self) -> Iterator[CandidateBlock]:
        """Yields the rows, as many at a time as a block may hold."""
        call = self.call
        lengths = self.lengths.to(call.query.device)
        codes = encode_keys(call.key, self.projection)
        sampled = quantize_query(call.query[lengths - 1], self.projection, softmax_scale=call.softmax_scale)
        for block in sampled_blocks(call, self.lengths, block_bytes=self.block_bytes):
            longest = block.scores.shape[-1]
            part = ShadowQuery(sampled.codes[block.rows], sampled.step[block.rows], sampled.offset[block.rows])
            yield CandidateBlock(
                lengths=block.lengths,
                scores=block.scores.flatten(0, 1),
                shadow_scores=shadow_scores(part, codes[:longest], logits_soft_cap=call.soft_cap).transpose(0, 1),
                thresholds=self.thresholds[block.rows].T.unsqueeze(-1),
                always_read=self.always_read.mask(block.lengths, longest),
            )


def shortfall_histogram(rows: CandidateRows) -> Tensor:
    """Returns how much of the survivors' softmax mass needs which margin.

    The shadow of a survivor falls short of the threshold by some number, which a margin has to cover; keys that are
    always read need none.

    Args:
        rows: what to look at.

    Returns:
        `[num_heads, len(MARGIN_EDGES)]` int64: the mass that needs a margin of that edge and no smaller one, in
        2^-40 of a row's softmax. What needs more than the largest is counted there.
    """
    num_heads, num_margins, device = rows.call.query.shape[1], len(MARGIN_EDGES), rows.call.query.device
    histogram = torch.zeros(num_heads * num_margins, dtype=torch.int64, device=device)
    first_of_head = torch.arange(num_heads, device=device)[:, None, None] * num_margins
    sinks = rows.sinks
    for block in rows.blocks():
        mass = (block.scores - row_lse(block.scores, sinks).unsqueeze(-1)).exp_()
        mass.masked_fill_(block.scores < block.thresholds, 0.0)
        shortfall = (block.thresholds - block.shadow_scores).masked_fill_(block.always_read, 0.0)
        # a hair more than the logarithm says, so that rounding never makes a margin too small
        steps = (shortfall.clamp(min=_FIRST_MARGIN) / _FIRST_MARGIN).log_().div_(math.log(_RATIO)).add_(1e-3).ceil_()
        place = steps.add_(1.0).clamp_(max=num_margins - 1).masked_fill_(shortfall <= 0, 0.0).long()
        units = mass.mul_(_UNITS_PER_MASS).long()
        histogram.scatter_add_(0, place.add_(first_of_head).flatten(), units.flatten())
    return histogram.unflatten(0, (num_heads, num_margins))


def measure_candidates(rows: CandidateRows, margin: Tensor) -> CandidateMeasures:
    """Returns what rows read and leave unread in mode `shadow`.

    Args:
        rows: what to look at.
        margin: `[num_heads]` float32, scaled logits.
    """
    query, num_kv_heads = rows.call.query, rows.call.key.shape[1]
    num_heads, device = query.shape[1], query.device
    masses, candidate_counts = [], []
    sinks = rows.sinks
    for block in rows.blocks():
        scores, thresholds, lengths = block.scores, block.thresholds, block.lengths
        visible = torch.arange(scores.shape[-1], device=device) < lengths[:, None]
        wanted = (block.shadow_scores >= thresholds - margin[:, None, None]) & visible
        candidates = wanted.unflatten(0, (num_kv_heads, -1)).any(dim=1) | block.always_read
        num_candidates = candidates.sum(dim=-1)
        log_denominator = row_lse(scores, sinks)
        # a threshold above all of them stops there: of such a row nothing but the mean or the sink is left
        largest = scores.amax(dim=-1) if sinks is None else torch.maximum(scores.amax(dim=-1), sinks)
        level = torch.minimum(thresholds.squeeze(-1), largest) - log_denominator
        mass = (scores - log_denominator.unsqueeze(-1)).exp_()
        group = num_heads // num_kv_heads
        unread_mass = mass.masked_fill_(candidates.repeat_interleave(group, dim=0), 0.0).sum(dim=-1)
        estimate = (lengths - num_candidates).repeat_interleave(group, dim=0) * level.exp()
        masses.append(torch.stack([unread_mass, estimate]))
        candidate_counts.append(num_candidates)
    unread_mass, estimate = torch.cat(masses, dim=-1)
    return CandidateMeasures(unread_mass, estimate, torch.cat(candidate_counts, dim=-1))
