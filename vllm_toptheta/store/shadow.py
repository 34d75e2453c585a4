"""The optional section of a store for shadow keys: what keys are projected on, and which of them are candidates.

`vllm_toptheta/reference/shadow.py` says what the numbers mean, docs/shadow.md how they are calibrated.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vllm_toptheta.limits import MAX_LOG_SCALE
from vllm_toptheta.store.schema import Manifest, ShadowSection

SHADOW_NAMES = (
    "shadow_encoder",
    "shadow_decoder",
    "shadow_key_mean",
    "shadow_margin",
    "shadow_scale_coefficients",
    "shadow_candidate_share",
)


@dataclass(frozen=True, eq=False)
class ShadowProjection:
    """What the keys of one layer are projected on; views, read-only.

    Attributes:
        encoder: `[num_kv_heads, head_size, num_channels]` float32, from keys to steps.
        decoder: `[num_kv_heads, num_channels, head_size]` float32, from steps to keys.
        key_mean: `[num_kv_heads, head_size]` float32.
    """

    encoder: NDArray[np.float32]
    decoder: NDArray[np.float32]
    key_mean: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class ShadowKeys:
    """What a store holds of shadow keys. All arrays are read-only.

    Layers with a sliding window have no shadow keys; their numbers are zero.

    Attributes:
        folder: Of the store.
        manifest: Of the store, with a section `shadow`.
        encoder: `[num_layers, num_kv_heads, head_size, num_channels]` float32.
        decoder: `[num_layers, num_kv_heads, num_channels, head_size]` float32.
        key_mean: `[num_layers, num_kv_heads, head_size]` float32.
        margin: `[num_layers, num_heads]` float32, scaled logits, not negative: how far below theta the score of a
            shadow may be for its key to be a candidate.
        log_scale: `[num_layers, num_heads, 2]` float32, ln r = c_0 + c_1 ln n, n clamped to the calibrated lengths.
        candidate_share: `[num_layers, num_kv_heads]` float32, candidates over keys, at the lengths of the calibration.
    """

    folder: Path
    manifest: Manifest
    encoder: NDArray[np.float32]
    decoder: NDArray[np.float32]
    key_mean: NDArray[np.float32]
    margin: NDArray[np.float32]
    log_scale: NDArray[np.float32]
    candidate_share: NDArray[np.float32]

    @property
    def section(self) -> ShadowSection:
        """What the manifest says: channels, tokens that are always candidates, and the rest."""
        assert self.manifest.shadow is not None  # noqa: S101 - what an instance is made from
        return self.manifest.shadow

    def projection(self, layer_idx: int) -> ShadowProjection:
        """Return what the keys of a layer are projected on.

        Args:
            layer_idx: Which layer, from 0.

        Raises:
            IndexError: There is no such layer.
        """
        return ShadowProjection(self.encoder[layer_idx], self.decoder[layer_idx], self.key_mean[layer_idx])

    def exp_threshold_scale(self, seq_len: ArrayLike) -> NDArray[np.float32]:
        """Return r: a key that is not read enters the softmax denominator as r * exp(theta - m).

        That of mode `values`, `ThresholdCurve.expected("exp_threshold_scale", n)`, is another: of all discarded keys.

        Args:
            seq_len: Cached keys including the query's own, in tokens; an integer or an array of them.

        Returns:
            `[*seq_len.shape, num_layers, num_heads]` float32.
        """
        clamped = np.clip(np.asarray(seq_len, np.float64), self.section.min_length, self.section.max_length)
        coefficients = self.log_scale.astype(np.float64)
        log_scale = coefficients[..., 0] + coefficients[..., 1] * np.log(clamped)[..., None, None]
        return np.asarray(np.exp(np.minimum(log_scale, MAX_LOG_SCALE)), np.float32)
