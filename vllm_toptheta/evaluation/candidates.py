"""Shadow keys of a store made ready to say which keys a row reads."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from vllm_toptheta.limits import NUM_FIRST_ANCHORS, NUM_LAST_ANCHORS
from vllm_toptheta.reference import KeyProjection, candidate_keys, encode_keys, quantize_query, shadow_scores
from vllm_toptheta.store import ShadowKeys

__all__ = ["Candidates", "ShadowCandidates"]


@dataclass(frozen=True)
class Candidates:
    """What shadow keys say of some rows, as `reference.top_theta_attention` takes it.

    Attributes:
        candidates: `[num_queries, num_heads, seq_len]` bool, keys that are read exactly.
        shadow_scores: `[num_queries, num_heads, seq_len]` float32, scaled logits, without a mask.
    """

    candidates: Tensor
    shadow_scores: Tensor


class ShadowCandidates:
    """The shadow keys of a store.

    Args:
        shadow: those of the store.
        device: of the queries.
    """

    def __init__(self, shadow: ShadowKeys, *, device: torch.device | str = "cpu") -> None:
        self._shadow = shadow
        self._device = device
        self._margin = torch.from_numpy(shadow.margin.copy()).to(device)
        self._projection = cache(self._load_projection)

    def encode(self, layer_idx: int, key: Tensor) -> Tensor:
        """Returns the codes of keys, `[seq_len, num_kv_heads, num_channels]` uint8.

        Args:
            layer_idx: which layer they are of.
            key: `[seq_len, num_kv_heads, head_size]` float.
        """
        return encode_keys(key, self._projection(layer_idx))

    def find(
        self,
        layer_idx: int,
        query: Tensor,
        codes: Tensor,
        threshold: Tensor,
        *,
        softmax_scale: float,
        soft_cap: float | None,
    ) -> Candidates:
        """Returns the candidates of some rows, each as a decode step of its length would find them.

        Args:
            layer_idx: which layer of the model asks.
            query: `[num_queries, num_heads, head_size]` float, the last positions.
            codes: `[seq_len, num_kv_heads, num_channels]` uint8, from `encode`.
            threshold: `[num_queries, num_heads]` float32, scaled logits.
            softmax_scale: factor on the products of query and key.
            soft_cap: cap on the scores, scaled logits; None for a model without one.
        """
        num_kv_heads = codes.shape[1]
        projection = self._projection(layer_idx)
        scores = shadow_scores(
            quantize_query(query, projection, softmax_scale=softmax_scale), codes, logits_soft_cap=soft_cap
        )
        candidates = candidate_keys(
            scores,
            threshold - self._margin[layer_idx],
            num_kv_heads=num_kv_heads,
            num_sink=NUM_FIRST_ANCHORS,
            num_recent=NUM_LAST_ANCHORS,
            block_size=self._shadow.section.block_size,
        )
        return Candidates(candidates.repeat_interleave(query.shape[1] // num_kv_heads, dim=1), scores)

    def _load_projection(self, layer_idx: int) -> KeyProjection:
        arrays = vars(self._shadow.projection(layer_idx)).values()
        return KeyProjection(*(torch.from_numpy(array.copy()).to(self._device) for array in arrays))
