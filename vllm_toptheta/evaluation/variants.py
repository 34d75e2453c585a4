"""What is compared with dense attention: thresholds or exact top-k, at some target, with some compensation."""

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from vllm_toptheta.errors import EvaluationError
from vllm_toptheta.reference import Denominator
from vllm_toptheta.store import TargetSpec, ThresholdStore

__all__ = ["COMPENSATIONS", "CompensationName", "Variant", "expand_variants"]

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
]
COMPENSATIONS: tuple[CompensationName, ...] = get_args(CompensationName)

# name without +vmc: the denominator of the reference, and what of the store's expectations it needs
_DENOMINATORS: dict[str, tuple[Denominator, Literal["offline_sum", "exp_threshold_scale"] | None]] = {
    "none": ("none", None),
    "sdc": ("exact", None),
    "offline": ("offline", "offline_sum"),
    "exp_threshold": ("exp_threshold", None),
    "scaled_exp_threshold": ("exp_threshold", "exp_threshold_scale"),
}


class Variant(BaseModel):
    """One sparse attention to compare with dense attention."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["top_theta", "top_k"] = Field(
        default="top_theta", description="Calibrated thresholds, or an exact top-k search in every row."
    )
    thresholds: str = Field(default="", description="Label of the store; top_k takes only its dense layers.")
    target: str = Field(description="What the thresholds aim at: k:64 is 64 keys per query head.")
    compensation: CompensationName = Field(
        default="sdc+vmc", description="Softmax denominator, and +vmc if the lost mass is given to the value mean."
    )
    cap_k: int | None = Field(default=None, ge=1, description="Survivors to keep at most, the last ones.")

    @property
    def denominator(self) -> Denominator:
        """The softmax denominator, as the reference names it."""
        return _DENOMINATORS[self.compensation.removesuffix("+vmc")][0]

    @property
    def calibrated_term(self) -> Literal["offline_sum", "exp_threshold_scale"] | None:
        """What of the store's expectations the denominator needs, if anything."""
        return _DENOMINATORS[self.compensation.removesuffix("+vmc")][1]

    @property
    def value_mean(self) -> bool:
        """Whether the lost mass is given to the mean of the values."""
        return self.compensation.endswith("+vmc")

    @property
    def name(self) -> str:
        """The variant in a few words, unique among variants."""
        cap = "" if self.cap_k is None else f"cap {self.cap_k}"
        parts = (self.method.replace("_", "-"), self.thresholds, self.target, self.compensation, cap)
        return " ".join(part for part in parts if part)


def expand_variants(
    stores: Mapping[str, ThresholdStore],
    *,
    targets: Sequence[str],
    compensations: Sequence[str] = ("sdc+vmc",),
    top_k: bool = False,
    cap_k: int | None = None,
) -> list[Variant]:
    """Returns every combination of what was asked for.

    Args:
        stores: threshold stores by their labels, at least one.
        targets: what the thresholds aim at; a bare number is a k.
        compensations: names out of `COMPENSATIONS`, or `all`, which leaves out those that a store has no terms for.
        top_k: also exact top-k for every target that is a constant k, with those compensations that start from no
            threshold.
        cap_k: survivors that Top-Theta keeps at most; None for no cap.

    Raises:
        EvaluationError: a compensation is unknown.
        SettingsError: a target is not one.
    """
    for name in compensations:
        if name not in (*COMPENSATIONS, "all"):
            raise EvaluationError(
                f"unknown compensation {name!r}",
                field="compensations",
                remedy=f"Choose from {', '.join(COMPENSATIONS)}, or all; vmc alone equals none",
            )
    specs = [TargetSpec.parse(target, field="targets") for target in targets]
    variants = []
    for label, store in stores.items():
        for spec in specs:
            for name in COMPENSATIONS:
                variant = Variant(thresholds=label, target=spec.label, compensation=name, cap_k=cap_k)
                is_possible = variant.calibrated_term is None or store.expectations is not None
                # a term that was asked for by name and is missing becomes an error where the variant is made ready
                if name in compensations or ("all" in compensations and is_possible):
                    variants.append(variant)
    if top_k:
        ks = {spec.label for spec in specs if spec.constant_k is not None}
        variants += [
            variant.model_copy(update={"method": "top_k", "cap_k": None})
            for variant in variants
            if variant.thresholds == next(iter(stores))
            and variant.target in ks
            and variant.denominator in ("none", "exact")
        ]
    return variants
