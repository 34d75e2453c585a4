"""How many keys each head should keep at each length, for targets other than a constant k.

Calibration measures, at thresholds for a grid of k that doubles from one to the next, what each head would keep and
lose (`measure.GridRoute`). A target becomes a number of keys for every head and length bucket, and that number becomes
a threshold between two of the grid.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_toptheta.store import TargetSpec

__all__ = ["FIRST_GRID_K", "Grid", "grid_ks"]

FIRST_GRID_K = 2  # some heads put nearly all their mass on the first token and one more
_STEPS = 16  # between two k of the grid
_LEAST_LOST_MASS = 1e-9  # a logarithm has to be taken


def grid_ks(max_length: int) -> list[int]:
    """Returns the k of the grid: powers of two up to half the longest row.

    Args:
        max_length: keys of the longest row.
    """
    count = max(0, (max_length // 2 // FIRST_GRID_K).bit_length())
    return [FIRST_GRID_K << index for index in range(count)]


@dataclass(frozen=True)
class Grid:
    """What was measured at the thresholds of the grid.

    Attributes:
        available: `[num_ks, num_buckets]` bool, whether a bucket has rows longer than k; ascending in k.
        lost_mass: `[num_layers, num_heads, num_ks, num_buckets]` float64, mean over rows; 0 where not available.
        survivors: the same shape, mean over rows.
        sparse_layers: those that share the rows of a `rows` target.
    """

    available: NDArray[np.bool_]
    lost_mass: NDArray[np.float64]
    survivors: NDArray[np.float64]
    sparse_layers: tuple[int, ...]

    def allot(self, spec: TargetSpec, log_length: NDArray[np.float64]) -> NDArray[np.float64]:
        """Returns where on the grid each head should be.

        Args:
            spec: a target that is no constant k.
            log_length: `[num_buckets]`, mean ln n of a bucket's rows.

        Returns:
            `[num_layers, num_heads, num_buckets]` float64, positions on the grid: i stands for its i-th k, what lies
            between two is linear in ln k. No position is beyond the largest k that is available in the bucket.
        """
        last = np.maximum(self.available.sum(axis=0) - 1, 0)
        if spec.mass is not None:
            positions = self._for_mass(spec.mass, last)
        elif spec.survivors is not None:
            positions = self._for_survivors(spec.survivors, last)
        elif spec.rows is not None:
            positions = self._for_rows(spec.rows, last)
        else:
            wanted = np.log2(np.maximum(spec.keys(np.exp(log_length)), FIRST_GRID_K) / FIRST_GRID_K)
            positions = np.broadcast_to(wanted, (*self.lost_mass.shape[:2], len(last)))
        return np.clip(positions, 0.0, last)

    def _for_mass(self, mass: float, last: NDArray[np.int64]) -> NDArray[np.float64]:
        """The fewest keys with which the expected lost mass stays at 1 - mass; the most there are if none suffice."""
        return self._first(last, lambda lost, survivors: lost <= 1.0 - mass)

    def _for_survivors(self, wanted: int, last: NDArray[np.int64]) -> NDArray[np.float64]:
        """The fewest keys with which as many survive as are wanted."""
        return self._first(last, lambda lost, survivors: survivors >= wanted)

    def _first(
        self, last: NDArray[np.int64], enough: Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.bool_]]
    ) -> NDArray[np.float64]:
        """The first position of every head and bucket that is enough by its lost mass and survivors, else the last."""
        positions = np.zeros((*self.lost_mass.shape[:2], len(last)))
        for bucket, top in enumerate(last):
            fine, lost, survivors = self._fine(bucket, int(top))
            suffices = enough(lost, survivors)
            suffices[..., -1] = True
            positions[..., bucket] = fine[suffices.argmax(axis=-1)]
        return positions

    def _for_rows(self, rows: int, last: NDArray[np.int64]) -> NDArray[np.float64]:
        """The least lost mass in all for a mean of `rows` survivors, by one price of a row for all heads.

        At a price, every head takes what minimises lost mass + price * survivors; the price at which the survivors
        are as many as wanted is found by bisection. Layers that are dense get `rows` in every head.
        """
        positions = np.full((*self.lost_mass.shape[:2], len(last)), np.log2(max(rows, FIRST_GRID_K) / FIRST_GRID_K))
        layers = list(self.sparse_layers)
        for bucket, top in enumerate(last):
            fine, lost, survivors = self._fine(bucket, int(top))
            lost, survivors = lost[layers], survivors[layers]
            low, high = 1e-12, 1.0  # of the price, lost mass per row
            for _ in range(60):
                price = np.sqrt(low * high)
                choice = (lost + price * survivors).argmin(axis=-1)
                if np.take_along_axis(survivors, choice[..., None], -1).mean() > rows:
                    low = price
                else:
                    high = price
            choice = (lost + high * survivors).argmin(axis=-1)
            positions[layers, :, bucket] = fine[choice]
        return positions

    def _fine(self, bucket: int, top: int) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Positions `[num_fine]` from 0 to `top`, and lost mass and survivors there, `[..., num_fine]`."""
        fine = np.linspace(0.0, top, top * _STEPS + 1)
        # more keys never lose more, whatever the noise of a few rows says
        lost = np.minimum.accumulate(np.maximum(self.lost_mass[:, :, : top + 1, bucket], _LEAST_LOST_MASS), axis=-1)
        survivors = np.maximum.accumulate(np.maximum(self.survivors[:, :, : top + 1, bucket], 1e-3), axis=-1)
        return fine, np.exp(between(np.log(lost), fine)), np.exp(between(np.log(survivors), fine))


def between(values: NDArray[np.float64], positions: NDArray[np.float64]) -> NDArray[np.float64]:
    """Interpolates linearly along the last axis.

    Args:
        values: `[..., num_ks]`.
        positions: `[num_positions]`, or `[..., num_positions]` with the leading axes of `values`; from 0 to
            num_ks - 1.

    Returns:
        `[..., num_positions]`.
    """
    positions = np.broadcast_to(positions, (*values.shape[:-1], positions.shape[-1]))
    lower = np.minimum(np.floor(positions).astype(np.int64), max(values.shape[-1] - 2, 0))
    upper = np.minimum(lower + 1, values.shape[-1] - 1)
    below, above = (np.take_along_axis(values, index, axis=-1) for index in (lower, upper))
    return below + (positions - lower) * (above - below)
