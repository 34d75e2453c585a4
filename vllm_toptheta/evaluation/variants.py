"""What is compared with dense attention: thresholds, with or without shadow keys, or exact top-k, at some target."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from vllm_toptheta.errors import EvaluationError
from vllm_toptheta.reference import Denominator
from vllm_toptheta.store import TargetSpec, ThresholdStore

__all__ = ["COMPENSATIONS", "MODES", "CompensationName", "Variant", "expand_variants"]

CompensationName = Literal[
    "none",
    "sdc",
    "sdc+vmc",
    "offline",
    "offline+vmc",
    "exp_threshold",
    "exp_threshold+vmc",
    "scaled_exp_threshold",
    "scaled_exp_threshold+vmc",
    "candidates",
    "candidates+vmc",
    "shadow",
    "shadow+vmc",
]
COMPENSATIONS: tuple[CompensationName, ...] = get_args(CompensationName)

# name without +vmc: the denominator of the reference, and what of the store's expectations it needs
_DENOMINATORS: dict[str, tuple[Denominator, Literal["offline_sum", "exp_threshold_scale"] | None]] = {
    "none": ("none", None),
    "sdc": ("exact", None),
    "offline": ("offline", "offline_sum"),
    "exp_threshold": ("exp_threshold", None),
    "scaled_exp_threshold": ("exp_threshold", "exp_threshold_scale"),
    "candidates": ("candidates", "exp_threshold_scale"),
    "shadow": ("shadow", None),
}


@dataclass(frozen=True)
class Mode:
    """A mode of serving.

    Attributes:
        method: what a variant calls it.
        served: the compensation that a server has.
        denominators: what it can be compared with, without +vmc.
    """

    method: Literal["top_theta", "shadow"]
    served: CompensationName
    denominators: frozenset[str]


MODES = {
    "values": Mode("top_theta", "sdc+vmc", frozenset(_DENOMINATORS) - {"candidates", "shadow"}),
    "shadow": Mode("shadow", "candidates+vmc", frozenset({"none", "sdc", "candidates", "shadow"})),
}


class Variant(BaseModel):
    """One sparse attention to compare with dense attention."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["top_theta", "shadow", "top_k"] = Field(
        default="top_theta",
        description="Calibrated thresholds on all keys (mode values) or on the candidates that shadow keys name (mode "
        "shadow), or an exact top-k search in every row.",
    )
    thresholds: str = Field(default="", description="Label of the store; top_k takes only its dense layers.")
    target: str = Field(description="What the thresholds aim at: k:64 is 64 keys per query head.")
    compensation: CompensationName = Field(
        default="sdc+vmc", description="Softmax denominator, and +vmc if the lost mass is given to the value mean."
    )
    cap_k: int | None = Field(default=None, ge=1, description="Survivors to keep at most, the last ones.")
    dense_layers: tuple[int, ...] | None = Field(
        default=None, description="Layers that read everything; None for those of the store."
    )

    @property
    def denominator(self) -> Denominator:
        """The softmax denominator, as the reference names it."""
        return _DENOMINATORS[self.compensation.removesuffix("+vmc")][0]

    @property
    def calibrated_term(self) -> Literal["offline_sum", "exp_threshold_scale"] | None:
        """What of the store's expectations the denominator needs, if anything; of its shadow keys for that method."""
        return _DENOMINATORS[self.compensation.removesuffix("+vmc")][1]

    @property
    def value_mean(self) -> bool:
        """Whether the lost mass is given to the mean of the values."""
        return self.compensation.endswith("+vmc")

    @property
    def restrictions(self) -> str:
        """The cap and the dense layers in a few words; empty without either."""
        parts = [] if self.cap_k is None else [f"cap {self.cap_k}"]
        if self.dense_layers is not None:
            parts.append(f"dense {','.join(map(str, self.dense_layers)) or 'none'}")
        return " ".join(parts)

    @property
    def name(self) -> str:
        """The variant in a few words, unique among variants."""
        parts = (self.method.replace("_", "-"), self.thresholds, self.target, self.compensation, self.restrictions)
        return " ".join(part for part in parts if part)


