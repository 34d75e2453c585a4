"""Thresholds for the tiny model that keep about k keys, with the terms that the compensations need, in one pass."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.calibration.tiny_model import architecture, random_tokens
from tests.store_factory import make_draft, make_tensors
from vllm_toptheta.calibration.candidates import key_moments
from vllm_toptheta.calibration.model import hidden_states, overriding_attention
from vllm_toptheta.calibration.override import AttentionCall, DenseOverride
from vllm_toptheta.reference import KeyProjection, causal_scores, fit_projection, kth_largest_scores
from vllm_toptheta.store import ThresholdStore, save

TARGET_KS = (8, 32)
NUM_CHANNELS = 8


class Observe(DenseOverride):
    """Mean over rows and, for every k, of theta, of the discarded sum and of exp(s - theta), by layer and head."""

    def __init__(self, *, after_softmax: bool) -> None:
        self.after_softmax = after_softmax
        self.thetas: dict[int, Tensor] = {}
        self.offline_sums: dict[int, Tensor] = {}
        self.scales: dict[int, Tensor] = {}
        self.projections: dict[int, KeyProjection] = {}

    def attend(self, call: AttentionCall) -> Tensor:
        layer_idx, query, key = call.layer_idx, call.query, call.key
        scores = causal_scores(query, key, softmax_scale=call.softmax_scale, logits_soft_cap=call.soft_cap)
        scores = scores[TARGET_KS[-1] :]
        thetas = kth_largest_scores(scores, TARGET_KS)
        discarded = scores.unsqueeze(-1) < thetas.unsqueeze(-2)
        relative = (scores - scores.amax(-1, keepdim=True)).exp().unsqueeze(-1) * discarded
        above = (scores.unsqueeze(-1) - thetas.unsqueeze(-2)).exp() * discarded
        self.offline_sums[layer_idx] = relative.sum(dim=-2).mean(dim=0)
        self.scales[layer_idx] = (above.sum(dim=-2) / discarded.sum(dim=-2).clamp(min=1)).mean(dim=0)
        moments = key_moments(query, key)
        self.projections[layer_idx] = fit_projection(
            moments.key_mean, moments.key_covariance, moments.query_moment, num_channels=NUM_CHANNELS
        )
        if self.after_softmax:
            thetas = thetas - scores.logsumexp(dim=-1, keepdim=True)
        self.thetas[layer_idx] = thetas.mean(dim=0)
        return super().attend(call)


def tiny_store(
    folder: Path,
    model: Any,
    *,
    placement: Literal["pre_softmax", "post_softmax"] = "pre_softmax",
    measured: bool = True,
    shadow: bool = True,
    keep_everything: bool = False,
    only_layers: tuple[int, ...] | None = None,
) -> ThresholdStore:
    """Writes a store for a tiny model and returns it; all layers but `only_layers` (default: all but 0) are dense.

    Shadow keys have half the channels and a small margin, so that they miss some keys.
    """
    override = Observe(after_softmax=placement == "post_softmax")
    with overriding_attention(model, override):
        hidden_states(model, random_tokens(200, seed=99))
    shape = architecture(model)
    layers = range(shape.num_layers)
    sparse_layers = layers[1:] if only_layers is None else only_layers
    draft = make_draft(
        model_id="org/tiny-model",
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_size=shape.head_size,
        rope=shape.rope,
        target_ks=TARGET_KS,
        dense_layers=tuple(layer for layer in layers if layer not in sparse_layers),
        degree=0,
        placement=placement,
        measured=measured,
        num_channels=NUM_CHANNELS if shadow and placement == "pre_softmax" else None,
    )
    tensors = make_tensors(draft)

    def stack(found: dict[int, Tensor]) -> NDArray[np.float32]:
        # layers with a sliding window are not observed
        return torch.stack([found.get(layer, found[sparse_layers[-1]]) for layer in layers]).numpy()

    thetas = stack(override.thetas)
    tensors["coefficients"] = (np.full_like(thetas, -1e6) if keep_everything else thetas)[..., None]
    if measured:
        for name, values in (("offline_sum", override.offline_sums), ("exp_threshold_scale", override.scales)):
            tensors[name] = np.where(tensors["measured_rows"] > 0, stack(values)[..., None], 0).astype(np.float32)
    if draft.shadow:
        found = [override.projections.get(layer, override.projections[sparse_layers[-1]]) for layer in layers]
        for name in ("encoder", "decoder", "key_mean"):
            tensors[f"shadow_{name}"] = np.stack([getattr(projection, name).numpy() for projection in found])
        tensors["shadow_margin"][...] = 0.5
        tensors["shadow_scale_coefficients"][...] = 0.0
        tensors["shadow_scale_coefficients"][..., 0] = np.log(stack(override.scales).mean(axis=-1))
    return save(folder, draft, tensors)
