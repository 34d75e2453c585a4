"""What manifest.yaml says: which model a store belongs to, what it covers and how it was made.

    ManifestDraft   everything the author of a store states
    Manifest        the draft, the checksum of thresholds.safetensors and its own: the content of manifest.yaml

Every number is bounded and every string and list is capped, so that no manifest can make a reader allocate much.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, ValidationError, model_validator

from vllm_toptheta.errors import FingerprintMismatch, ModelConfigError
from vllm_toptheta.limits import MAX_WEIGHT_FLOOR
from vllm_toptheta.store import fields
from vllm_toptheta.store.heads import heads_of_full_layers
from vllm_toptheta.store.quality import Evidence
from vllm_toptheta.store.rope import normalise_rope, rope_problems
from vllm_toptheta.store.target import Target

SCHEMA_VERSION: Final = 5
READABLE_VERSIONS: Final = (4, 5)  # 4 knew no measured quality, and is otherwise the same

# the most precise type first, so that true stays a bool; YAML and JSON write tuples as lists, hence not strict
RopeValue = bool | float | fields.ShortText | Annotated[tuple[float, ...], Field(strict=False, max_length=4096)]


class ModelIdentity(fields.StrictModel):
    """The model that was calibrated."""

    id: str = Field(
        max_length=256,
        pattern=r"^\w[\w.+-]*(/\w[\w.+-]*)?$",
        description="Hub id (org/name), or a bare name where there is no organisation.",
    )


class Architecture(fields.StrictModel):
    """The fingerprint: what must be equal for thresholds of one model to fit another.

    Heads are those of layers that attend to all tokens, the ones with thresholds; layers with a window may have others.
    """

    num_layers: int = Field(ge=1, le=fields.MAX_LAYERS)
    num_heads: int = Field(ge=1, le=fields.MAX_HEADS, description="Query heads of a layer.")
    num_kv_heads: int = Field(ge=1, le=fields.MAX_HEADS)
    head_size: int = Field(ge=1, le=1024)
    rope: dict[fields.ShortText, RopeValue] = Field(
        max_length=256, description="As store.rope.normalise_rope spells it."
    )

    @model_validator(mode="after")
    def _check_groups(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        return self

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any], *, file: Path | None = None) -> Self:
        """Read the fingerprint off a Hugging Face config.

        Args:
            config: config.json as a dict, or `PretrainedConfig.to_dict()`; a multimodal one is read in `text_config`.
            file: Where it came from, for the error message.

        Raises:
            ModelConfigError: A field is missing or has an impossible value.
        """
        nested = config.get("text_config")
        text_config, prefix = (nested, "text_config.") if isinstance(nested, Mapping) else (config, "")
        for field, message in rope_problems(text_config):
            raise ModelConfigError(message, file=file, field=prefix + field, remedy=_CONFIG_REMEDY)
        heads, *others = heads_of_full_layers(config)
        if others:
            message = f"layers that attend to all tokens have other heads than each other: {clip([heads, *others])}"
            raise ModelConfigError(message, file=file, field=f"{prefix}per_layer_config", remedy=_ONE_KIND_REMEDY)
        text_config = {**text_config, **heads}
        num_heads = text_config.get("num_attention_heads")
        head_size = text_config.get("head_dim")
        hidden_size = text_config.get("hidden_size")
        if head_size is None and isinstance(hidden_size, int) and isinstance(num_heads, int) and num_heads > 0:
            if hidden_size % num_heads:
                raise ModelConfigError(
                    f"{hidden_size} is not a multiple of num_attention_heads {num_heads}, and there is no head_dim",
                    file=file,
                    field="hidden_size",
                    remedy=_CONFIG_REMEDY,
                )
            head_size = hidden_size // num_heads
        num_kv_heads = text_config.get("num_key_value_heads")
        num_layers, layer_kinds = text_config.get("num_hidden_layers"), text_config.get("layers_block_type")
        if num_layers is None and isinstance(layer_kinds, list | tuple):
            # transformers 5 writes Nemotron-H without their number
            num_layers = len(layer_kinds)
        stated = {
            "num_layers": num_layers,
            "num_heads": num_heads,
            "num_kv_heads": num_heads if num_kv_heads is None else num_kv_heads,
            "head_size": head_size,
        }
        try:
            return cls.model_validate({**stated, "rope": normalise_rope(text_config)})
        except ValidationError as error:
            field, message = (_OUR_NAMES.sub(lambda name: _CONFIG_NAMES[name[0]], text) for text in describe(error))
            if field.startswith("rope."):
                # of each type that it might have had there is a message
                field, message = "rope_parameters", f"{field.split('.')[1]} is no number, text or list of numbers"
            raise ModelConfigError(message, file=file, field=prefix + field, remedy=_CONFIG_REMEDY) from None

    def check(self, other: Architecture, *, file: Path | None = None) -> None:
        """Refuse a model whose architecture differs from this one, the one calibrated.

        Args:
            other: The architecture of the model to be served.
            file: The manifest this one was read from, for the error message.

        Raises:
            FingerprintMismatch: Names the first field that differs.
        """
        ours, theirs = self._flat(), other._flat()
        for field in [*ours, *theirs]:
            calibrated, served = ours.get(field), theirs.get(field)
            if calibrated != served:
                raise FingerprintMismatch(
                    f"calibrated on a model with {clip(calibrated)}, but this model has {clip(served)}",
                    file=file,
                    field=f"architecture.{field}",
                    remedy="Calibrate this model (toptheta calibrate --help), or name the folder that was made for it",
                )

    def _flat(self) -> dict[str, Any]:
        dumped = self.model_dump()
        rope = dumped.pop("rope")
        return {**dumped, **{f"rope.{name}": value for name, value in rope.items()}}


class Provenance(fields.StrictModel):
    """How the thresholds were made: enough to make them again. Left out is what an imported file does not say."""

    text: Annotated[tuple[fields.TextSource, ...], Field(strict=False, min_length=1, max_length=1024)]
    num_sequences: fields.Count | None = None
    max_length: fields.Tokens
    row_fraction: float | None = Field(
        default=None, gt=0.0, le=1.0, description="Rows of a sequence that were observed."
    )
    seed: fields.Seed | None = None
    top_k_at_calibration: bool | None = None
    shared_k: fields.Tokens | None = Field(
        default=None,
        description="The k of top-k attention where one pass served all targets; None where each had its own.",
    )
    beta: float | None = Field(
        default=None, ge=-100.0, le=100.0, description="theta = mean + beta * std of the k-th largest score."
    )
    dtype: fields.ShortText | None = Field(default=None, description="Of the weights and activations.")
    versions: fields.Versions
    command: fields.Command
    date: datetime.date


class Measurement(fields.StrictModel):
    """How `Expectations` were measured: thresholds were applied to calibration text, as served."""

    num_sequences: fields.Count


class ThresholdSection(fields.StrictModel):
    """What is said of calibrated thresholds."""

    targets: Annotated[tuple[Target, ...], Field(strict=False, min_length=1, max_length=64)]
    dense_layers: Annotated[
        tuple[Annotated[int, Field(ge=0, lt=fields.MAX_LAYERS)], ...], Field(strict=False, max_length=fields.MAX_LAYERS)
    ]
    placement: Literal["pre_softmax", "post_softmax"]
    degree: int = Field(ge=0, le=4, description="Of the polynomial in ln n.")
    num_buckets: int = Field(ge=1, le=1024)
    measurement: Measurement | None = Field(default=None, description="None where nothing was measured.")

    @model_validator(mode="after")
    def _check_targets(self) -> Self:
        for lower, upper in zip(self.targets, self.targets[1:], strict=False):
            if lower.k >= upper.k:
                raise ValueError(f"targets: k must ascend, got {lower.k} before {upper.k}")
            if max(lower.min_length, upper.min_length) > min(lower.max_length, upper.max_length):
                raise ValueError(f"targets: k {lower.k} and k {upper.k} share no length, so nothing lies between them")
        return self

    @model_validator(mode="after")
    def _check_dense_layers(self) -> Self:
        if list(self.dense_layers) != sorted(set(self.dense_layers)):
            raise ValueError("dense_layers must ascend without repetition")
        return self


class ShadowSection(fields.StrictModel):
    """What is said of shadow keys: what keys are projected on, and which of them are candidates.

    They serve thresholds relative to the row; a row's anchors are always candidates.
    """

    num_channels: int = Field(ge=2, le=1024, multiple_of=2, description="Directions that a key is projected on.")
    weight_floor: float = Field(gt=0.0, le=MAX_WEIGHT_FLOOR, description="Of the relative thresholds calibrated for.")
    min_length: fields.Tokens = Field(description="Shortest calibrated row, in tokens.")
    max_length: fields.Tokens = Field(description="Longest calibrated row, in tokens.")
    block_size: fields.Tokens = Field(
        description="Page of the calibration: keys in that of the newest token are candidates. A larger one keeps more."
    )
    candidate_mass: float = Field(
        gt=0.0, le=1.0, description="Share of the survivors' softmax that candidates hold, in every head."
    )
    candidate_share: fields.Share = Field(description="Expected candidates over keys, mean of layers and kv heads.")

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if self.min_length > self.max_length:
            raise ValueError(f"expected min_length <= max_length, got {self.min_length}, {self.max_length}")
        return self


class TensorsDigest(fields.StrictModel):
    """The checksum of thresholds.safetensors."""

    sha256: fields.Sha256


class ManifestDraft(fields.StrictModel):
    """A manifest before its tensors are written; `save` adds the checksums."""

    schema_version: Literal[4, 5] = SCHEMA_VERSION
    model: ModelIdentity
    architecture: Architecture
    thresholds: ThresholdSection | None = Field(default=None, description="None where there are only shadow keys.")
    shadow: ShadowSection | None = Field(default=None, description="None where there are no shadow keys.")
    calibration: Provenance | None = Field(default=None, description="None where nothing was calibrated.")
    quality: Annotated[tuple[Evidence, ...], Field(strict=False, min_length=1, max_length=2)] | None = Field(
        default=None, description="What weight floors were measured to cost, by mode; None where nothing was measured."
    )

    @model_validator(mode="after")
    def _check_sections(self) -> Self:
        is_calibrated = self.thresholds is not None or self.shadow is not None
        if not is_calibrated and self.quality is None:
            raise ValueError("neither thresholds nor shadow nor quality: a store without content")
        if is_calibrated != (self.calibration is not None):
            raise ValueError("calibration belongs to thresholds and shadow, and they to it")
        modes = [evidence.mode for evidence in self.quality or ()]
        if len(set(modes)) < len(modes):
            raise ValueError(f"quality: measured twice in mode {modes[0]}")
        if self.schema_version < SCHEMA_VERSION and self.quality is not None:
            raise ValueError(f"quality: there is none in version {self.schema_version}")
        if self.dense_layers and self.dense_layers[-1] >= self.architecture.num_layers:
            raise ValueError(
                f"dense_layers: no layer {self.dense_layers[-1]} in a model of {self.architecture.num_layers}"
            )
        if self.shadow and self.shadow.num_channels > self.architecture.head_size:
            raise ValueError(
                f"shadow: {self.shadow.num_channels} channels of keys with {self.architecture.head_size} numbers"
            )
        return self

    @property
    def targets(self) -> tuple[Target, ...]:
        """What thresholds were calibrated for, k ascending; none where there are only shadow keys."""
        return () if self.thresholds is None else self.thresholds.targets

    @property
    def target_ks(self) -> tuple[int, ...]:
        """The ks of `targets`."""
        return tuple(target.k for target in self.targets)

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of `targets`."""
        return tuple(target.label for target in self.targets)

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """Layers that read everything where calibrated thresholds are served."""
        return () if self.thresholds is None else self.thresholds.dense_layers

    @property
    def placement(self) -> Literal["pre_softmax", "post_softmax"]:
        """What thresholds apply to; relative ones are compared before the softmax."""
        return "pre_softmax" if self.thresholds is None else self.thresholds.placement

    @property
    def calibrated_on(self) -> frozenset[str]:
        """The sha256 of the texts that something was calibrated on."""
        return frozenset() if self.calibration is None else frozenset(text.sha256 for text in self.calibration.text)

    def evidence(self, mode: str) -> Evidence | None:
        """What weight floors were measured to cost in a mode; None where nothing was measured."""
        return next((evidence for evidence in self.quality or () if evidence.mode == mode), None)


