"""Which thresholds a served model gets, and which layers use them; asked before vLLM starts, and in its workers.

May import `errors`, `limits`, `settings`, `store`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from vllm_toptheta import store
from vllm_toptheta.errors import SettingsError, StoreError, UnsupportedError
from vllm_toptheta.limits import DEFAULT_TIER_WEIGHT_FLOOR, DEFAULT_WEIGHT_FLOOR, NUM_ANCHORS, channels_for
from vllm_toptheta.settings import Settings
from vllm_toptheta.store import Architecture, Evidence, Serving, ShadowKeys, ThresholdCurve, ThresholdStore

_MAX_DEGREE = 2  # of what is served
_ANY_LENGTH = 1, 2**31 - 1


@dataclass(frozen=True, eq=False)
class ServedThresholds:
    """theta(n) = a + b ln n + c (ln n)^2 + slope * anchor_lse of every layer and head (`kernels.contract`).

    Attributes:
        label: What they aim at, `floor:2` or a calibrated `k:128`.
        coefficients: [num_layers, num_heads, 4] float32, or [4] for all of them: a, b, c and slope.
        is_relative: Whether the slope is not 0.
        max_dense_len: Sequences of at most this many tokens keep every key.
        length_range: Lengths, in tokens, to which n is clamped.
        weight_floor: Of relative thresholds; None of calibrated ones.
    """

    label: str
    coefficients: NDArray[np.float32]
    is_relative: bool
    max_dense_len: int
    length_range: tuple[int, int]
    weight_floor: float | None = None

    @classmethod
    def relative(cls, weight_floor: float) -> ServedThresholds:
        """theta = anchor_lse + ln(weight_floor / n), for a floor above 0."""
        return cls(
            label=store.floor_label(weight_floor),
            coefficients=np.array([math.log(weight_floor), -1.0, 0.0, 1.0], np.float32),
            is_relative=True,
            max_dense_len=NUM_ANCHORS,
            length_range=_ANY_LENGTH,
            weight_floor=weight_floor,
        )

    @classmethod
    def calibrated(cls, curve: ThresholdCurve) -> ServedThresholds:
        """Those of a target of a store.

        Raises:
            UnsupportedError: Its polynomials are longer than what kernels evaluate.
        """
        num_layers, num_heads, num_terms = curve.coefficients.shape
        if num_terms > _MAX_DEGREE + 1:
            raise UnsupportedError(
                f"thresholds of degree {num_terms - 1}, and up to {_MAX_DEGREE} are served",
                field="degree",
                remedy="Calibrate again: `toptheta calibrate` fits polynomials that are served",
            )
        coefficients = np.zeros((num_layers, num_heads, 4), np.float32)
        coefficients[..., :num_terms] = curve.coefficients
        return cls(
            label=curve.label,
            coefficients=coefficients,
            is_relative=False,
            max_dense_len=curve.dense_length,
            length_range=(curve.min_length, curve.max_length),
        )

    def of_heads(self, layer: int, heads: slice) -> NDArray[np.float32]:
        """[num_heads, 4] float32, a copy, of some heads of a layer."""
        if self.coefficients.ndim == 1:
            return np.tile(self.coefficients, (heads.stop - heads.start, 1))
        return self.coefficients[layer, heads].copy()


@dataclass(frozen=True)
class Selection:
    """What `select` found.

    Attributes:
        thresholds: Those of the server; None if the model runs dense.
        model_id: The model that a store was calibrated on; None where none is used.
        origin: Where the thresholds come from, or why there are none; for people.
        dense_layers: Layers that read everything.
        shadow: Calibrated shadow keys; None without, or if the model runs dense.
        heavy: What a key must weigh to be read exactly, where there are copies of keys and values; None where not.
        evidence: What floors were measured to cost in this mode; None where nothing was.
        is_promised: Whether the thresholds are those of the evidence's promise.
        is_lossless: Whether answers are dense attention's, so that nothing has to be promised.
    """

    thresholds: ServedThresholds | None
    model_id: str | None
    origin: str
    dense_layers: frozenset[int]
    shadow: ShadowKeys | None = None
    heavy: float | None = None
    evidence: Evidence | None = None
    is_promised: bool = False
    is_lossless: bool = False

    @property
    def quality(self) -> str:
        """What is promised, or why nothing is; for people."""
        if self.is_lossless:
            return "lossless: answers are those of dense attention, by which drafts are verified"
        if self.evidence is None:
            return "nothing is promised: no quality was measured for this model and mode (toptheta tune)"
        if not self.is_promised:
            return "nothing is promised: weight_floor was chosen by hand"
        return self.evidence.line

    def check_promise(self, settings: Settings, serving: Serving) -> list[str]:
        """Say where a server differs from what its promise was measured on, in a few words each.

        Args:
            settings: The options in force; what they say of the serving counts.
            serving: How the model is served otherwise.

        Returns:
            The differences; none without a promise.

        Raises:
            UnsupportedError: The settings are strict, and nothing is promised or something differs.
        """
        differences = []
        if self.evidence is not None and self.is_promised:
            serving = replace(
                serving, min_context=settings.min_context, compensation=settings.compensation, heavy=self.heavy
            )
            differences = self.evidence.differences(serving)
        is_kept = self.is_lossless or (self.is_promised and not differences)
        if settings.strict and self.thresholds is not None and not is_kept:
            raise UnsupportedError(
                f"the promise was measured otherwise: {'; '.join(differences)}" if differences else self.quality,
                field="strict",
                remedy="Measure the model as it is served (toptheta tune --help), or leave strict out",
            )
        return differences


def select(settings: Settings, model: str, architecture: Architecture | None) -> Selection:
    """Find the thresholds of a model, and check that what was calibrated was made for its architecture. No network.

    Args:
        settings: The options in force.
        model: A hub id or a local directory.
        architecture: The model's; None where it is not known yet, and then it is not compared.

    Raises:
        SettingsError: An option does not fit the model.
        StoreError: A store is needed and missing, damaged, made for another architecture, or lacks the target or what
            the mode needs.
        UnsupportedError: The thresholds apply after the softmax, or nothing can compute with their shadow keys.
    """
    if settings.weight_floor == 0:
        num_layers = architecture.num_layers if architecture else 0
        return Selection(None, None, "weight_floor is 0", frozenset(range(num_layers)))
    if settings.target is not None:
        return _calibrated(settings, settings.target, model, architecture)
    has_copies = settings.has_copies
    if has_copies is None:
        # whoever names a store wants what it holds: what copies were measured to cost, or calibrated shadow keys
        manifest = _load(settings, model, architecture, needs_shadow=True).manifest
        has_copies = manifest.shadow is None and manifest.evidence("shadow") is not None
    if settings.mode == "shadow" and not has_copies:
        return _shadow(settings, model, architecture)
    evidence = _evidence(settings, model, architecture)
    if settings.thresholds is not None and evidence is None:
        raise SettingsError(
            "copies of keys and values need no calibration, and the store holds no measured quality of mode shadow"
            if has_copies
            else "without a target, thresholds are relative to each row, and the store holds no measured quality of "
            "mode values",
            field="thresholds",
            remedy="Leave it out, measure (toptheta tune --mode shadow), or switch shadow_values off"
            if has_copies
            else "Name a calibrated target too, such as k:128, or leave it out, or measure (toptheta tune)",
        )
    weight_floor, heavy = settings.weight_floor, settings.heavy
    if evidence is not None:
        weight_floor = evidence.served.weight_floor if weight_floor is None else weight_floor
        if evidence.heavy is not None and "heavy" not in settings.model_fields_set:
            heavy = evidence.heavy
    if weight_floor is None:
        weight_floor = DEFAULT_TIER_WEIGHT_FLOOR if has_copies else DEFAULT_WEIGHT_FLOOR
    return Selection(
        ServedThresholds.relative(weight_floor),
        None,
        f"relative to each row, no key of {weight_floor:g} times the average weight is skipped",
        _dense_layers(settings, (), architecture.num_layers if architecture else None),
        heavy=heavy if has_copies else None,
        evidence=evidence,
        is_promised=evidence is not None and weight_floor == evidence.served.weight_floor and not settings.lossless,
        is_lossless=settings.lossless,
    )


def _evidence(settings: Settings, model: str, architecture: Architecture | None) -> Evidence | None:
    """What floors were measured to cost in the mode of the settings, in the store that is named or shipped.

    Raises:
        StoreError: A store is named, and there is none for the model, or it is damaged or of another architecture.
    """
    try:
        return _load(settings, model, architecture).manifest.evidence(settings.mode)
    except StoreError:
        if settings.thresholds is not None:
            raise
        return None


def _load(
    settings: Settings, model: str, architecture: Architecture | None, *, needs_shadow: bool = False
) -> ThresholdStore:
    """The model's store, checked against its architecture where that is known."""
    folder = store.resolve(model, thresholds=settings.thresholds, needs_shadow=needs_shadow)
    thresholds = store.load(folder)
    if architecture is not None:
        thresholds.manifest.architecture.check(architecture, file=folder)
    return thresholds


