"""Attention by thresholds relative to the row, and what every layer attends with."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_toptheta.calibration.blocks import ScoreBlock, attend_blocks
from vllm_toptheta.calibration.route import AttentionRoute
from vllm_toptheta.reference import relative_threshold

__all__ = ["Attended", "RelativeRoute"]


class Attended(NamedTuple):
    """What a layer attended with.

    Attributes:
        query: `[seq_len, num_heads, head_size]` float.
        key: `[seq_len, num_kv_heads, head_size]` float.
        thresholds: `[seq_len, num_heads]` float32, scaled logits.
        softmax_scale: factor on the products of query and key.
        soft_cap: cap on the scores, scaled logits; None for a model without one.
    """

    query: Tensor
    key: Tensor
    thresholds: Tensor
    softmax_scale: float
    soft_cap: float | None


class RelativeRoute(AttentionRoute):
    """Applies thresholds relative to the row in every layer, with full compensation.

    Args:
        weight_floor: what a key must weigh to be sure to survive, in multiples of the average weight.
        observe: called with the layer and what it attended with.
    """

    def __init__(self, weight_floor: float, observe: Callable[[int, Attended], None]) -> None:
        self.weight_floor = weight_floor
        self.observe = observe

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
        thresholds = torch.empty_like(query[..., 0], dtype=torch.float32)

        def select(block: ScoreBlock) -> Tensor:
            num_keys = torch.arange(block.start + 1, block.stop + 1, device=query.device)
            scores = block.scores.flatten(0, 1).transpose(0, 1)
            thresholds[block.rows] = relative_threshold(scores, num_keys, self.weight_floor)
            return thresholds[block.rows].T.unflatten(0, block.scores.shape[:2])

        output = attend_blocks(query, key, value, select=select, softmax_scale=softmax_scale, soft_cap=soft_cap)
        self.observe(layer_idx, Attended(query, key, thresholds, softmax_scale, soft_cap))
        return output