class Manifest(ManifestDraft):
    """The content of manifest.yaml."""

    tensors: TensorsDigest
    content_sha256: fields.Sha256 = Field(
        description="Of everything above, so that no edit or lost bit goes unnoticed."
    )

    @classmethod
    def from_draft(cls, draft: ManifestDraft, *, tensors_sha256: str) -> Self:
        """Return the manifest of a store whose tensors have this checksum."""
        dumped = draft.model_dump(exclude={"schema_version"})
        dumped |= {"tensors": {"sha256": tensors_sha256}, "content_sha256": "0" * 64}
        manifest = cls.model_validate(dumped)
        return manifest.model_copy(update={"content_sha256": manifest.digest()})

    def digest(self) -> str:
        """Return what `content_sha256` should be: the sha256 of the other fields that are set, as canonical JSON."""
        content = self.model_dump(mode="json", exclude={"content_sha256"}, exclude_none=True)
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def describe(error: ValidationError) -> tuple[str, str]:
    """Return the field of the first problem, and a message with the number of further ones."""
    problems = error.errors(include_url=False)
    first = problems[0]
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).removeprefix(".")
    message = first["msg"].removeprefix("Value error, ")
    if isinstance(first["input"], str | int | float | None):
        message += f", got {clip(first['input'])}"
    if len(problems) > 1:
        message += f" (and {len(problems) - 1} more)"
    return clip_text(field) or "(the whole)", message


def clip(value: object) -> str:
    """Return `repr(value)`, shortened for an error message."""
    return clip_text(repr(value))


def clip_text(text: str) -> str:
    """Return `text`, shortened for an error message."""
    return text if len(text) <= 120 else text[:117] + "..."


# what the fields of `Architecture` are called in config.json
_CONFIG_NAMES = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "(the whole)": "num_key_value_heads",
}
_OUR_NAMES = re.compile("|".join(re.escape(name) for name in _CONFIG_NAMES))
_ONE_KIND_REMEDY = "Top-Theta needs heads of one number and size there: serve this model without it"
_CONFIG_REMEDY = "Top-Theta needs a decoder's config.json with num_hidden_layers, num_attention_heads and head_dim"