def _calibrated(settings: Settings, target: str, model: str, architecture: Architecture | None) -> Selection:
    thresholds = _load(settings, model, architecture)
    folder, manifest = thresholds.folder, thresholds.manifest
    if manifest.placement != "pre_softmax":
        raise UnsupportedError(
            f"these thresholds are {manifest.placement}; serving compares scores before the softmax",
            file=folder,
            remedy="Calibrate thresholds that apply before the softmax, as `toptheta calibrate` does",
        )
    dense_layers = _dense_layers(settings, manifest.dense_layers, manifest.architecture.num_layers)
    served = ServedThresholds.calibrated(thresholds.curve_of(target))
    return Selection(served, manifest.model.id, str(folder), dense_layers, is_lossless=settings.lossless)


def _shadow(settings: Settings, model: str, architecture: Architecture | None) -> Selection:
    thresholds = _load(settings, model, architecture, needs_shadow=True)
    manifest, shadow = thresholds.manifest, thresholds.shadow
    _check_channels(shadow)
    weight_floor = shadow.section.weight_floor
    if settings.weight_floor not in (None, weight_floor):
        raise SettingsError(
            f"these shadow keys were calibrated at a floor of {weight_floor:g}, not of {settings.weight_floor:g}",
            field="weight_floor",
            remedy=f"Calibrate again with --weight-floor {settings.weight_floor:g}, or leave the option out",
        )
    dense_layers = _dense_layers(settings, (), manifest.architecture.num_layers)
    served = ServedThresholds.relative(weight_floor)
    origin, lossless = str(thresholds.folder), settings.lossless
    return Selection(served, manifest.model.id, origin, dense_layers, shadow, is_lossless=lossless)


def _dense_layers(settings: Settings, default: tuple[int, ...], num_layers: int | None) -> frozenset[int]:
    """The layers that the settings name, or the default ones.

    Raises:
        SettingsError: The model has no such layer.
    """
    layers = default if settings.dense_layers is None else settings.dense_layers
    if num_layers is not None and (unknown := sorted(layer for layer in layers if layer >= num_layers)):
        raise SettingsError(
            f"the model has no layer {unknown[0]}",
            field="dense_layers",
            remedy=f"name layers from 0 to {num_layers - 1}",
        )
    return frozenset(layers)


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
