"""What thresholds discarded in the rows that were measured, and the means that a store holds of it."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vllm_toptheta.calibration.measure import ROW_MEASURES
from vllm_toptheta.calibration.sampling import bucket_of
from vllm_toptheta.store import Expectations, Target

__all__ = ["expectations"]


def expectations(
    samples: NDArray[np.float32],
    lengths: NDArray[np.int64],
    targets: Sequence[Target],
    edges: NDArray[np.int32],
) -> Expectations:
    """Returns the means of what was measured.

    Args:
        samples: `[num_targets, len(ROW_MEASURES), num_layers, num_heads, num_rows]`, what `measure.measure_rows`
            returns for the rows, 0 in layers that were not measured.
        lengths: `[num_rows]`, the keys that the rows see.
        targets: the targets; their rows that stay dense count for nothing.
        edges: `[num_buckets + 1]`, the length buckets.
    """
    num_layers, num_heads = samples.shape[2:4]
    num_buckets = len(edges) - 1
    measured_rows = np.zeros((len(targets), num_buckets), np.int64)
    mean = np.zeros((len(ROW_MEASURES), num_layers, num_heads, len(targets), num_buckets), np.float32)
    bucket = bucket_of(lengths, edges)
    for index, target in enumerate(targets):
        for place in range(num_buckets):
            rows = (bucket == place) & (lengths >= target.min_length)
            measured_rows[index, place] = rows.sum()
            if rows.any():
                values = samples[index][..., rows].astype(np.float64)
                known = ~np.isnan(values)  # r of a row that discards nothing is not known
                mean[..., index, place] = np.where(known, values, 0).sum(axis=-1) / np.maximum(known.sum(axis=-1), 1)
    return Expectations(measured_rows, *mean)
