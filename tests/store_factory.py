"""A small valid store, for every test that needs one."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vllm_toptheta.store import (
    Architecture,
    ManifestDraft,
    Measurement,
    ModelIdentity,
    Provenance,
    ShadowSection,
    Target,
    TextSource,
    ThresholdSection,
    ThresholdStore,
    save,
)
from vllm_toptheta.store.expectations import EXPECTATION_NAMES
from vllm_toptheta.store.shadow import SHADOW_NAMES
from vllm_toptheta.store.tensors import expected_formats

ROPE: dict[str, Any] = {"rope_theta": 10000.0, "rope_type": "default"}


def make_draft(
    *,
    model_id: str = "acme/tiny",
    num_layers: int = 3,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_size: int = 16,
    rope: dict[str, Any] | None = None,
    target_ks: tuple[int, ...] = (8, 32),
    max_length: int = 1024,
    dense_layers: tuple[int, ...] = (0,),
    degree: int = 2,
    num_buckets: int = 4,
    placement: Literal["pre_softmax", "post_softmax"] = "pre_softmax",
    measured: bool = False,
    num_channels: int | None = None,
    weight_floor: float = 3.0,
    calibrated: bool = True,
) -> ManifestDraft:
    """Return a manifest whose buckets `make_tensors` can fill: `max_length` must exceed every k by num_buckets.

    `num_channels` and `weight_floor` are those of shadow keys, None for none; without `calibrated`, there is nothing
    else.
    """
    return ManifestDraft(
        model=ModelIdentity(id=model_id),
        architecture=Architecture(
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            rope=ROPE if rope is None else rope,
        ),
        thresholds=ThresholdSection(
            targets=tuple(Target(k=k, min_length=k + 1, max_length=max_length) for k in target_ks),
            dense_layers=dense_layers,
            placement=placement,
            degree=degree,
            num_buckets=num_buckets,
            measurement=Measurement(num_sequences=1) if measured else None,
        )
        if calibrated
        else None,
        shadow=None
        if num_channels is None
        else ShadowSection(
            num_channels=num_channels,
            weight_floor=weight_floor,
            min_length=145,
            max_length=max_length,
            block_size=16,
            candidate_mass=0.99,
            candidate_share=0.25,
        ),
        calibration=Provenance(
            text=(TextSource(name="stories.txt", sha256="0" * 64, num_characters=12345),),
            num_sequences=2,
            max_length=max_length,
            seed=0,
            top_k_at_calibration=True,
            beta=0.0,
            versions={"numpy": "2.0"},
            command="toptheta calibrate tiny --text stories.txt --k 8,32 --out out",
            date=datetime.date(2026, 1, 31),
        ),
    )


def make_tensors(draft: ManifestDraft, *, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Return random tensors that agree with `draft`."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, NDArray[Any]] = {}
    if draft.thresholds:
        section, first = draft.thresholds, draft.targets[0]
        edges = np.geomspace(first.min_length, first.max_length + 1, section.num_buckets + 1).round().astype(np.int32)
        shortest = np.array([target.k + 1 for target in draft.targets])
        row_count = np.maximum(edges[np.newaxis, 1:] - np.maximum(edges[:-1], shortest[:, np.newaxis]), 0)
        per_head = (draft.architecture.num_layers, draft.architecture.num_heads, len(shortest))
        statistics = (*per_head, section.num_buckets)
        tensors = {
            "coefficients": rng.normal(size=(*per_head, section.degree + 1)).astype(np.float32),
            "bucket_edges": edges,
            "row_count": row_count.astype(np.int64),
            "score_mean": np.where(row_count > 0, rng.normal(size=statistics), 0).astype(np.float32),
            "score_std": np.where(row_count > 0, rng.uniform(0.5, 2, size=statistics), 0).astype(np.float32),
        }
        if section.measurement:
            tensors["measured_rows"] = row_count.astype(np.int64)
            for name in EXPECTATION_NAMES:
                if name != "measured_rows":
                    tensors[name] = np.where(row_count > 0, rng.uniform(size=statistics), 0).astype(np.float32)
    if draft.shadow:
        shapes = {name: format.shape for name, format in expected_formats(draft).items() if name in SHADOW_NAMES}
        tensors |= {name: rng.uniform(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return tensors


def make_store(folder: Path, *, coefficients: NDArray[Any] | float | None = None, **fields: Any) -> ThresholdStore:
    """Write a valid store and return it.

    Args:
        folder: Where to.
        coefficients: Replaces the random ones; broadcast to [num_layers, num_heads, num_targets, degree + 1].
        fields: What `make_draft` takes.
    """
    draft = make_draft(**fields)
    tensors = make_tensors(draft)
    if coefficients is not None:
        tensors["coefficients"] = np.broadcast_to(np.float32(coefficients), tensors["coefficients"].shape)
    return save(folder, draft, tensors)
