"""What thresholds aim at: how many keys, or how much of the softmax, each head should keep.

    k:64             theta at the 64th largest score of a row, on average over rows (the paper's)
    k:64@2048^0.5    the same with 64 keys at 2,048 tokens, growing with the length n as (n / 2048)^0.5
    survivors:64     64 survivors of every query head, on average over rows
    mass:0.98        as many keys as it takes for the expected lost mass of each head to stay at 0.02
    rows:64          64 survivors on average over query heads, given to the layers and heads where they save most mass

A label is the text above. It names a target in options, in tables and in `ThresholdStore.curve_of`.
"""

from __future__ import annotations

import re
from typing import Annotated, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, ValidationError, model_validator

from vllm_toptheta.errors import SettingsError
from vllm_toptheta.store.fields import StrictModel, Tokens

_LABEL = re.compile(
    r"(?:k:)?(?P<k>\d+)(?:@(?P<reference_length>\d+)\^(?P<growth>[\d.]+))?|mass:(?P<mass>[\d.]+)|(?:survivors:(?P<survivors>\d+))|rows:(?P<rows>\d+)"
)


class TargetSpec(StrictModel):
    """A target, without the lengths that it was calibrated on."""

    k: Tokens | None = Field(default=None, description="How many scores should reach the threshold.")
    reference_length: Tokens | None = Field(
        default=None, description="The length at which that number is k, if it grows."
    )
    growth: Annotated[float, Field(gt=0.0, le=1.0)] | None = Field(
        default=None, description="Keys at length n are k * (n / reference_length) ** growth."
    )
    survivors: Tokens | None = Field(default=None, description="Survivors of every query head, on average over rows.")
    mass: Annotated[float, Field(gt=0.0, lt=1.0)] | None = Field(
        default=None, description="Share of the softmax that survivors should hold, on average over the rows of a head."
    )
    rows: Tokens | None = Field(
        default=None, description="Survivors per query head, on average over heads and sparse layers."
    )

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        if [self.k, self.survivors, self.mass, self.rows].count(None) != 3:
            raise ValueError("give one of k, survivors, mass and rows")
        if (self.reference_length is None) != (self.growth is None) or (self.growth is not None and self.k is None):
            raise ValueError("reference_length and growth belong to k, and to each other")
        if self.k is not None and self.reference_length is not None and self.k >= self.reference_length:
            raise ValueError(f"k {self.k} must be less than its reference_length {self.reference_length}")
        return self

    @classmethod
    def parse(cls, label: str, *, field: str = "target") -> TargetSpec:
        """Read a label; a bare number is a k.

        Args:
            label: As the head of this module shows them.
            field: The option that it came from, for the error message.

        Raises:
            SettingsError: It is none of them.
        """
        match = _LABEL.fullmatch(label.strip())
        remedy = "Write k:64, k:64@2048^0.5, survivors:64, mass:0.98 or rows:64"
        if match is None:
            raise SettingsError(f"unknown target {label!r}", field=field, remedy=remedy)
        try:
            numbers = {
                name: float(text) if name in ("growth", "mass") else int(text)
                for name, text in match.groupdict().items()
                if text is not None
            }
            return TargetSpec.model_validate(numbers)
        except (ValidationError, ValueError) as error:
            problem = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            raise SettingsError(f"{label!r}: {problem}", field=field, remedy=remedy) from None

    @property
    def label(self) -> str:
        """The text that `parse` reads."""
        if self.mass is not None:
            return f"mass:{self.mass:g}"
        if self.rows is not None:
            return f"rows:{self.rows}"
        if self.survivors is not None:
            return f"survivors:{self.survivors}"
        return f"k:{self.k}" if self.growth is None else f"k:{self.k}@{self.reference_length}^{self.growth:g}"

    @property
    def constant_k(self) -> int | None:
        """The k of a target that keeps the same number of keys at every length and in every head, else None."""
        return self.k if self.growth is None else None

    def keys(self, seq_len: ArrayLike) -> NDArray[np.float64]:
        """Return how many keys a target with a k keeps of each length.

        Args:
            seq_len: Tokens, an integer or an array of them.

        Returns:
            `[*seq_len.shape]` float64.

        Raises:
            ValueError: It has no k.
        """
        if self.k is None:
            raise ValueError(f"{self.label} is not a number of keys")
        lengths = np.asarray(seq_len, np.float64)
        if self.reference_length is None or self.growth is None:
            return np.full(lengths.shape, float(self.k))
        return np.asarray(self.k * (lengths / self.reference_length) ** self.growth)


class Target(TargetSpec):
    """A calibrated target, and the lengths of the calibration rows behind it."""

    min_length: Tokens = Field(description="Shortest row, in tokens; rows that see at most k keys stay dense.")
    max_length: Tokens = Field(description="Longest row, in tokens.")

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if self.min_length > self.max_length:
            raise ValueError(f"expected min_length <= max_length, got {self.min_length}, {self.max_length}")
        if self.k is not None and not self.keys(self.min_length) < self.min_length:
            raise ValueError(
                f"expected k < min_length <= max_length, got {self.k}, {self.min_length}, {self.max_length}"
            )
        return self

    @property
    def dense_length(self) -> int:
        """Rows of at most this many tokens stay dense."""
        return self.min_length - 1 if self.constant_k is None else self.constant_k
