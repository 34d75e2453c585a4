"""What imported thresholds keep and lose, measured on texts; the missing masses are those of an sdc.txt, if given."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_toptheta import store
from vllm_toptheta.calibration.measure import ROW_MEASURES, ServedRoute
from vllm_toptheta.calibration.model import hidden_states, routed
from vllm_toptheta.calibration.samples import expectations
from vllm_toptheta.calibration.sampling import bucket_of, sample_lengths
from vllm_toptheta.errors import InterchangeError
from vllm_toptheta.interchange.grid import ThresholdGrid
from vllm_toptheta.interchange.lines import CalibratedLines
from vllm_toptheta.store import ThresholdCurve
from vllm_toptheta.store.fields import MAX_HEADS, MAX_TOKENS

__all__ = ["check_missing_masses", "measure", "with_missing_masses"]

ROWS_PER_BUCKET = 128  # of all sequences together


def measure(
    model: Any,
    sequences: Sequence[Tensor],
    grid: ThresholdGrid,
    draft: store.ManifestDraft,
    tensors: Mapping[str, NDArray[Any]],
    *,
    seed: int,
) -> dict[str, NDArray[Any]]:
    """Applies the thresholds as a server does and returns the tensors of `store.Expectations`.

    Args:
        model: a transformers causal language model.
        sequences: tensors `[seq_len]` int64, of one length.
        grid: the thresholds that were imported; nothing is measured in layers without any.
        draft: the manifest.
        tensors: those of the store, with `coefficients` and `bucket_edges`.
        seed: chooses the rows that count.

    Raises:
        InterchangeError: the sequences are too short for a target.
        CalibrationError: the model is not supported.
    """
    length, edges = len(sequences[0]), tensors["bucket_edges"]
    needed = max(target.min_length for target in draft.targets)
    if length < needed:
        raise InterchangeError(
            f"sequences of {length} tokens have no row of {needed}, the shortest with a threshold",
            field="length",
            remedy="Raise it",
        )
    rows_wanted = (len(edges) - 1) * max(1, ROWS_PER_BUCKET // len(sequences))
    lengths = [sample_lengths(edges, length, rows_wanted, (seed, index)) for index in range(len(sequences))]
    shape = (len(draft.targets), len(ROW_MEASURES), *tensors["coefficients"].shape[:2], sum(map(len, lengths)))
    samples = np.zeros(shape, np.float32)
    for index, target in enumerate(draft.targets):
        curve = ThresholdCurve(
            target.dense_length, tensors["coefficients"][:, :, index], target.min_length, target.max_length
        )
        start = 0
        for sequence, drawn in zip(sequences, lengths, strict=True):
            place, rows = slice(start, start + len(drawn)), torch.from_numpy(drawn - 1)
            start += len(drawn)

            def report(
                layer_idx: int, measures: Tensor, index: int = index, place: slice = place, rows: Tensor = rows
            ) -> None:
                if grid.is_sparse[layer_idx]:
                    samples[index, :, layer_idx, :, place] = measures.cpu()[..., rows].numpy()

            route = ServedRoute(
                curve.polynomial(np.arange(length + 1)),
                dense_length=target.dense_length,
                dense_layers=draft.dense_layers,
                placement=draft.placement,
                report=report,
            )
            with routed(model, route):
                hidden_states(model, sequence)
    return dict(vars(expectations(samples, np.concatenate(lengths), draft.targets, edges)))


def check_missing_masses(sums: CalibratedLines, thresholds: CalibratedLines) -> None:
    """Refuses an sdc.txt that does not belong to a th.txt.

    Args:
        sums: of the sdc.txt.
        thresholds: of the th.txt.

    Raises:
        InterchangeError: th.txt has several ks, a row has no threshold, or a mass is negative.
    """

    def fail_at(wrong: NDArray[np.bool_], message: str) -> None:
        if wrong.any():
            raise InterchangeError(
                message,
                file=sums.file,
                field=f"line {sums.line[int(np.argmax(wrong))]}",
                remedy="Give the two files of one calibration",
            )

    fail_at(~np.isin(_place(sums), _place(thresholds)), f"{thresholds.file.name} has no threshold for this row")
    fail_at(sums.value < 0, "a missing mass cannot be negative")


def with_missing_masses(
    measured: Mapping[str, NDArray[Any]], sums: CalibratedLines, edges: NDArray[np.int32]
) -> dict[str, NDArray[Any]]:
    """Returns the tensors with the masses of an sdc.txt in place of those measured, where the file has any.

    Args:
        measured: what `measure` returned, for a single target.
        sums: of the sdc.txt.
        edges: `[num_buckets + 1]`, the length buckets.
    """
    offline_sum = measured["offline_sum"].copy()
    inside = (sums.length >= edges[0]) & (sums.length < edges[-1])
    place = (sums.layer[inside], sums.head[inside], bucket_of(sums.length[inside], edges))
    total, count = (np.zeros((*offline_sum.shape[:2], len(edges) - 1)) for _ in range(2))
    np.add.at(total, place, sums.value[inside] * sums.samples[inside])
    np.add.at(count, place, sums.samples[inside])
    known = (count > 0) & (measured["measured_rows"][0] > 0)
    offline_sum[:, :, 0][known] = (total[known] / count[known]).astype(np.float32)
    return {**measured, "offline_sum": offline_sum}


def _place(lines: CalibratedLines) -> NDArray[np.int64]:
    """One number for layer, head and length."""
    return (lines.layer * MAX_HEADS + lines.head) * (MAX_TOKENS + 1) + lines.length
