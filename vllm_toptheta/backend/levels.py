"""What a request can ask for in its extra arguments: `"vllm_xargs": {"toptheta": "dense"}`, or a calibrated target.

A level is a number that stands for one way to decode: 0 is the server's own, 1 keeps every key, and from 2 on follow
the other targets of the threshold store. Kernels find a sequence's level in its rule (`kernels.rules`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray

from vllm_toptheta.errors import SettingsError
from vllm_toptheta.store import TargetSpec, ThresholdCurve

ARGUMENT = "toptheta"  # in a request's vllm_xargs
FIELD = f"vllm_xargs.{ARGUMENT}"
COMMON, DENSE = range(2)
DENSE_LABEL = "dense"
MAX_ECHO = 40  # characters of what was asked that an answer repeats
_NEVER_SPARSE = 2**31 - 1  # as a length up to which every key is kept


@dataclass(frozen=True)
class Levels:
    """The levels of a served model.

    Attributes:
        curve: Thresholds of level 0; None if the model runs dense.
        others: Thresholds of the levels from 2 on.
        min_context: Sequences of at most that many tokens are dense at every level.
        refusal: Why requests can ask for nothing; None if they can.
    """

    curve: ThresholdCurve | None
    others: tuple[ThresholdCurve, ...] = ()
    min_context: int = 0
    refusal: str | None = None

    @property
    def _curves(self) -> list[ThresholdCurve | None]:
        """The thresholds of every level, None where it is dense."""
        return [self.curve, None, *self.others]

    @property
    def labels(self) -> list[str]:
        """What a request can ask for."""
        if self.refusal is not None:
            return []
        return [DENSE_LABEL, *(curve.label for curve in self._curves if curve is not None)]

    def label(self, level: int) -> str:
        """What a request writes to get a level."""
        curve = self._curves[level]
        return DENSE_LABEL if curve is None else curve.label

    def parse(self, asked: Any) -> int:
        """The level that a request asks for.

        Args:
            asked: The argument as it was sent: `dense`, the label of a target, or a k.

        Raises:
            SettingsError: It cannot be had; the message is one sentence that says what can.
        """
        if self.refusal is not None:
            raise SettingsError(self.refusal, field=FIELD)
        if asked == DENSE_LABEL:
            return DENSE
        with suppress(SettingsError):
            label = TargetSpec.parse(str(asked)).label
            for level, curve in enumerate(self._curves):
                if curve is not None and curve.label == label:
                    return level
        raise SettingsError(
            f"a request can ask for {', '.join(self.labels)}, not for {repr(asked)[:MAX_ECHO]}", field=FIELD
        )

    def rules(self) -> torch.Tensor:
        """[num_levels, 4] int32, the rule of every level, laid out as `kernels.rules` says."""
        return torch.tensor(
            [
                [level, _NEVER_SPARSE, 1, 1]
                if curve is None
                else [level, max(self.min_context, curve.dense_length), curve.min_length, curve.max_length]
                for level, curve in enumerate(self._curves)
            ],
            dtype=torch.int32,
        )

    def coefficients(self, layer: int, heads: slice) -> torch.Tensor:
        """[num_levels, num_heads, degree + 1] float32 of some heads of a layer; at the dense level, theta is -inf.

        Raises:
            ValueError: The model runs dense.
        """
        coefficients = self.stack(lambda curve: curve.coefficients[layer, heads])
        coefficients[DENSE, :, 0] = -torch.inf
        return coefficients

    def stack(self, array_of: Callable[[ThresholdCurve], NDArray[Any]]) -> torch.Tensor:
        """[num_levels, ...], what is calibrated for each level, and zeros at the dense one.

        Args:
            array_of: An array of the same shape for the thresholds of every level.

        Raises:
            ValueError: The model runs dense.
        """
        if self.curve is None:
            raise ValueError("there are no thresholds")
        common, *others = (torch.from_numpy(array_of(curve).copy()) for curve in (self.curve, *self.others))
        return torch.stack([common, torch.zeros_like(common), *others])
