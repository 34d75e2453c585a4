"""What thresholds discard while a model reads a text, row by row."""

from collections.abc import Callable, Collection

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_toptheta.calibration.blocks import BlockSums, ScoreBlock, attend_blocks
from vllm_toptheta.calibration.override import AttentionCall, AttentionOverride
from vllm_toptheta.reference import Placement, row_lse

__all__ = ["ROW_MEASURES", "ServedOverride", "measure_rows"]

# the order of what `measure_rows` returns
ROW_MEASURES = ("offline_sum", "exp_threshold_scale")


class ServedOverride(AttentionOverride):
    """Applies thresholds as a server does, and reports what every row discards.

    Args:
        thresholds: `[max_length + 1, num_layers, num_heads]` float32, row n holds theta(n): scaled logits, or after
            the softmax the logarithm of a probability.
        dense_length: rows that see at most this many keys keep them all.
        dense_layers: layers that hand on dense attention. What their thresholds would discard is reported all the same,
            so that they can be made sparse later.
        placement: what the thresholds apply to.
        report: called with the layer and what `measure_rows` returns for it.
    """

    def __init__(
        self,
        thresholds: NDArray[np.float32],
        *,
        dense_length: int,
        dense_layers: Collection[int],
        placement: Placement,
        report: Callable[[int, Tensor], None],
    ) -> None:
        self.thresholds = torch.from_numpy(thresholds)
        self.dense_length = dense_length
        self.dense_layers = dense_layers
        self.placement = placement
        self.report = report

    def attend(self, call: AttentionCall) -> Tensor:
        """See `AttentionOverride.attend`."""
        output, measures = measure_rows(
            call,
            thresholds=self.thresholds[1 : len(call.key) + 1, call.layer_idx].to(call.query.device),
            dense_length=self.dense_length,
            placement=self.placement,
        )
        self.report(call.layer_idx, measures)
        if call.layer_idx in self.dense_layers:
            return attend_blocks(call, select=lambda block: None)
        return output


def measure_rows(
    call: AttentionCall,
    *,
    thresholds: Tensor,
    dense_length: int,
    placement: Placement = "pre_softmax",
    block_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Top-Theta attention over a whole sequence with full compensation, and what every row discards.

    Args:
        call: of all rows of the sequence.
        thresholds: `[seq_len, num_heads]` float32, scaled logits, or after the softmax the logarithm of a probability.
        dense_length: rows that see at most this many keys keep them all.
        placement: what the thresholds apply to.
        block_bytes: bytes that the scores of a block of rows may take; None for what suits the device.

    Returns:
        The output `[seq_len, num_heads, head_size]` float32, and `[len(ROW_MEASURES), num_heads, seq_len]` float32:
        the sum of exp(s - m) over the discarded scores (what `offline` compensation
        knows the mean of), and the mean of exp(s - theta) over them (r), NaN in a row that discards nothing.
    """
    seq_len, num_heads, _ = call.query.shape
    num_kv_heads = call.key.shape[1]
    groups = (num_kv_heads, num_heads // num_kv_heads)
    per_row = thresholds.T.unflatten(0, groups).clone()
    per_row[..., :dense_length] = -torch.inf
    measures = call.query.new_zeros((len(ROW_MEASURES), *groups, seq_len), dtype=torch.float32)

    def select(block: ScoreBlock) -> Tensor | None:
        place = per_row[..., block.rows]
        if placement == "post_softmax":
            place += row_lse(block.scores, call.grouped_sinks)
        return place

    def report(sums: BlockSums) -> None:
        rows = slice(sums.start, sums.stop)
        seen = torch.arange(sums.start + 1, sums.stop + 1, device=call.query.device)
        discarded = (sums.num_discarded.squeeze(-1) - (sums.stop - seen)).clamp_(min=0)
        lost, largest = sums.lost.squeeze(-1), sums.largest.squeeze(-1)
        scale = (lost.log() + largest - per_row[..., rows] - discarded.log()).exp()
        measures[0, ..., rows] = lost
        measures[1, ..., rows] = scale.masked_fill(discarded == 0, torch.nan)

    output = attend_blocks(call, select=select, report=report, block_bytes=block_bytes)
    return output, measures.flatten(1, 2)
