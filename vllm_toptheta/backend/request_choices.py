"""What a request can ask for in its extra arguments: `"vllm_xargs": {"toptheta": "dense"}`, `"floor:1.5"` or `"high"`.

What it gets is an offset on all of its thresholds (`kernels.contract`): 0 is the server's own setting, minus infinity
keeps every key. Where answers are verified densely, thresholds are those of its drafts; with `"lossy"` in front of it,
or alone, they are those of its answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from vllm_toptheta.errors import SettingsError
from vllm_toptheta.limits import MAX_WEIGHT_FLOOR
from vllm_toptheta.selection import ServedThresholds
from vllm_toptheta.store import FLOOR_PREFIX

ARGUMENT = "toptheta"  # in a request's vllm_xargs
FIELD = f"vllm_xargs.{ARGUMENT}"
COMMON, KEEP_ALL = 0.0, -math.inf  # offsets
DENSE_LABEL, FLOOR_KIND = "dense", FLOOR_PREFIX.removesuffix(":")
LOSSY = "lossy"
NOTHING_VERIFIED = "no answer of this server is verified, so all are lossy"
MAX_ECHO = 40  # characters of what was asked that an answer repeats


@dataclass(frozen=True)
class RequestChoices:
    """What the requests of a served model can ask for.

    Attributes:
        thresholds: The server's own; None if the model runs dense.
        any_floor: Whether a request can name a floor of its own.
        presets: Floors that have names, because they keep a promise.
        refusal: Why requests can ask for nothing; None if they can.
        lossy_refusal: Why none can go without dense verification; None if they can.
    """

    thresholds: ServedThresholds | None
    any_floor: bool = False
    presets: Mapping[str, float] = field(default_factory=dict)
    refusal: str | None = None
    lossy_refusal: str | None = NOTHING_VERIFIED

    @property
    def kinds(self) -> list[str]:
        """What requests are counted as: by how they are decoded, whatever their floor."""
        if self.refusal is not None:
            return []
        return [DENSE_LABEL, *([] if self.thresholds is None else [self._sparse_kind]), *self._lossy]

    @property
    def labels(self) -> list[str]:
        """What a request can write, for people."""
        if self.refusal is not None:
            return []
        own = [] if self.thresholds is None else [self.thresholds.label]
        floors = [*self.presets, f"{FLOOR_PREFIX}0 to {MAX_WEIGHT_FLOOR:g}"] if self._has_floors else []
        return [DENSE_LABEL, *own, *floors, *self._lossy]

    @property
    def _lossy(self) -> list[str]:
        return [LOSSY] if self.lossy_refusal is None else []

    @property
    def _has_floors(self) -> bool:
        return self.any_floor and self.thresholds is not None and self.thresholds.weight_floor is not None

    def parse(self, asked: Any) -> float:
        """The offset that a request asks for, scaled logits.

        Args:
            asked: The argument as it was sent; blanks around a word and the case of its letters do not count.

        Raises:
            SettingsError: It cannot be had; the message is one sentence that says what can.
        """
        if self.refusal is not None:
            raise SettingsError(self.refusal, field=FIELD)
        if is_lossy(asked) and self.lossy_refusal is not None:
            raise SettingsError(
                self.lossy_refusal, field=FIELD, remedy=f"Leave {LOSSY} out, or ask a server that can do both"
            )
        wanted = _word(asked)
        offset = self._offset(wanted)
        if is_lossy(asked):
            level = wanted.removeprefix(LOSSY).strip()
            offset = self._offset(level) if level else COMMON
        if offset is not None and not (is_lossy(asked) and offset == KEEP_ALL):
            return offset
        echo = repr(asked)
        if len(echo) > MAX_ECHO:
            echo = f"{echo[:MAX_ECHO]}... ({len(echo)} characters)"
        raise SettingsError(f"a request can ask for {', '.join(self.labels)}, not for {echo}", field=FIELD)

    def _offset(self, wanted: str) -> float | None:
        """That of a level; None if it cannot be had."""
        if wanted == DENSE_LABEL:
            return KEEP_ALL
        if self.thresholds is not None and _is_same(wanted, self.thresholds.label):
            return COMMON
        if self._has_floors and (wanted in self.presets or wanted.startswith(FLOOR_PREFIX)):
            with suppress(ValueError):
                floor = self.presets[wanted] if wanted in self.presets else float(wanted.removeprefix(FLOOR_PREFIX))
                if floor == 0:
                    return KEEP_ALL
                if 0 < floor <= MAX_WEIGHT_FLOOR and self.thresholds is not None and self.thresholds.weight_floor:
                    return math.log(floor) - math.log(self.thresholds.weight_floor)
        return None

    def kind(self, offset: float) -> str:
        """Which of `kinds` a request with this offset is counted as."""
        return DENSE_LABEL if offset == KEEP_ALL else self._sparse_kind

    @property
    def _sparse_kind(self) -> str:
        return FLOOR_KIND if self._has_floors or self.thresholds is None else self.thresholds.label


def is_lossy(asked: Any) -> bool:
    """Whether a request asks for an answer by thresholds where answers are verified, whether or not it can be had."""
    return _word(asked).split()[:1] == [LOSSY]


def _word(asked: Any) -> str:
    """What was asked for; nothing that is known if it is no word."""
    return asked.strip().casefold() if isinstance(asked, str) else ""


def _is_same(wanted: str, label: str) -> bool:
    """Whether a word is a label, also with its number written otherwise, as k:64.0."""
    kind, _, number = wanted.partition(":")
    own_kind, _, own_number = label.partition(":")
    with suppress(ValueError):
        return kind.strip() == own_kind and float(number) == float(own_number)
    return wanted == label
