"""The passes of a calibration, and what comes out of them.

    observe   k-th largest scores: the thresholds
    measure   what the thresholds keep and lose when applied as served
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
from vllm_toptheta.calibration.capture import TopKRoute
from vllm_toptheta.calibration.fit import fit_curves
from vllm_toptheta.calibration.measure import ROW_MEASURES, ServedRoute
from vllm_toptheta.calibration.model import hidden_states, routed
from vllm_toptheta.calibration.options import CalibrationOptions
from vllm_toptheta.calibration.route import AttentionRoute
from vllm_toptheta.calibration.samples import expectations
from vllm_toptheta.calibration.sampling import length_buckets, sample_lengths
from vllm_toptheta.calibration.shadow import ShadowCalibration
from vllm_toptheta.errors import CalibrationError
from vllm_toptheta.store import Architecture, ThresholdCurve

__all__ = ["DEGREE", "CalibrationJob"]

NUM_BUCKETS = 14
DEGREE = 2
# of all sequences together; bounds memory, and makes short contexts count as much as long ones
MEASURED_ROWS_PER_BUCKET = 64
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
        self._statistics = KthScoreStatistics(
            num_layers=num_layers,
            num_heads=num_heads,
            target_ks=options.target_ks,
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
        self._samples = np.zeros((len(self.targets), len(ROW_MEASURES), num_layers, num_heads, num_rows), np.float32)

    @property
    def arrays(self) -> Mapping[str, NDArray[Any]]:
        """All that passes leave behind, by name; writing into them restores an earlier state."""
        return {
            **self._statistics.state,
            "samples": self._samples,
            **(self.shadow.arrays if self.shadow else {}),
        }

    @cached_property
    def passes(self) -> list[Callable[[], None]]:
        """Every pass of the model over a sequence, in order; each needs those before it."""
        passes: list[Callable[[], None]] = []
        sequences, measured = range(len(self.sequences)), range(self.num_measured)
        passes += [partial(self._observe, index, *each) for index in sequences for each in self._observations]
        passes += [partial(self._measure, index, t) for index in measured for t in range(len(self.targets))]
        if self.shadow:
            passes += [partial(self._screen, index, t) for index in measured for t in range(len(self.targets))]
        return passes

    @cached_property
    def shared_k(self) -> int | None:
        """The k of the one pass that observes all ks under top-k attention, if there is one."""
        ks = self.options.target_ks
        return ks[(len(ks) - 1) // 2] if self.options.top_k == "shared" else None

    @property
    def _observations(self) -> list[tuple[list[int], int | None]]:
        """The observing passes over a sequence: which columns of the statistics, and the k of top-k attention."""
        ks = self.options.target_ks
        if self.options.top_k == "each":
            return [([column], k) for column, k in enumerate(ks)]
        return [(list(range(len(ks))), self.shared_k)]

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
        """The tensors of the store that are thresholds. Needs the observing passes."""
        moments = self.moments
        wanted = moments.mean + self.options.beta * moments.std
        return {
            "coefficients": fit_curves(moments.log_length, moments.row_count, wanted, degree=DEGREE),
            "bucket_edges": self.edges,
            "row_count": moments.row_count,
            "score_mean": moments.mean.astype(np.float32),
            "score_std": moments.std.astype(np.float32),
        }

    def expectations(self) -> dict[str, NDArray[Any]]:
        """Returns the tensors of the store that say what the thresholds keep and lose. Needs all passes."""
        lengths = np.concatenate(self._measured_lengths)
        return dict(vars(expectations(self._samples, lengths, self.targets, self.edges)))

    def _run(self, index: int, route: AttentionRoute) -> None:
        with routed(self.model, route):
            hidden_states(self.model, self.sequences[index])

    def _observe(self, index: int, columns: Sequence[int], sparse_k: int | None) -> None:
        lengths = self._observed_lengths(index)

        def report(layer_idx: int, kth_scores: Tensor) -> None:
            for column, scores in zip(columns, kth_scores.cpu().numpy(), strict=True):
                self._statistics.add(layer_idx, column, scores, lengths)

        route: AttentionRoute = TopKRoute(
            target_ks=[self.options.target_ks[column] for column in columns],
            lengths=lengths,
            sparse_k=sparse_k,
            dense_layers=self.options.dense_layers,
            report=report,
            placement=self.options.placement,
        )
        if self.shadow and columns[0] == 0:  # once for each sequence
            route = self.shadow.observing(route)
        self._run(index, route)

    def _observed_lengths(self, index: int) -> NDArray[np.int64]:
        num_rows = round(self.options.row_fraction * self.options.max_length)
        return sample_lengths(self.edges, self.options.max_length, num_rows, (self.options.seed, 0, index))

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
            dense_length=self.targets[target].k,
            dense_layers=self.options.dense_layers,
            placement=self.options.placement,
            report=report,
        )

    def _thresholds(self, index: int, target: int) -> tuple[NDArray[np.float32], int]:
        """The final thresholds of sampled rows, and the length up to which rows stay dense."""
        thresholds = self._final_curve(target).polynomial(self._measured_lengths[index])
        return thresholds, self.targets[target].k

    def _final_curve(self, target: int) -> ThresholdCurve:
        lengths = self.targets[target]
        return ThresholdCurve(
            lengths.k, self.tensors["coefficients"][:, :, target], lengths.min_length, lengths.max_length
        )
