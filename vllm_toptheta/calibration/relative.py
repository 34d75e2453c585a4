"""Attention by thresholds relative to the row, and the thresholds that every layer attends with."""

from collections.abc import Callable

import torch
from torch import Tensor

from vllm_toptheta.calibration.blocks import ScoreBlock, attend_blocks
from vllm_toptheta.calibration.override import AttentionCall, AttentionOverride
from vllm_toptheta.reference import relative_threshold

__all__ = ["RelativeOverride"]


class RelativeOverride(AttentionOverride):
    """Applies thresholds relative to the row in every layer, with full compensation.

    Args:
        weight_floor: what a key must weigh to be sure to survive, in multiples of the average weight.
        observe: called with each layer's call and its thresholds, `[seq_len, num_heads]` float32, scaled logits.
    """

    def __init__(self, weight_floor: float, observe: Callable[[AttentionCall, Tensor], None]) -> None:
        self.weight_floor = weight_floor
        self.observe = observe

    def attend(self, call: AttentionCall) -> Tensor:
        """See `AttentionOverride.attend`."""
        thresholds = torch.empty_like(call.query[..., 0], dtype=torch.float32)

        def select(block: ScoreBlock) -> Tensor:
            num_keys = torch.arange(block.start + 1, block.stop + 1, device=call.query.device)
            scores = block.scores.flatten(0, 1).transpose(0, 1)
            thresholds[block.rows] = relative_threshold(scores, num_keys, self.weight_floor, sinks=call.sinks)
            return thresholds[block.rows].T.unflatten(0, block.scores.shape[:2])

        output = attend_blocks(call, select=select)
        self.observe(call, thresholds)
        return output
