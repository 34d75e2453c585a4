"""Puts together what the ranks of an engine measured of the same window, each of its own heads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vllm_toptheta.evaluation.measuring import WindowResult
from vllm_toptheta.evaluation.window_reads import WindowReads

__all__ = ["merge"]


def merge(ranks: Sequence[WindowResult]) -> WindowResult:
    """Returns the result of all heads.

    A kv head that several ranks hold, because there are more of them than kv heads, counts on each: each reads it from
    a cache of its own.

    Args:
        ranks: at least one, in order; losses are of the whole model on all of them.
    """
    return WindowResult(
        equal_rows=ranks[0].equal_rows,
        losses=ranks[0].losses,
        reads=tuple(_merged(of_variant) for of_variant in zip(*(rank.reads for rank in ranks), strict=True)),
    )


def _merged(ranks: Sequence[WindowReads]) -> WindowReads:
    return WindowReads(
        layers=ranks[0].layers,
        sparse_layers=ranks[0].sparse_layers,
        row_lengths=ranks[0].row_lengths,
        keys=np.concatenate([rank.keys for rank in ranks], axis=-1),
        value_rows=np.concatenate([rank.value_rows for rank in ranks], axis=-1),
        copies=np.concatenate([rank.copies for rank in ranks], axis=-1),
        survivors=np.concatenate([rank.survivors for rank in ranks], axis=-1),
        lost_mass=np.concatenate([rank.lost_mass for rank in ranks], axis=-1),
    )
