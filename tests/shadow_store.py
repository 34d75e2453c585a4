"""Stores with shadow keys that fit random keys: numbers from a normal distribution, in every channel alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests import store_factory
from vllm_toptheta.reference import KeyProjection, fit_projection
from vllm_toptheta.store import ShadowKeys, ThresholdStore


def make_shadow_store(
    folder: Path,
    *,
    coefficients: Any = None,
    num_channels: int = 32,
    margin: float = 0.3,
    constant: float = -1.0,
    slope: float = -0.2,
    **fields: Any,
) -> ThresholdStore:
    """Write a store whose shadow keys keep the first axes of keys, and return it.

    Args:
        folder: Where to.
        coefficients: As for `store_factory.make_store`.
        num_channels: Of the shadow keys.
        margin: The mean of the margins, which differ from head to head.
        constant, slope: Means of the coefficients of ln r, which differ as well.
        fields: What `store_factory.make_draft` takes.
    """
    draft = store_factory.make_draft(num_channels=num_channels, **fields)
    tensors = store_factory.make_tensors(draft)
    if coefficients is not None:
        tensors["coefficients"] = np.broadcast_to(np.float32(coefficients), tensors["coefficients"].shape)
    sizes = draft.architecture
    generator = torch.Generator().manual_seed(11)
    identity = torch.eye(sizes.head_size).expand(sizes.num_kv_heads, -1, -1)
    falling = torch.linspace(1.1, 0.9, sizes.head_size)
    layers = [
        fit_projection(
            0.2 * torch.randn(sizes.num_kv_heads, sizes.head_size, generator=generator),
            identity * falling,
            identity,
            num_channels=num_channels,
        )
        for _ in range(sizes.num_layers)
    ]
    for name in ("encoder", "decoder", "key_mean"):
        tensors[f"shadow_{name}"] = torch.stack([getattr(layer, name) for layer in layers]).numpy()
    tensors["shadow_margin"] *= np.float32(2 * margin)
    noise = tensors["shadow_scale_coefficients"]
    tensors["shadow_scale_coefficients"] = (np.float32([constant, slope]) * (0.5 + noise)).astype(np.float32)
    return store_factory.save(folder, draft, tensors)


def projection_of(keys: ShadowKeys, layer: int) -> KeyProjection:
    """What the reference takes of a layer."""
    stored = keys.projection(layer)
    return KeyProjection(*(torch.from_numpy(part.copy()) for part in (stored.encoder, stored.decoder, stored.key_mean)))
