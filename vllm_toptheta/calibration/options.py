"""What can be chosen about a calibration."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_toptheta.errors import CalibrationError
from vllm_toptheta.limits import DEFAULT_WEIGHT_FLOOR, MAX_WEIGHT_FLOOR, NUM_ANCHORS, channels_for
from vllm_toptheta.reference import Placement
from vllm_toptheta.store import Target, TargetSpec

__all__ = ["CalibrationOptions", "Place", "ShadowOptions", "TopKMode"]

TopKMode = Literal["each", "shared", "off"]


class Place(NamedTuple):
    """Where a model runs, and as what."""

    dtype: torch.dtype = torch.float32  # of weights and activations; scores are float32 whatever it is
    device: str = "cpu"
    device_map: str | None = None  # how transformers spreads the model over devices, such as auto, instead of `device`


class ShadowOptions(BaseModel):
    """What can be chosen about shadow keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_channels: int | None = Field(
        default=None, ge=2, multiple_of=2, description="Directions of a key; half of the head size if not given."
    )
    weight_floor: float = Field(
        default=DEFAULT_WEIGHT_FLOOR,
        gt=0.0,
        le=MAX_WEIGHT_FLOOR,
        description="Of the relative thresholds that they will be served with.",
    )
    candidate_mass: float = Field(
        default=0.99, gt=0.0, le=1.0, description="Share of the survivors' softmax that candidates hold in every head."
    )

    def channels_of(self, head_size: int) -> int:
        """Returns the directions of a key of this size: those given, or about half as many as it has numbers.

        Without a number given, one that there are kernels for is chosen where keys are long enough.

        Args:
            head_size: numbers of a key.

        Raises:
            CalibrationError: more were asked for than there are, or a number that is not served, while others are.
        """
        served = channels_for(head_size)
        if self.num_channels is None:
            fitting = [number for number in served if number <= head_size // 2] or served[:1]
            return fitting[-1] if fitting else max(2, head_size // 4 * 2)
        if self.num_channels > head_size:
            raise CalibrationError(
                f"{self.num_channels} channels of keys with {head_size} numbers",
                field="num_channels",
                remedy="Ask for fewer, or for none in particular",
            )
        if served and self.num_channels not in served:
            allowed = " or ".join(map(str, served))
            raise CalibrationError(
                f"shadow keys of {self.num_channels} channels are not served with heads of {head_size}",
                field="num_channels",
                remedy=f"Ask for {allowed}, or for none in particular",
            )
        return self.num_channels


class CalibrationOptions(BaseModel):
    """The options that decide the numbers; with the model and the texts, they are all that does."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    targets: tuple[TargetSpec, ...] = Field(description="What to calibrate thresholds for; ks ascending.")
    max_length: int = Field(default=4096, ge=2, description="Tokens of a sequence; thresholds are clamped beyond.")
    num_sequences: int = Field(default=4, ge=1, description="Sequences to calibrate on.")
    row_fraction: float = Field(
        default=1.0, gt=0.0, le=1.0, description="Rows of a sequence observed, even over lengths."
    )
    seed: int = Field(default=0, ge=0, description="Chooses sequences and rows.")
    beta: float = Field(
        default=0.0, ge=-100.0, le=100.0, description="Standard deviations added to the mean threshold."
    )
    top_k: TopKMode = Field(
        default="shared",
        description="Layers hand on exact top-k attention while calibrating: in one pass for all k (with the middle "
        "one), in a pass for each k, or not at all.",
    )
    dense_layers: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(0, 1), description="Layers to serve dense.")
    placement: Placement = "pre_softmax"
    shadow: ShadowOptions | None = Field(default=None, description="Shadow keys; None to calibrate none.")

    @classmethod
    def create(cls, targets: Sequence[TargetSpec | int | str], **options: Any) -> "CalibrationOptions":
        """Checks options and puts the targets in order.

        Args:
            targets: targets, their labels, or ks, in any order.
            options: the other fields.

        Raises:
            SettingsError: a label is none.
            CalibrationError: an option has an impossible value, or contradicts another.
        """
        specs = [spec if isinstance(spec, TargetSpec) else TargetSpec.parse(str(spec)) for spec in targets]
        specs.sort(key=lambda spec: spec.k)
        if len({spec.k for spec in specs}) < len(specs):
            raise CalibrationError(f"give different targets, got {[spec.label for spec in specs]}", field="targets")
        try:
            chosen = cls(targets=tuple(specs), **options)
        except ValidationError as error:
            problem = error.errors()[0]
            field = ".".join(map(str, problem["loc"]))
            raise CalibrationError(f"{problem['msg']}, got {problem['input']!r}", field=field) from None
        chosen._check_lengths()
        return chosen

    def _check_lengths(self) -> None:
        longest = self.max_length
        for spec in self.targets:
            if spec.k >= longest:
                raise CalibrationError(
                    f"k {spec.k} needs rows of more than {spec.k} tokens, but max_length is {longest}",
                    field="targets",
                    remedy="Raise max_length or leave that k out",
                )
        if not self.targets and not self.shadow:
            raise CalibrationError(
                "nothing to calibrate", field="targets", remedy="Give a number of keys, or ask for shadow keys"
            )
        if self.shadow and longest < 2 * NUM_ANCHORS:
            raise CalibrationError(
                f"shadow keys need sequences of at least {2 * NUM_ANCHORS} tokens, max_length is {longest}: the "
                f"{NUM_ANCHORS} anchors are always read",
                field="max_length",
                remedy="Raise it",
            )

    @property
    def target_ks(self) -> list[int]:
        """The ks, ascending."""
        return [spec.k for spec in self.targets]

    @property
    def store_targets(self) -> list[Target]:
        """The targets with the lengths that their calibration covers."""
        return [Target(k=spec.k, min_length=spec.k + 1, max_length=self.max_length) for spec in self.targets]
