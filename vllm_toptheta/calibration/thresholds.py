"""Calibrates thresholds of constant ks.

    observe   k-th largest scores: the thresholds
    measure   what compensations need to know of the scores that the thresholds discard when applied as served

All that a pass leaves behind lies in `ThresholdCalibration.arrays`, so a calibration can stop after any pass and go on.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_toptheta.calibration.accumulate import KthScoreStatistics, Moments
from vllm_toptheta.calibration.capture import TopKOverride
from vllm_toptheta.calibration.fit import fit_curves
from vllm_toptheta.calibration.measure import ROW_MEASURES, ServedOverride
from vllm_toptheta.calibration.model import hidden_states, overriding_attention
from vllm_toptheta.calibration.options import CalibrationOptions
from vllm_toptheta.calibration.override import AttentionOverride
from vllm_toptheta.calibration.samples import expectations
from vllm_toptheta.calibration.sampling import measured_lengths, sample_lengths
from vllm_toptheta.errors import CalibrationError
from vllm_toptheta.store import Architecture, Measurement, ThresholdCurve, ThresholdSection

__all__ = ["DEGREE", "ThresholdCalibration"]

DEGREE = 2


class ThresholdCalibration:
    """A calibration of thresholds of one model on token sequences.

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
        self.edges, self._measured_lengths = measured_lengths(
            self.targets[0].min_length, options.max_length, num_sequences=len(sequences), seed=options.seed
        )
        num_layers, num_heads = architecture.num_layers, architecture.num_heads
        self._statistics = KthScoreStatistics(
            num_layers=num_layers,
            num_heads=num_heads,
            target_ks=options.target_ks,
            bucket_edges=self.edges,
        )
        num_rows = sum(map(len, self._measured_lengths))
        self._samples = np.zeros((len(self.targets), len(ROW_MEASURES), num_layers, num_heads, num_rows), np.float32)

    @property
    def arrays(self) -> Mapping[str, NDArray[Any]]:
        """All that passes leave behind, by name; writing into them restores an earlier state."""
        return {**self._statistics.state, "samples": self._samples}

    @property
    def passes(self) -> list[Callable[[], None]]:
        """Every pass of the model over a sequence, in order; each needs those before it."""
        sequences, targets = range(len(self.sequences)), range(len(self.targets))
        return [
            *(partial(self._observe, index, *each) for index in sequences for each in self._observations),
            *(partial(self._measure, index, target) for index in range(self.num_measured) for target in targets),
        ]

    @property
    def num_measured(self) -> int:
        """Sequences that thresholds are applied to once they are known."""
        return len(self._measured_lengths)

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
    def coefficients(self) -> NDArray[np.float32]:
        """Coefficients of theta(n), `[num_layers, num_heads, num_targets, DEGREE + 1]`. Needs the observing passes."""
        moments = self.moments
        wanted = moments.mean + self.options.beta * moments.std
        return fit_curves(moments.log_length, moments.row_count, wanted, degree=DEGREE)

    def curve(self, target: int) -> ThresholdCurve:
        """Returns theta(n) of one of the targets. Needs the observing passes."""
        lengths = self.targets[target]
        return ThresholdCurve(lengths.k, self.coefficients[:, :, target], lengths.min_length, lengths.max_length)

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Returns the tensors of the store that are thresholds, and those of `Expectations`. Needs all passes."""
        lengths = np.concatenate(self._measured_lengths)
        return {
            "coefficients": self.coefficients,
            "bucket_edges": self.edges,
            "row_count": self.moments.row_count,
            "score_mean": self.moments.mean.astype(np.float32),
            "score_std": self.moments.std.astype(np.float32),
            **vars(expectations(self._samples, lengths, self.targets, self.edges)),
        }

    def section(self) -> ThresholdSection:
        """Returns what the manifest says of thresholds. Needs the observing passes."""
        unobserved = set(range(self.architecture.num_layers)) - set(self.moments.observed_layers)
        return ThresholdSection(
            targets=tuple(self.targets),
            dense_layers=tuple(sorted(unobserved.union(self.options.dense_layers))),
            placement=self.options.placement,
            degree=DEGREE,
            num_buckets=len(self.edges) - 1,
            measurement=Measurement(num_sequences=self.num_measured),
        )

    @property
    def provenance(self) -> dict[str, Any]:
        """What `store.Provenance` says of thresholds alone."""
        return {
            "row_fraction": self.options.row_fraction,
            "top_k_at_calibration": self.options.top_k != "off",
            "shared_k": self.shared_k,
            "beta": self.options.beta,
        }

    def _run(self, index: int, override: AttentionOverride) -> None:
        with overriding_attention(self.model, override):
            hidden_states(self.model, self.sequences[index])

    def _observe(self, index: int, columns: Sequence[int], sparse_k: int | None) -> None:
        lengths = self._observed_lengths(index)

        def report(layer_idx: int, kth_scores: Tensor) -> None:
            for column, scores in zip(columns, kth_scores.cpu().numpy(), strict=True):
                self._statistics.add(layer_idx, column, scores, lengths)

        override = TopKOverride(
            target_ks=[self.options.target_ks[column] for column in columns],
            lengths=lengths,
            sparse_k=sparse_k,
            dense_layers=self.options.dense_layers,
            report=report,
            placement=self.options.placement,
        )
        self._run(index, override)

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

        curve = self.curve(target)
        override = ServedOverride(
            curve.polynomial(np.arange(self.options.max_length + 1)),
            dense_length=curve.dense_length,
            dense_layers=self.options.dense_layers,
            placement=self.options.placement,
            report=report,
        )
        self._run(index, override)
