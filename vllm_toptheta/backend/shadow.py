"""What a sparse layer needs in mode `shadow`, beside its thresholds."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_toptheta.backend.levels import Levels
from vllm_toptheta.kernels.projection import ShadowProjection
from vllm_toptheta.limits import MAX_LOG_SCALE
from vllm_toptheta.store import ShadowKeys


@dataclass(frozen=True)
class ShadowPlan:
    """Shadow keys of one layer on one rank.

    Attributes:
        projection: Of the rank's kv heads.
        margin: [num_levels, num_heads] float32, scaled logits; 0 at the dense level.
        log_scale: [num_levels, num_heads, 2] float32, ln r = c_0 + c_1 ln n; 0 at the dense level.
        num_sink: First tokens that are always candidates.
        num_recent: Last tokens that are always candidates.
    """

    projection: ShadowProjection
    margin: torch.Tensor
    log_scale: torch.Tensor
    num_sink: int
    num_recent: int

    @classmethod
    def of_layer(
        cls,
        keys: ShadowKeys,
        levels: Levels,
        layer: int,
        *,
        heads: slice,
        kv_heads: list[int],
        device: torch.device | str = "cpu",
    ) -> ShadowPlan:
        """A layer's share of what a store holds.

        Args:
            keys: Of the store.
            levels: What requests can ask for.
            layer: Index in the model.
            heads: The rank's query heads.
            kv_heads: The kv heads that they belong to.
            device: Where the tensors go.
        """
        stored = keys.projection(layer)
        parts = (stored.encoder, stored.decoder, stored.key_mean)
        return cls(
            projection=ShadowProjection.build(*(torch.from_numpy(part[kv_heads].copy()).to(device) for part in parts)),
            margin=levels.stack(lambda curve: keys.margin(curve.label)[layer, heads]).to(device),
            log_scale=levels.stack(lambda curve: keys.log_scale(curve.label)[layer, heads]).to(device),
            num_sink=keys.section.num_sink,
            num_recent=keys.section.num_recent,
        )

    @property
    def code_bytes(self) -> int:
        """Bytes of a shadow key."""
        return self.projection.code_bytes

    def scales(self, log_lengths: torch.Tensor, levels: torch.Tensor | int) -> torch.Tensor:
        """r of every head, [num_tokens, num_heads] float32.

        Args:
            log_lengths: [num_tokens] float32, from `Plan.log_lengths`.
            levels: [num_tokens] integer, or the one of all tokens.
        """
        constant, slope = self.log_scale[levels].unbind(dim=-1)
        return (constant + slope * log_lengths[:, None]).clamp(max=MAX_LOG_SCALE).exp()
