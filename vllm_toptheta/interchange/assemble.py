"""The manifest and the tensors of a store that is imported: our curves through somebody else's thresholds."""

import datetime
from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_toptheta import store
from vllm_toptheta.calibration.fit import fit_curves
from vllm_toptheta.calibration.run import DEGREE, NUM_BUCKETS, package_versions
from vllm_toptheta.calibration.sampling import bucket_of, length_buckets
from vllm_toptheta.errors import InterchangeError
from vllm_toptheta.interchange.grid import ThresholdGrid
from vllm_toptheta.reference import Placement

__all__ = ["assemble", "fit_error"]


def assemble(
    grid: ThresholdGrid,
    *,
    identity: store.ModelIdentity,
    architecture: store.Architecture,
    placement: Placement,
    dense_layers: Collection[int],
    sources: tuple[store.TextSource, ...],
    command: str,
) -> tuple[store.ManifestDraft, dict[str, NDArray[Any]]]:
    """Returns the manifest and the tensors of a store without a measurement.

    Args:
        grid: the thresholds.
        identity: the model's.
        architecture: the model's.
        placement: what the thresholds apply to.
        dense_layers: layers to serve dense, besides those without thresholds.
        sources: the files that the thresholds came from.
        command: command line to record.

    Raises:
        InterchangeError: the ks have no length in common.
    """
    targets = []
    for k, counts in zip(grid.target_ks, grid.row_count, strict=True):
        filled = grid.lengths[counts > 0]
        targets.append(store.Target(k=k, min_length=int(filled[0]), max_length=int(filled[-1])))
    if max(target.min_length for target in targets) > min(target.max_length for target in targets):
        raise InterchangeError(
            f"the rows of k {', '.join(map(str, grid.target_ks))} share no length, so nothing lies between them",
            field="k",
            remedy="Import each k from a file of its own",
        )
    edges = length_buckets(int(grid.lengths[0]), int(grid.lengths[-1]), NUM_BUCKETS)
    membership = bucket_of(grid.lengths, edges)[:, None] == np.arange(len(edges) - 1)
    row_count = grid.row_count @ membership
    score_mean = (grid.thresholds * grid.row_count) @ membership / np.maximum(row_count, 1)
    log_length = np.broadcast_to(np.log(grid.lengths), grid.row_count.shape)
    draft = store.ManifestDraft(
        model=identity,
        architecture=architecture,
        targets=tuple(targets),
        dense_layers=tuple(sorted({*grid.dense_layers, *dense_layers})),
        placement=placement,
        outside_lengths="clamp",
        degree=DEGREE,
        num_buckets=len(edges) - 1,
        calibration=store.Provenance(
            text=sources,
            max_length=int(grid.lengths[-1]),
            versions=package_versions(),
            command=command,
            date=datetime.datetime.now(datetime.UTC).date(),
        ),
    )
    return draft, {
        "coefficients": fit_curves(log_length, grid.row_count, grid.thresholds, degree=DEGREE),
        "bucket_edges": edges,
        "row_count": row_count,
        "score_mean": score_mean.astype(np.float32),
        "score_std": np.zeros_like(score_mean, np.float32),
    }


def fit_error(grid: ThresholdGrid, coefficients: NDArray[np.float32]) -> tuple[float, float]:
    """Returns how far the curves are from the thresholds: root mean square over rows, of all heads and of the worst.

    Args:
        grid: the thresholds.
        coefficients: `[num_layers, num_heads, num_targets, degree + 1]`.
    """
    powers = np.log(grid.lengths)[:, None] ** np.arange(coefficients.shape[-1])
    errors = coefficients.astype(np.float64) @ powers.T - grid.thresholds
    squares = (errors**2 * grid.row_count).sum(axis=(2, 3))[grid.is_sparse] / grid.row_count.sum()
    return float(np.sqrt(squares.mean())), float(np.sqrt(squares.max()))
