"""Observes the k-th largest score of every row while a model reads a text.

With top-k at calibration (TAKC; Top-Theta Attention, arXiv 2502.08363) a layer hands on the output of exact top-k
attention, so that deeper layers are calibrated on the activations they will see when served.
"""

import math
from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_toptheta.calibration.blocks import ScoreBlock, attend_blocks
from vllm_toptheta.calibration.override import AttentionCall, AttentionOverride
from vllm_toptheta.reference import Placement, row_lse

__all__ = ["TopKOverride", "largest_with_kth", "observe_top_k"]


class TopKOverride(AttentionOverride):
    """Reports the k-th largest scores of some rows, for every layer it is asked for.

    Args:
        target_ks: the k to observe.
        lengths: `[num_rows]` ascending, the keys that the rows to observe see; None for every row.
        sparse_k: hand on exact top-k attention with this k, one of `target_ks`, with exact denominator and value mean
            compensation; None to hand on dense attention.
        dense_layers: layers that hand on dense attention whatever `sparse_k` is. They are observed all the same, so
            that they can be made sparse later.
        report: called with the layer and what `observe_top_k` returns for it.
        placement: what the thresholds will apply to.
    """

    def __init__(
        self,
        *,
        target_ks: Sequence[int],
        lengths: NDArray[np.int64] | None = None,
        sparse_k: int | None,
        dense_layers: Collection[int],
        report: Callable[[int, Tensor], None],
        placement: Placement = "pre_softmax",
    ) -> None:
        self.target_ks = target_ks
        self.lengths = lengths
        self.sparse_k = sparse_k
        self.dense_layers = dense_layers
        self.report = report
        self.placement = placement

    def attend(self, call: AttentionCall) -> Tensor:
        """See `AttentionOverride.attend`."""
        output, kth_scores = observe_top_k(
            call,
            target_ks=self.target_ks,
            lengths=self.lengths,
            sparse_k=None if call.layer_idx in self.dense_layers else self.sparse_k,
            placement=self.placement,
        )
        self.report(call.layer_idx, kth_scores)
        return output


def observe_top_k(
    call: AttentionCall,
    *,
    target_ks: Sequence[int],
    lengths: NDArray[np.int64] | None = None,
    sparse_k: int | None,
    placement: Placement = "pre_softmax",
    block_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention over a whole sequence, dense or exact top-k, that also returns k-th largest scores.

    Agrees with `reference.top_k_attention` and `reference.dense_attention`.

    Args:
        call: of all rows of the sequence.
        target_ks: the k to observe, each at least 1.
        lengths: `[num_rows]` ascending, the keys that the rows to observe see; None for every row. Searching fewer
            rows is what makes a calibration on a sample of them fast.
        sparse_k: the output keeps the scores that reach the k-th largest with this k, one of `target_ks`, with exact
            denominator and value mean compensation; None for dense attention.
        placement: unit of what is returned: scaled logits before the softmax, the logarithm of the dense probability
            after it.
        block_bytes: bytes that the scores of a block of rows may take; None for what suits the device.

    Returns:
        The output `[seq_len, num_heads, head_size]` float32, and the k-th largest scores
        `[len(target_ks), num_heads, num_rows]` float32, in the unit of `placement`; minus infinity where a row sees
        fewer than k keys.
    """
    seq_len, num_heads, _ = call.query.shape
    num_kv_heads = call.key.shape[1]
    groups = (num_kv_heads, num_heads // num_kv_heads)
    observed = np.arange(1, seq_len + 1) if lengths is None else lengths
    kth_scores = call.query.new_full((len(target_ks), *groups, len(observed)), -torch.inf, dtype=torch.float32)

    def select(block: ScoreBlock) -> Tensor | None:
        first, end = np.searchsorted(observed, [block.start + 1, block.stop + 1])
        is_sampled = end - first < block.stop - block.start
        scores = block.scores
        if is_sampled:
            rows = torch.from_numpy(observed[first:end] - 1 - block.start).to(scores.device)
            scores = scores.index_select(2, rows)
        place = kth_scores[..., first:end]
        candidates = scores
        # the k largest hold the smaller k largest, so each search leaves less to the next
        for index in sorted(range(len(target_ks)), key=lambda index: -target_ks[index]):
            if target_ks[index] <= block.stop:
                candidates, place[index] = largest_with_kth(candidates, target_ks[index])
        threshold = None
        if sparse_k is not None and sparse_k < block.stop:
            # rows that are not observed are sparse all the same
            threshold = (
                largest_with_kth(block.scores, sparse_k)[1] if is_sampled else place[target_ks.index(sparse_k)].clone()
            )
        if placement == "post_softmax":
            place -= row_lse(scores, call.grouped_sinks)
        return threshold

    output = attend_blocks(call, select=select, block_bytes=block_bytes)
    return output, kth_scores.flatten(1, 2)


def largest_with_kth(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns the k largest scores of every row, and the least of them, faster than a partial sort of long rows.

    A row is cut into columns of a few scores. Its k largest scores lie in the k columns with the largest maxima: any
    other column has k maxima at or above everything in it. So only those columns are searched.

    Args:
        scores: `[..., seq_len]` float.
        k: at least 1, at most `seq_len`.

    Returns:
        `[..., k]` in no order, and `[...]`, both of the dtype of `scores`.
    """
    seq_len = scores.shape[-1]
    height = math.isqrt(seq_len // k)  # makes both searches about equally long
    candidates = scores
    if height >= 4:  # two short searches of lower columns are no faster than a long one
        width = seq_len // height
        columns = scores[..., : height * width].unflatten(-1, (height, width))
        best = columns.amax(dim=-2).topk(k, sorted=False).indices
        in_best = columns.gather(-1, best.unsqueeze(-2).expand(*best.shape[:-1], height, k)).flatten(-2)
        candidates = torch.cat([in_best, scores[..., height * width :]], dim=-1)
    largest = candidates.topk(k, sorted=False).values
    return largest, largest.amin(dim=-1)
