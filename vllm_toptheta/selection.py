"""Which thresholds a served model gets, and which layers use them; asked before vLLM starts, and in its workers."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_toptheta import store
from vllm_toptheta.errors import SettingsError, StoreNotFound, UnsupportedError
from vllm_toptheta.limits import channels_for
from vllm_toptheta.settings import Settings
from vllm_toptheta.store import Architecture, ShadowKeys, ThresholdCurve

DEFAULT_TARGET = "k:128"


@dataclass(frozen=True)
class Selection:
    """What `select` found.

    Attributes:
        curve: theta(n) of every layer and head at the target; None if the model runs dense.
        model_id: The model that the thresholds were calibrated on; None if there are none.
        origin: Where the thresholds lie, or why there are none.
        dense_layers: Layers that read everything.
        others: theta(n) at the store's other targets.
        shadow: What mode `shadow` needs; None in mode `values`, or if the model runs dense.
    """

    curve: ThresholdCurve | None
    model_id: str | None
    origin: str
    dense_layers: frozenset[int]
    others: tuple[ThresholdCurve, ...] = ()
    shadow: ShadowKeys | None = None


def select(settings: Settings, model: str, architecture: Architecture | None) -> Selection:
    """Find the thresholds of a model and check that they were made for its architecture. No network.

    Args:
        settings: The options in force.
        model: A hub id or a local directory.
        architecture: The model's; None where it is not known yet, and then it is not compared.

    Raises:
        SettingsError: An option does not fit the model.
        StoreError: Thresholds are missing, damaged, made for another architecture or lack the target, or what the mode
            needs.
        UnsupportedError: The thresholds apply after the softmax, or nothing can compute with their shadow keys.
    """
    try:
        folder = store.resolve(model, thresholds=settings.thresholds)
    except StoreNotFound as error:
        mistyped = settings.thresholds is not None and not settings.thresholds.exists()
        if settings.on_missing == "error" or mistyped:
            raise
        return Selection(None, None, str(error), frozenset(range(architecture.num_layers if architecture else 0)))
    thresholds = store.load(folder)
    manifest = thresholds.manifest
    if architecture is not None:
        manifest.architecture.check(architecture, file=folder)
    if manifest.placement != "pre_softmax":
        raise UnsupportedError(
            f"these thresholds are {manifest.placement}; serving compares scores before the softmax",
            file=folder,
            remedy="Calibrate thresholds that apply before the softmax, as `toptheta calibrate` does",
        )
    layers = range(manifest.architecture.num_layers)
    dense_layers = manifest.dense_layers if settings.dense_layers is None else settings.dense_layers
    if unknown := sorted(set(dense_layers) - set(layers)):
        raise SettingsError(
            f"the model has no layer {unknown[0]}",
            field="dense_layers",
            remedy=f"name layers from 0 to {layers[-1]}",
        )
    curve = thresholds.curve_of(_target(settings))
    others = tuple(thresholds.curve_of(label) for label in manifest.labels if label != curve.label)
    shadow = thresholds.shadow if settings.mode == "shadow" else None
    if shadow is not None:
        _check_channels(shadow)
    return Selection(curve, manifest.model.id, str(folder), frozenset(dense_layers), others, shadow)


def _check_channels(shadow: ShadowKeys) -> None:
    """Refuse shadow keys that there are no kernels for.

    Raises:
        UnsupportedError: Their number of channels is none of those.
    """
    head_size = shadow.manifest.architecture.head_size
    if shadow.section.num_channels not in channels_for(head_size):
        allowed = " or ".join(map(str, channels_for(head_size)))
        raise UnsupportedError(
            f"mode shadow has no kernels for {shadow.section.num_channels} channels of heads of {head_size}",
            file=shadow.folder,
            field="shadow.num_channels",
            remedy=f"Calibrate with {allowed} channels, or serve in mode values" if allowed else "Serve in mode values",
        )


def _target(settings: Settings) -> str:
    """The label of the target that is asked for, else of the default."""
    if settings.target:
        return settings.target
    if settings.target_k:
        return f"k:{settings.target_k}"
    return DEFAULT_TARGET
