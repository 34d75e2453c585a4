"""The threshold store: described by `schema`, read and written by `io`, found by `resolve`. No torch.

folder = resolve("org/model")
store = load(folder)
store.manifest.architecture.check(Architecture.from_hf_config(config), file=folder)
theta = store.curve(128).threshold(seq_len)    # [num_layers, num_heads]

May import `errors`, `limits`.
"""

from vllm_toptheta.store.curve import ThresholdCurve
from vllm_toptheta.store.expectations import Expectations
from vllm_toptheta.store.fields import TextSource
from vllm_toptheta.store.io import check_place, load, record_quality, save
from vllm_toptheta.store.model_config import LFS_POINTER, check_folder, read_architecture, read_config
from vllm_toptheta.store.quality import PRESETS, Evidence, MeasuredLength, MeasuredText, Promise, Serving, TaskProbe
from vllm_toptheta.store.resolve import folder_name, list_stores, resolve
from vllm_toptheta.store.schema import (
    Architecture,
    Manifest,
    ManifestDraft,
    Measurement,
    ModelIdentity,
    Provenance,
    ShadowSection,
    ThresholdSection,
)
from vllm_toptheta.store.shadow import ShadowKeys, ShadowProjection
from vllm_toptheta.store.target import FLOOR_PREFIX, Target, TargetSpec, floor_label
from vllm_toptheta.store.thresholds import CalibratedThresholds, ThresholdStore
from vllm_toptheta.store.weights import local_folder, weights_sha256

__all__ = [
    "FLOOR_PREFIX",
    "LFS_POINTER",
    "PRESETS",
    "Architecture",
    "CalibratedThresholds",
    "Evidence",
    "Expectations",
    "Manifest",
    "ManifestDraft",
    "MeasuredLength",
    "MeasuredText",
    "Measurement",
    "ModelIdentity",
    "Promise",
    "Provenance",
    "Serving",
    "ShadowKeys",
    "ShadowProjection",
    "ShadowSection",
    "Target",
    "TargetSpec",
    "TaskProbe",
    "TextSource",
    "ThresholdCurve",
    "ThresholdSection",
    "ThresholdStore",
    "check_folder",
    "check_place",
    "floor_label",
    "folder_name",
    "list_stores",
    "load",
    "local_folder",
    "read_architecture",
    "read_config",
    "record_quality",
    "resolve",
    "save",
    "weights_sha256",
]
