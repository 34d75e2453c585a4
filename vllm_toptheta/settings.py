"""The options of the backend, from vLLM's `--additional-config` and from the environment.

May import `errors`, `limits`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from vllm_toptheta.errors import SettingsError
from vllm_toptheta.limits import (
    ALLOW_UNTESTED,
    DEFAULT_HEAVY,
    DEFAULT_MAX_LOST_MASS,
    DEFAULT_TIER_WEIGHT_FLOOR,
    DEFAULT_WEIGHT_FLOOR,
    MAX_WEIGHT_FLOOR,
    NUM_ANCHORS,
)

MOST_DRAFT_TOKENS = 32
AUTO_DRAFT_TOKENS = 8  # at most, where their number is chosen
OPTIONS_KEY = "toptheta"  # in --additional-config
ENV_PREFIX = "TOPTHETA_"
# what Kubernetes tells every container about a service that is called toptheta
_SERVICE_LINK = re.compile(ENV_PREFIX + r"(SERVICE_(HOST|PORT)|PORT)(_|$)")


@dataclass(frozen=True)
class Source:
    """Where options come from.

    Attributes:
        file: The file that holds them, if any.
        name: What an option is called there.
    """

    file: Path | None = None
    name: Callable[[str], str] = f"additional_config.{OPTIONS_KEY}.{{}}".format


class Settings(BaseSettings):
    """How the backend decides what to read.

    `--additional-config '{"toptheta": {"weight_floor": 2}}'` wins over `TOPTHETA_WEIGHT_FLOOR=2`, and that over the
    default.
    """

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, env_ignore_empty=True, extra="forbid", frozen=True)

    mode: Literal["values", "shadow"] = Field(
        "values",
        description="What is skipped: values skips value rows below the threshold; shadow skips keys too, by copies in "
        "few bits.",
    )
    shadow_values: bool | None = Field(
        None,
        description="In mode shadow, also keep copies of values. On: copies stand in for keys and values of little "
        "weight, and nothing is calibrated. Off: the shadow keys of toptheta calibrate --mode shadow screen the keys, "
        "in less memory. Default: on, unless thresholds names a store of shadow keys.",
    )
    heavy: float = Field(
        DEFAULT_HEAVY,
        ge=0.0,
        le=1.0,
        description="In mode shadow with copies of values: a key is read exactly if it weighs at least this many times "
        "the total weight of the first 16 and last 128 keys; 0 reads every key.",
    )
    weight_floor: float | None = Field(
        None,
        ge=0.0,
        le=MAX_WEIGHT_FLOOR,
        allow_inf_nan=False,
        description="No key is skipped if its softmax weight is at least this many times the average weight of its "
        "row; 0 is dense. Default: the floor that toptheta tune promised in the store of the model, else "
        f"{DEFAULT_WEIGHT_FLOOR:g}, or {DEFAULT_TIER_WEIGHT_FLOOR:g} with shadow_values; with calibrated shadow keys, "
        "the floor of their calibration.",
    )
    target: str | None = Field(
        None, description="Calibrated thresholds of a store instead of a floor, such as k:128; in mode values only."
    )
    thresholds: Path | None = Field(
        None,
        description="A threshold store, or a directory of stores: for target, for promises of toptheta tune, and for "
        "mode shadow without shadow_values. Default: the shipped stores.",
    )
    compensation: Literal["sdc+vmc", "sdc", "none"] = Field(
        "sdc+vmc",
        description="sdc: the softmax denominator sums over all keys, by their scores or the scores of their copies; "
        "with calibrated shadow keys it is estimated. vmc: the mean value gets the lost mass.",
    )
    dense_layers: Annotated[tuple[int, ...] | None, NoDecode] = Field(
        None,
        description="Layers that read everything, as a list or '0,1'. Default: none; with target, those of the store.",
    )
    min_context: int | None = Field(
        None,
        ge=0,
        description="A sequence of at most this many tokens stays dense. Default: dense where thresholds are no "
        "faster: on GPUs short sequences, and all sequences of a step with few cached tokens, which depends on other "
        "requests; with a promise of toptheta tune also sequences shorter than the measured ones. A sequence of up to "
        f"{NUM_ANCHORS} tokens, or too short for the target, is always dense.",
    )
    guard: Literal["off", "warn", "relax"] = Field(
        "relax",
        description="What to do in a layer that loses more than max_lost_mass too often: relax lowers its thresholds, "
        "warn only logs it. Always off with calibrated shadow keys, because the lost mass is only an estimate.",
    )
    max_lost_mass: float = Field(
        DEFAULT_MAX_LOST_MASS,
        gt=0.0,
        lt=1.0,
        description="Share of the softmax that a token of a query head may lose to skipped values; counted in powers "
        "of two. Without a value, the 99th percentile that toptheta tune measured in a layer is its bound, if that is "
        "less.",
    )
    guard_share: float = Field(
        0.1, gt=0.0, lt=1.0, description="Share of a layer's tokens that may lose more than max_lost_mass."
    )
    always_shadow: bool = Field(
        False,
        description="In mode shadow, scan the copies of keys in every step, also where reading all keys is faster. "
        "Which is faster depends on the tokens of a step, and so on other requests.",
    )
    lossless: bool = Field(
        False,
        description="Draft tokens with thresholds, and verify them densely, several in one step: answers are those of "
        "dense attention. A floor changes the acceptance of drafts, not the answers.",
    )
    draft_tokens: int | Literal["auto"] = Field(
        "auto",
        description="With lossless, tokens drafted before a verification, 1 to 32; auto tries 8, 4 and none, and keeps "
        "the fastest.",
    )
    per_request: bool = Field(
        True,
        description="Let requests choose in vllm_xargs.toptheta: dense decoding, another floor, a promise by its name, "
        "and with lossless on CPUs answers without verification.",
    )
    strict: bool = Field(
        False,
        description="Refuse to serve without a promise of toptheta tune, or otherwise than measured: other weights, "
        "dtype or quantization, longer sequences. Off: only warn.",
    )
    page: bool = Field(True, description="Show the page /toptheta on servers that have the route /toptheta/stats.")

    @field_validator("draft_tokens", mode="before")
    @classmethod
    def _check_draft_tokens(cls, value: Any) -> Any:
        if value == "auto" or (not isinstance(value, bool) and str(value) in map(str, range(1, MOST_DRAFT_TOKENS + 1))):
            return value
        raise ValueError(f"expected a number from 1 to {MOST_DRAFT_TOKENS}, or auto")

    @field_validator("dense_layers", mode="before")
    @classmethod
    def _split_layers(cls, value: Any) -> Any:
        return [part for part in value.strip("[]").split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator("dense_layers")
    @classmethod
    def _check_layers(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and min(value, default=0) < 0:
            raise ValueError("layers are counted from 0")
        return value

    @classmethod
    def load(cls, options: Mapping[str, Any], *, source: Source | None = None) -> Settings:
        """The settings made of options and the environment.

        Args:
            options: What vLLM's `additional_config["toptheta"]` says, or another source.
            source: Where the options come from, for error messages.

        Raises:
            SettingsError: An unknown option or variable, or a value that does not fit; names it and the known ones.
        """
        source = source or Source()
        if not isinstance(options, Mapping):
            raise SettingsError(
                f"expected a mapping, got {type(options).__name__}",
                field=f"additional_config.{OPTIONS_KEY}",
                remedy="""write --additional-config '{"toptheta": {"weight_floor": 2}}'""",
            )
        known = ", ".join(cls.model_fields)
        variables = {ENV_PREFIX + name.upper() for name in cls.model_fields} | {ALLOW_UNTESTED}
        for name in os.environ:
            if name.startswith(ENV_PREFIX) and name not in variables and not _SERVICE_LINK.match(name):
                raise SettingsError(
                    "unknown environment variable", field=name, remedy=f"known ones are {', '.join(sorted(variables))}"
                )
        try:
            settings = cls(**options)
        except ValidationError as error:
            first = error.errors()[0]
            option, *rest = map(str, first["loc"])
            given = option in options
            raise SettingsError(
                "unknown option" if first["type"] == "extra_forbidden" else f"{first['msg']}, got {first['input']!r}",
                file=source.file if given else None,
                field=".".join([source.name(option) if given else ENV_PREFIX + option.upper(), *rest]),
                remedy=f"known options are {known}",
            ) from error
        settings._check_target(source)
        settings._check_copies(source)
        settings._check_drafts(source)
        return settings

    @classmethod
    def of_engine(cls, config: Any) -> Settings:
        """The settings of an engine.

        Args:
            config: vLLM's configuration or arguments of it, whose `additional_config` holds them.

        Raises:
            SettingsError: As `load`.
        """
        options = config.additional_config
        return cls.load(options.get(OPTIONS_KEY, {}) if isinstance(options, dict) else {})

    @property
    def most_draft_tokens(self) -> int:
        """Tokens that are drafted at most before they are verified, where anything is drafted."""
        return AUTO_DRAFT_TOKENS if self.draft_tokens == "auto" else self.draft_tokens

    @property
    def has_copies(self) -> bool | None:
        """Whether light keys are weighed by copies; None if that depends on the store that `thresholds` names."""
        if self.mode != "shadow" or self.shadow_values is not None:
            return self.mode == "shadow" and bool(self.shadow_values)
        return True if self.thresholds is None or "heavy" in self.model_fields_set else None

    def _check_copies(self, source: Source) -> None:
        """Refuse options of copies where there are none.

        Raises:
            SettingsError: Names one of them.
        """
        if self.shadow_values and self.mode != "shadow":
            raise SettingsError(
                "copies of values belong to mode shadow",
                field=source.name("shadow_values"),
                remedy="Leave it out, or choose mode shadow",
            )
        if "heavy" in self.model_fields_set and self.has_copies is False:
            raise SettingsError(
                "without copies of values, keys are heavy by no bound",
                field=source.name("heavy"),
                remedy="Leave it out, or choose mode shadow, and do not switch shadow_values off",
            )

    def _check_drafts(self, source: Source) -> None:
        """Refuse a number of drafts where there are none, and drafts that cannot be faster.

        Raises:
            SettingsError: Names the option.
        """
        if self.lossless and self.weight_floor == 0:
            raise SettingsError(
                "drafts that skip nothing are no faster than what verifies them",
                field=source.name("weight_floor"),
                remedy="Choose another floor, or leave lossless out",
            )
        if "draft_tokens" in self.model_fields_set and not self.lossless:
            raise SettingsError(
                "nothing is drafted",
                field=source.name("draft_tokens"),
                remedy="Leave it out, or set lossless",
            )

    def _check_target(self, source: Source) -> None:
        """Refuse options that have no effect beside each other.

        Raises:
            SettingsError: Names one of them.
        """
        if self.target is None:
            return
        if self.weight_floor is not None:
            raise SettingsError(
                "weight_floor and target are two ways to choose thresholds",
                field=source.name("weight_floor"),
                remedy="Give one of them",
            )
        if self.mode == "shadow":
            raise SettingsError(
                "calibrated targets are served in mode values only",
                field=source.name("target"),
                remedy="Leave target out, or choose mode values",
            )
