"""What is compared with dense attention: thresholds, alone, with shadow keys or by tiers, or exact top-k.

Thresholds relative to the row, `floor:2`, need no store, and so do tiers: their number is a weight, in multiples of the
average softmax weight of a row. Calibrated ones, `k:64` and what else a store has, are its.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vllm_toptheta.errors import EvaluationError
from vllm_toptheta.limits import DEFAULT_WEIGHT_FLOOR, MAX_WEIGHT_FLOOR
from vllm_toptheta.reference import Denominator
from vllm_toptheta.store import FLOOR_PREFIX, TargetSpec, ThresholdStore
from vllm_toptheta.store import floor_label as store_floor_label

__all__ = [
    "COMPENSATIONS",
    "MODES",
    "CompensationName",
    "Variant",
    "expand_variants",
    "floor_label",
    "floor_variant",
    "store_of",
]


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

    method: Literal["top_theta", "shadow", "tiers", "top_k"] = Field(
        default="top_theta",
        description="Thresholds on all keys (mode values) or on the candidates that shadow keys name (mode shadow), or "
        "tiers, heavy keys read exactly and light ones as copies, or an exact top-k search in every row.",
    )
    thresholds: str = Field(
        default="", description="Label of the store, if it has one; top_k takes only its dense layers."
    )
    target: str = Field(
        description="What the thresholds aim at: k:64 is 64 keys per query head, floor:2 every key with twice the "
        "average weight of its row."
    )
    compensation: CompensationName = Field(
        default="sdc+vmc", description="Softmax denominator, and +vmc if the lost mass is given to the value mean."
    )
    cap_k: int | None = Field(default=None, ge=1, description="Survivors to keep at most, the last ones.")
    dense_layers: tuple[int, ...] | None = Field(
        default=None, description="Layers that read everything; None for those of the store, if there is one."
    )
    heavy: float | None = Field(
        default=None,
        ge=0.0,
        le=1.0,
        description="Of tiers: what a key must weigh at least to be read exactly, in multiples of what the row's "
        "anchors weigh.",
    )

    @model_validator(mode="after")
    def _check_method(self) -> Self:
        if self.weight_floor is not None and self.method == "top_k":
            raise ValueError(f"{self.target} is no number of keys")
        if self.weight_floor is None and self.method == "shadow":
            raise ValueError(f"{self.target} is a target of method top_theta")
        return self

    @model_validator(mode="after")
    def _check_tiers(self) -> Self:
        if self.method != "tiers":
            if self.heavy is not None:
                raise ValueError(f"heavy is of method tiers, not of {self.method}")
            return self
        if self.heavy is None:
            raise ValueError("heavy is missing: tiers need to know which keys to read exactly")
        if not self.weight_floor:
            raise ValueError(f"{self.target} is no target of tiers, they need a weight floor above 0")
        if self.compensation != "sdc+vmc":
            raise ValueError(f"{self.compensation} is no compensation of tiers, they have sdc+vmc")
        if self.thresholds or self.cap_k is not None:
            raise ValueError("tiers have neither a store nor a cap")
        return self

    @property
    def weight_floor(self) -> float | None:
        """Of thresholds relative to the row, in multiples of the average weight; None of others."""
        return float(self.target.removeprefix(FLOOR_PREFIX)) if self.target.startswith(FLOOR_PREFIX) else None

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
        heavy = "" if self.heavy is None else f"heavy:{self.heavy:g}"
        method = self.method.replace("_", "-")
        parts = (method, self.thresholds, self.target, heavy, self.compensation, self.restrictions)
        return " ".join(part for part in parts if part)


def floor_label(weight_floor: float, *, field: str) -> str:
    """Returns the target of thresholds relative to the row.

    Args:
        weight_floor: in multiples of the average weight; 0 keeps everything.
        field: the option that it came from, for the message of an error.

    Raises:
        EvaluationError: it is negative, too large or not a number.
    """
    if not 0 <= weight_floor <= MAX_WEIGHT_FLOOR:
        raise EvaluationError(
            f"no weight floor: {weight_floor:g}",
            field=field,
            remedy=f"Give multiples of the average weight, from 0 (dense) to {MAX_WEIGHT_FLOOR:g}",
        )
    return store_floor_label(weight_floor)


def floor_variant(weight_floor: float, *, heavy: float | None = None) -> Variant:
    """Returns what a floor is compared as where it is tuned.

    Args:
        weight_floor: in multiples of the average weight.
        heavy: by copies, what a key must weigh to be read exactly; None to read all keys.

    Raises:
        EvaluationError: it is no weight floor.
    """
    target = floor_label(weight_floor, field="floors")
    return Variant(target=target) if heavy is None else Variant(method="tiers", target=target, heavy=heavy)


def store_of(variant: Variant, stores: Mapping[str, ThresholdStore]) -> ThresholdStore | None:
    """Returns the store that a variant reads, None for one that needs none.

    Args:
        variant: the variant.
        stores: threshold stores by their labels.

    Raises:
        EvaluationError: it needs one, and there is none of its label.
    """
    if variant.weight_floor is not None and variant.method != "shadow":
        return None
    store = stores.get(variant.thresholds)
    if store is None and variant.method != "top_k":
        raise EvaluationError(
            f"{variant.method.replace('_', '-')} {variant.target} needs what was calibrated",
            field="thresholds",
            remedy="Give a store with shadow keys (--thresholds), or compare in mode values"
            if variant.method == "shadow"
            else "Give a store (--thresholds), or ask for thresholds that need none (--targets floor:2)",
        )
    return store


def expand_variants(
    stores: Mapping[str, ThresholdStore],
    *,
    targets: Sequence[str],
    compensations: Sequence[str] = (),
    modes: Sequence[str] = ("values",),
    heavy: Sequence[float] = (),
    top_k: Sequence[int] = (),
    cap_k: int | None = None,
    dense_layers: Sequence[tuple[int, ...] | None] = (None,),
) -> list[Variant]:
    """Returns every combination of what was asked for.

    Args:
        stores: threshold stores by their labels; none are needed for thresholds relative to the row and exact top-k.
        targets: what the thresholds aim at in mode values; a bare number is a k. In mode shadow, they are those that
            the store's shadow keys were calibrated for.
        compensations: names out of `COMPENSATIONS`, each for the modes that have it, or `all`, which leaves out those
            that a store has no terms for; what a server of the mode has if none is named.
        modes: names out of `MODES`.
        heavy: also tiers that read keys of this weight exactly, at each of the targets that are weight floors.
        top_k: also exact top-k with these k, with those compensations that start from no threshold.
        cap_k: survivors that thresholds keep at most; None for no cap.
        dense_layers: sets of layers that read everything; None stands for those of the store, and for none where
            there is no store.

    Raises:
        EvaluationError: a compensation, a mode or a k is unknown, no mode has the compensation, a target has
            no such mode, or needs a store, and there is none; or tiers cannot be.
        SettingsError: a target is not one.
    """
    _check_names(compensations, modes)
    labels = [_target_label(target) for target in targets]
    relative = [label for label in labels if label.startswith(FLOOR_PREFIX)]
    calibrated = [label for label in labels if label not in relative]
    if calibrated and "values" in modes and not stores:
        store_of(Variant(target=calibrated[0]), stores)
    if "shadow" in modes and not stores:
        store_of(Variant(method="shadow", target=floor_label(DEFAULT_WEIGHT_FLOOR, field="mode")), stores)
    sources: list[tuple[str, ThresholdStore | None, list[str], Mode]] = []
    if "values" in modes:
        sources.append(("", None, relative, MODES["values"]))
    for label, store in stores.items():
        if "values" in modes:
            sources.append((label, store, calibrated, MODES["values"]))
        if "shadow" in modes:
            sources.append((label, store, [_shadow_target(store, relative)], MODES["shadow"]))
    variants = [
        Variant(
            method=mode.method,
            thresholds=label,
            target=target,
            compensation=name,
            cap_k=cap_k,
            dense_layers=layers,
        )
        for label, store, of_source, mode in sources
        for target in of_source
        for name in _compensations(mode, compensations, store)
        for layers in dense_layers
    ]
    variants += [
        Variant(method="tiers", target=target, heavy=weight, dense_layers=layers)
        for target, weight in _tiers(relative, heavy)
        for layers in dense_layers
    ]
    first, its_store = next(iter(stores.items()), ("", None))
    return variants + [
        Variant(method="top_k", thresholds=first, target=_k_label(k), compensation=name, dense_layers=layers)
        for k in top_k
        for name in _compensations(MODES["values"], compensations, its_store)
        if _DENOMINATORS[name.removesuffix("+vmc")][0] in ("none", "exact")
        for layers in dense_layers
    ]


def _tiers(relative: Sequence[str], heavy: Sequence[float]) -> list[tuple[str, float]]:
    """The weight floors that were asked for, each with what makes a key heavy."""
    for weight in heavy:
        if not 0 <= weight <= 1:
            raise EvaluationError(
                f"no weight of heavy keys: {weight:g}",
                field="heavy",
                remedy="Give multiples of what the anchors of a row weigh, from 0 (every key) to 1",
            )
    if heavy and (not relative or floor_label(0, field="heavy") in relative):
        raise EvaluationError(
            "tiers need a weight floor above 0", field="heavy", remedy="Ask for one, such as floor:2, or for no tiers"
        )
    return [(target, weight) for target in relative for weight in heavy]


def _shadow_target(store: ThresholdStore, relative: Sequence[str]) -> str:
    """The floor that shadow keys were calibrated for, which has to be among those asked for, if any are."""
    label = floor_label(store.shadow.section.weight_floor, field="targets")
    if relative and label not in relative:
        raise EvaluationError(
            f"the shadow keys of {store.folder} were calibrated for {label}, not for {relative[0]}",
            field="targets",
            remedy=f"Ask for {label}, or calibrate again with another --weight-floor",
        )
    return label


def _target_label(target: str) -> str:
    if not target.startswith(FLOOR_PREFIX):
        return TargetSpec.parse(target, field="targets").label
    try:
        return floor_label(float(target.removeprefix(FLOOR_PREFIX)), field="targets")
    except ValueError:
        raise EvaluationError(f"unknown target {target!r}", field="targets", remedy="Write floor:2 or k:64") from None


def _k_label(k: int) -> str:
    if k < 1:
        raise EvaluationError(f"no number of keys: {k}", field="top_k", remedy="Give whole numbers from 1 on")
    return f"k:{k}"


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


def _compensations(mode: Mode, wanted: Sequence[str], store: ThresholdStore | None) -> list[CompensationName]:
    """The compensations of a mode that are wanted. One that is named and not calibrated fails when it is made ready."""
    if not wanted:
        return [mode.served]
    has_terms = store is not None and (store.expectations is not None or mode.method == "shadow")
    return [
        name
        for name in COMPENSATIONS
        if name.removesuffix("+vmc") in mode.denominators
        and (name in wanted or ("all" in wanted and (has_terms or _DENOMINATORS[name.removesuffix("+vmc")][1] is None)))
    ]
