"""How commands find a threshold store, where they need one. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_toptheta.store import ThresholdStore

__all__ = ["ThresholdsOption", "load_store", "needs_store"]

ThresholdsOption = Annotated[
    Path | None,
    typer.Option(
        help="A store or a directory of stores. Default, where one is needed: TOPTHETA_THRESHOLDS, else the shipped "
        "ones."
    ),
]


def needs_store(targets: Sequence[str]) -> bool:
    """Whether some of the targets is calibrated, and no floor."""
    from vllm_toptheta.store import FLOOR_PREFIX

    return not all(target.startswith(FLOOR_PREFIX) for target in targets)


def load_store(model: Path, thresholds: Path | None, *, targets: Sequence[str]) -> ThresholdStore | None:
    """The store that is named, or that the targets need; None without both.

    Raises:
        StoreError: There is no store for the model, or it is damaged.
    """
    from vllm_toptheta import store

    if thresholds is None and not needs_store(targets):
        return None
    return store.load(store.resolve(str(model), thresholds=thresholds))
