"""What thresholds aim at, by its label in options, requests, tables and `ThresholdStore.curve_of`.

k:64       theta at the 64th largest score of a row, on average over rows (the paper's); calibrated
floor:2    twice the average softmax weight of the row, the least that a key must weigh to be sure to be read
"""

from __future__ import annotations

import re
from typing import Self

from pydantic import Field, ValidationError, model_validator

from vllm_toptheta.errors import SettingsError
from vllm_toptheta.store.fields import StrictModel, Tokens

FLOOR_PREFIX = "floor:"
_LABEL = re.compile(r"(?:k:)?(\d+)")


def floor_label(weight_floor: float) -> str:
    """The label of thresholds relative to the row."""
    return f"{FLOOR_PREFIX}{weight_floor:g}"


class TargetSpec(StrictModel):
    """A calibrated target, without the lengths that it was calibrated on."""

    k: Tokens = Field(description="How many scores should reach the threshold.")

    @classmethod
    def parse(cls, label: str, *, field: str = "target") -> TargetSpec:
        """Read the label of a calibrated target; a bare number is a k.

        Args:
            label: As the head of this module shows it.
            field: The option that it came from, for the error message.

        Raises:
            SettingsError: It is none.
        """
        match = _LABEL.fullmatch(label.strip())
        remedy = "Write k:64, or another number of keys"
        if label.startswith(FLOOR_PREFIX):
            remedy = "A weight floor is no calibrated target: give it as weight_floor"
        if match is None:
            raise SettingsError(f"unknown target {label!r}", field=field, remedy=remedy)
        try:
            return TargetSpec(k=int(match[1]))
        except (ValidationError, ValueError) as error:
            problem = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            raise SettingsError(f"{label!r}: {problem}", field=field, remedy=remedy) from None

    @property
    def label(self) -> str:
        """The text that `parse` reads."""
        return f"k:{self.k}"


class Target(TargetSpec):
    """A calibrated target, and the lengths of the calibration rows behind it; rows of at most k tokens are dense."""

    min_length: Tokens = Field(description="Shortest row, in tokens.")
    max_length: Tokens = Field(description="Longest row, in tokens.")

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if not self.k < self.min_length <= self.max_length:
            raise ValueError(
                f"expected k < min_length <= max_length, got {self.k}, {self.min_length}, {self.max_length}"
            )
        return self
