"""Why something is not served, and the error that says so."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from vllm_toptheta.errors import UnsupportedError

WITHOUT_US = "Start `vllm serve` without --attention-backend toptheta"
_REMEDY = f"Change that, or s{WITHOUT_US[1:]}"


class Reason(NamedTuple):
    """One thing that is not supported.

    Attributes:
        field: The field of config.json, the flag or the option concerned, with its value where that says more.
        text: Why, as a clause.
        remedy: What to do about it, as a sentence; None for what can always be done.
    """

    field: str
    text: str
    remedy: str | None = None

    def __str__(self) -> str:
        return f"{self.field}: {self.text}"


def refuse(reasons: list[Reason], *, file: Path | None = None) -> None:
    """Raise all reasons as one error; do nothing if there are none.

    Args:
        reasons: Why something is not served.
        file: The file whose fields they name, if any.

    Raises:
        UnsupportedError: Names every field or flag; the remedy is the first one's.
    """
    if reasons:
        raise UnsupportedError("; ".join(map(str, reasons)), file=file, remedy=reasons[0].remedy or _REMEDY)