def expand_variants(
    stores: Mapping[str, ThresholdStore],
    *,
    targets: Sequence[str],
    compensations: Sequence[str] = (),
    modes: Sequence[str] = ("values",),
    top_k: bool = False,
    cap_k: int | None = None,
    dense_layers: Sequence[tuple[int, ...] | None] = (None,),
) -> list[Variant]:
    """Returns every combination of what was asked for.

    Args:
        stores: threshold stores by their labels, at least one.
        targets: what the thresholds aim at; a bare number is a k.
        compensations: names out of `COMPENSATIONS`, each for the modes that have it, or `all`, which leaves out those
            that a store has no terms for; what a server of the mode has if none is named.
        modes: names out of `MODES`.
        top_k: also exact top-k for every target, with those compensations that start from no
            threshold.
        cap_k: survivors that thresholds keep at most; None for no cap.
        dense_layers: sets of layers that read everything; None stands for those of the store.

    Raises:
        EvaluationError: a compensation, a mode or a layer is unknown, or no mode has the compensation.
        SettingsError: a target is not one.
    """
    _check_names(compensations, modes)
    _check_layers(stores, dense_layers)
    specs = [TargetSpec.parse(target, field="targets") for target in targets]
    variants = [
        Variant(
            method=mode.method,
            thresholds=label,
            target=spec.label,
            compensation=name,
            cap_k=cap_k,
            dense_layers=layers,
        )
        for label, store in stores.items()
        for spec in specs
        for mode in map(MODES.__getitem__, modes)
        for name in _compensations(mode, compensations, store)
        for layers in dense_layers
    ]
    if top_k:
        label, store = next(iter(stores.items()))
        variants += [
            Variant(method="top_k", thresholds=label, target=spec.label, compensation=name, dense_layers=layers)
            for spec in specs
            for name in _compensations(MODES["values"], compensations, store)
            if _DENOMINATORS[name.removesuffix("+vmc")][0] in ("none", "exact")
            for layers in dense_layers
        ]
    return variants


def _check_names(compensations: Sequence[str], modes: Sequence[str]) -> None:
    for mode in modes:
        if mode not in MODES:
            raise EvaluationError(f"unknown mode {mode!r}", field="mode", remedy=f"Choose from {', '.join(MODES)}")
    for name in compensations:
        if name not in (*COMPENSATIONS, "all"):
            raise EvaluationError(
                f"unknown compensation {name!r}",
                field="compensations",
                remedy=f"Choose from {', '.join(COMPENSATIONS)}, or all; vmc alone equals none",
            )
        having = [mode for mode, known in MODES.items() if name.removesuffix("+vmc") in known.denominators]
        if name != "all" and not set(having) & set(modes):
            raise EvaluationError(
                f"{name} is a compensation of mode {' and '.join(having)}",
                field="compensations",
                remedy=f"Ask for that mode (--mode {having[0]}), or for another compensation",
            )


def _check_layers(stores: Mapping[str, ThresholdStore], dense_layers: Sequence[tuple[int, ...] | None]) -> None:
    num_layers = min(store.manifest.architecture.num_layers for store in stores.values())
    for layer in (layer for layers in dense_layers for layer in layers or ()):
        if not 0 <= layer < num_layers:
            raise EvaluationError(f"no layer {layer} in a model of {num_layers}", field="dense_layers")


def _compensations(mode: Mode, wanted: Sequence[str], store: ThresholdStore) -> list[CompensationName]:
    """The compensations of a mode that are wanted. One that is named and not calibrated fails when it is made ready."""
    if not wanted:
        return [mode.served]
    has_terms = store.expectations is not None or mode.method == "shadow"
    return [
        name
        for name in COMPENSATIONS
        if name.removesuffix("+vmc") in mode.denominators
        and (name in wanted or ("all" in wanted and (has_terms or _DENOMINATORS[name.removesuffix("+vmc")][1] is None)))
    ]
