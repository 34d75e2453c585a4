"""The passes of a calibration, and what comes out of them.

    probe     which layers would lose too much, if that is asked for
    observe   k-th largest scores: the thresholds of constant ks, and of the grid
    allot     what the thresholds of the grid keep and lose, which decides all other targets
    measure   what the final thresholds keep and lose when applied as served
    screen    what shadow keys keep and lose with the margins that measuring found, if they are asked for

All that a pass leaves behind lies in `CalibrationJob.arrays`, so a calibration can stop after any pass and go on later.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_toptheta.calibration.accumulate import KthScoreStatistics, Moments
from vllm_toptheta.calibration.allot import Grid, between
from vllm_toptheta.calibration.capture import TopKRoute
from vllm_toptheta.calibration.fit import fit_curves
from vllm_toptheta.calibration.measure import ROW_MEASURES, GridRoute, ProbeRoute, ServedRoute
from vllm_toptheta.calibration.model import hidden_states, routed
from vllm_toptheta.calibration.options import CalibrationOptions
from vllm_toptheta.calibration.route import AttentionRoute
from vllm_toptheta.calibration.samples import expectations
from vllm_toptheta.calibration.sampling import bucket_of, length_buckets, sample_lengths
from vllm_toptheta.calibration.shadow import ShadowCalibration
from vllm_toptheta.errors import CalibrationError
from vllm_toptheta.store import Architecture, ThresholdCurve

__all__ = ["DEGREE", "CalibrationJob"]

NUM_BUCKETS = 14
DEGREE = 2
# of all sequences together; bounds memory, and makes short contexts count as much as long ones
MEASURED_ROWS_PER_BUCKET = 64
# a layer that loses so many times what the median layer loses is better served dense
OUTLIER = 2.0
# one sequence in so many is measured: a pass of its own for each target, for figures that vary little
MEASURED_SHARE = 4


class CalibrationJob:
    """A calibration of one model on token sequences.

    Args:
        model: a transformers causal language model.
        sequences: tensors `[max_length]` int64.
        architecture: that of the model.
        options: what to calibrate.
    """

    def __init__(
        self, model: Any, sequences: Sequence[Tensor], *, architecture: Architecture, options: CalibrationOptions
    ) -> None:
        self.model = model
        self.sequences = sequences
        self.architecture = architecture
        self.options = options
        self.targets = options.store_targets
        self.edges = length_buckets(min(target.min_length for target in self.targets), options.max_length, NUM_BUCKETS)
        self.num_measured = -(-len(sequences) // MEASURED_SHARE)
        num_layers, num_heads, num_buckets = architecture.num_layers, architecture.num_heads, len(self.edges) - 1
        num_constant, grid_ks = len(options.constant_ks), options.grid_ks
        self._constant, self._grid = slice(0, num_constant), slice(num_constant, num_constant + len(grid_ks))
        self._statistics = KthScoreStatistics(
            num_layers=num_layers,
            num_heads=num_heads,
            target_ks=[*options.constant_ks, *grid_ks],
            bucket_edges=self.edges,
        )
        rows_wanted = num_buckets * max(1, MEASURED_ROWS_PER_BUCKET // self.num_measured)
        self._measured_lengths = [
            sample_lengths(self.edges, options.max_length, rows_wanted, (options.seed, 1, index))
            for index in range(self.num_measured)
        ]
        self.shadow: ShadowCalibration | None = None
        if options.shadow is not None:
            self.shadow = ShadowCalibration(
                architecture, options.shadow, num_targets=len(self.targets), lengths=self._measured_lengths
            )
        num_rows = sum(map(len, self._measured_lengths))
        self._probed = np.zeros(num_layers)
        self._grid_sums = np.zeros((2, num_layers, num_heads, len(grid_ks), num_buckets))
        self._samples = np.zeros((len(self.targets), len(ROW_MEASURES), num_layers, num_heads, num_rows), np.float32)

    @property
    def arrays(self) -> Mapping[str, NDArray[Any]]:
        """All that passes leave behind, by name; writing into them restores an earlier state."""
        return {
            **self._statistics.state,
            "probed": self._probed,
            "grid_sums": self._grid_sums,
            "samples": self._samples,
            **(self.shadow.arrays if self.shadow else {}),
        }

    @cached_property
    def passes(self) -> list[Callable[[], None]]:
        """Every pass of the model over a sequence, in order; each needs those before it."""
        passes: list[Callable[[], None]] = []
        sequences, measured = range(len(self.sequences)), range(self.num_measured)
        if self.options.find_dense_layers:
            passes += [partial(self._probe, index) for index in measured]
        passes += [partial(self._observe, index, *each) for index in sequences for each in self._observations]
        if self.options.allotted:
            passes += [partial(self._measure_grid, index) for index in measured]
        passes += [partial(self._measure, index, t) for index in measured for t in range(len(self.targets))]
        if self.shadow:
            passes += [partial(self._screen, index, t) for index in measured for t in range(len(self.targets))]
        return passes

    @cached_property
    def shared_k(self) -> int | None:
        """The k of the one pass that observes all ks under top-k attention, if there is one."""
        ks = self.options.constant_ks
        return ks[(len(ks) - 1) // 2] if self.options.top_k == "shared" and ks else None

    @property
    def _observations(self) -> list[tuple[list[int], int | None]]:
        """The observing passes over a sequence: which columns of the statistics, and the k of top-k attention."""
        constant = list(range(len(self.options.constant_ks)))
        grid = list(range(self._grid.start, self._grid.stop))
        if self.options.top_k == "each":
            each: list[tuple[list[int], int | None]] = [([i], self.options.constant_ks[i]) for i in constant]
            return [*each, (grid, None)] if grid else each
        return [([*constant, *grid], self.shared_k)]

    @cached_property
    def dense_layers(self) -> tuple[int, ...]:
        """Layers to serve dense: those given, and those that lose too much. Needs the probes."""
        dense = set(self.options.dense_layers)
        if self.lost_mass_bound is not None:
            dense |= set(np.flatnonzero(self._probed > self.lost_mass_bound).tolist())
        return tuple(sorted(dense))

    @cached_property
    def lost_mass_bound(self) -> float | None:
        """The lost mass above which a layer becomes dense; None where layers are given. Needs the probes."""
        if not self.options.find_dense_layers:
            return None
        probed = self._probed[self._probed > 0]  # layers with a window are not
        typical = float(np.median(probed)) if len(probed) else 0.0
        return self.options.max_lost_mass or min(max(OUTLIER * typical, 1e-6), 0.999)

    @cached_property
    def moments(self) -> Moments:
        """The statistics of the observing passes.

        Raises:
            CalibrationError: no layer can be calibrated.
        """
        if not self._statistics.observed_layers:
            raise CalibrationError("no layer can be calibrated: all of them have a sliding window, or no attention")
        return self._statistics.moments()

    @cached_property
    def tensors(self) -> dict[str, NDArray[Any]]:
        """The tensors of the store that are thresholds. Needs the passes before the measuring ones."""
        constant, allotted = self.moments.columns(self._constant), self._allotted_moments
        moments = [part for part in (constant, allotted) if len(part.row_count)]
        row_count = np.concatenate([part.row_count for part in moments])
        mean = np.concatenate([part.mean for part in moments], axis=2)
        std = np.concatenate([part.std for part in moments], axis=2)
        # what the grid decides is where thresholds should be, not what they deviate from
        wanted = np.concatenate([constant.mean + self.options.beta * constant.std, allotted.mean], axis=2)
        log_length = np.concatenate([part.log_length for part in moments])
        return {
            "coefficients": fit_curves(log_length, row_count, wanted, degree=DEGREE),
            "bucket_edges": self.edges,
            "row_count": row_count,
            "score_mean": mean.astype(np.float32),
            "score_std": std.astype(np.float32),
        }

    def expectations(self) -> dict[str, NDArray[Any]]:
        """Returns the tensors of the store that say what the thresholds keep and lose. Needs all passes."""
        lengths = np.concatenate(self._measured_lengths)
        return dict(vars(expectations(self._samples, lengths, self.targets, self.edges)))

    def _run(self, index: int, route: AttentionRoute) -> None:
        with routed(self.model, route):
            hidden_states(self.model, self.sequences[index])

    def _probe(self, index: int) -> None:
        k = self.options.probe_k or 1

        def report(layer_idx: int, lost_mass: Tensor) -> None:
            self._probed[layer_idx] += float(lost_mass[:, k:].double().mean()) / self.num_measured

        self._run(index, ProbeRoute(target_k=k, report=report))

    def _observe(self, index: int, columns: Sequence[int], sparse_k: int | None) -> None:
        ks = [*self.options.constant_ks, *self.options.grid_ks]
        lengths = self._observed_lengths(index)

        def report(layer_idx: int, kth_scores: Tensor) -> None:
            for column, scores in zip(columns, kth_scores.cpu().numpy(), strict=True):
                self._statistics.add(layer_idx, column, scores, lengths)

        route: AttentionRoute = TopKRoute(
            target_ks=[ks[column] for column in columns],
            lengths=lengths,
            sparse_k=sparse_k,
            dense_layers=self.dense_layers,
            report=report,
            placement=self.options.placement,
        )
        if self.shadow and columns[0] == 0:  # once for each sequence
            route = self.shadow.observing(route)
        self._run(index, route)

    def _observed_lengths(self, index: int) -> NDArray[np.int64]:
        num_rows = round(self.options.row_fraction * self.options.max_length)
        return sample_lengths(self.edges, self.options.max_length, num_rows, (self.options.seed, 0, index))

    def _measure_grid(self, index: int) -> None:
        lengths = self._measured_lengths[index]
        thresholds = np.stack([curve.polynomial(lengths) for curve in self._grid_curves])
        ks = np.array(self.options.grid_ks)
        buckets = bucket_of(lengths, self.edges)
        membership = (buckets[:, None] == np.arange(len(self.edges) - 1)).astype(np.float64)
        # rows that see at most k keys are not rows of that k
        counts = (lengths > ks[:, None]).astype(np.float64)

        def report(layer_idx: int, measures: Tensor) -> None:
            rows = measures.transpose(1, 2).double().cpu().numpy() * counts
            self._grid_sums[:, layer_idx] += rows @ membership

        self._run(index, GridRoute(thresholds, lengths, placement=self.options.placement, report=report))

    def _measure(self, index: int, target: int) -> None:
        start = sum(map(len, self._measured_lengths[:index]))
        lengths = self._measured_lengths[index]
        place = slice(start, start + len(lengths))
        rows = torch.from_numpy(lengths - 1)

        def report(layer_idx: int, measures: Tensor) -> None:
            self._samples[target, :, layer_idx, :, place] = measures.cpu()[..., rows].numpy()

        route: AttentionRoute = self._served(target, report)
        if self.shadow:
            route = self.shadow.measuring(route, index, target, *self._thresholds(index, target))
        self._run(index, route)

    def _screen(self, index: int, target: int) -> None:
        assert self.shadow is not None  # noqa: S101 - there is no such pass without
        route = self._served(target, lambda layer_idx, measures: None)
        self._run(index, self.shadow.screening(route, index, target, *self._thresholds(index, target)))

    def _served(self, target: int, report: Callable[[int, Tensor], None]) -> ServedRoute:
        return ServedRoute(
            self._final_curve(target).polynomial(np.arange(self.options.max_length + 1)),
            dense_length=self.targets[target].dense_length,
            dense_layers=self.dense_layers,
            placement=self.options.placement,
            report=report,
        )

    def _thresholds(self, index: int, target: int) -> tuple[NDArray[np.float32], int]:
        """The final thresholds of sampled rows, and the length up to which rows stay dense."""
        thresholds = self._final_curve(target).polynomial(self._measured_lengths[index])
        return thresholds, self.targets[target].dense_length

    def _final_curve(self, target: int) -> ThresholdCurve:
        return self._curve(self.tensors["coefficients"][:, :, target], self.targets[target].min_length)

    def _curve(self, coefficients: NDArray[np.float32], min_length: int) -> ThresholdCurve:
        return ThresholdCurve(min_length - 1, coefficients, min_length, self.options.max_length)

    @cached_property
    def _grid_curves(self) -> list[ThresholdCurve]:
        grid = self.moments.columns(self._grid)
        wanted = grid.mean + self.options.beta * grid.std
        coefficients = fit_curves(grid.log_length, grid.row_count, wanted, degree=DEGREE)
        shortest = int(self.edges[0])
        return [
            self._curve(coefficients[:, :, index], max(k + 1, shortest)) for index, k in enumerate(self.options.grid_ks)
        ]

    @cached_property
    def _allotted_moments(self) -> Moments:
        """Moments of the targets that the grid decides: thresholds between those of the grid, bucket by bucket."""
        grid = self.moments.columns(self._grid)
        num_layers, num_heads, _, num_buckets = grid.mean.shape
        specs = self.options.allotted
        shape = (num_layers, num_heads, len(specs), num_buckets)
        mean, std = np.zeros(shape), np.zeros(shape)
        row_count = np.zeros((len(specs), num_buckets), np.int64)
        log_length = np.zeros((len(specs), num_buckets))
        if specs:
            per_bucket = self._grid_counts()
            sums = self._grid_sums / np.maximum(per_bucket, 1)
            observed = set(self.moments.observed_layers)
            allotment = Grid(
                available=(grid.row_count > 0) & (per_bucket > 0),
                lost_mass=sums[0],
                survivors=sums[1],
                sparse_layers=tuple(sorted(observed - set(self.dense_layers))),
            )
            centre = grid.log_length[0]
            lengths = np.exp(centre)
            # [num_layers, num_heads, num_buckets, num_ks]
            thresholds = np.stack([curve.polynomial(lengths) for curve in self._grid_curves]).transpose(2, 3, 1, 0)
            deviations = grid.std.transpose(0, 1, 3, 2)
            for index, spec in enumerate(specs):
                positions = allotment.allot(spec, centre)[..., None]
                target = self.targets[len(self.options.constant_ks) + index]
                covered = self.edges[1:] - 1 > target.dense_length
                row_count[index] = np.where(covered, grid.row_count[0], 0)
                log_length[index] = np.where(covered, centre, 0.0)
                mean[:, :, index] = between(thresholds.astype(np.float64), positions)[..., 0] * covered
                std[:, :, index] = between(deviations, positions)[..., 0] * covered
        return Moments(row_count, log_length, mean, std, self.moments.observed_layers)

    def _grid_counts(self) -> NDArray[np.int64]:
        """Measured rows `[num_grid_ks, num_buckets]` that see more than k keys."""
        lengths = np.concatenate(self._measured_lengths)
        inside = bucket_of(lengths, self.edges)[:, None] == np.arange(len(self.edges) - 1)
        longer = lengths > np.array(self.options.grid_ks)[:, None]
        return (longer[..., None] & inside).sum(axis=1)
