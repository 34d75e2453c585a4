"""Lines of a th.txt to thresholds by layer, head, k and length: which ks, which layers, and is anything missing."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_toptheta.errors import InterchangeError
from vllm_toptheta.interchange.lines import CalibratedLines
from vllm_toptheta.reference import Placement
from vllm_toptheta.store import Architecture

__all__ = ["ThresholdGrid", "build_grid"]

# half precision rounds small probabilities to 0, which has no logarithm
LEAST_PROBABILITY = 1e-12


@dataclass(frozen=True)
class ThresholdGrid:
    """Thresholds of the sparse layers, every head at the same lengths.

    Attributes:
        target_ks: ascending.
        lengths: `[num_lengths]` int64, tokens, those of any target.
        row_count: `[num_targets, num_lengths]` int64, the least rows behind a threshold of any head; 0 where the
            target has none.
        thresholds: `[num_layers, num_heads, num_targets, num_lengths]` float64, in the unit of the store: scaled
            logits, or after the softmax the logarithm of a probability; 0 without rows and in dense layers.
        dense_layers: layers without thresholds for every target.
    """

    target_ks: tuple[int, ...]
    lengths: NDArray[np.int64]
    row_count: NDArray[np.int64]
    thresholds: NDArray[np.float64]
    dense_layers: tuple[int, ...]

    @property
    def is_sparse(self) -> NDArray[np.bool_]:
        """`[num_layers]`, whether a layer has thresholds."""
        return ~np.isin(np.arange(len(self.thresholds)), self.dense_layers)


def build_grid(lines: CalibratedLines, architecture: Architecture, placement: Placement) -> ThresholdGrid:
    """Orders the lines of a th.txt.

    Args:
        lines: of one file.
        architecture: that of the model.
        placement: what the thresholds apply to.

    Raises:
        InterchangeError: a threshold cannot be one of that placement, a head lacks a threshold that others have, or no
            threshold of a k has a sample behind it.
    """
    values = _in_store_unit(lines, placement)
    ks_by_layer = {layer: tuple(np.unique(lines.k[lines.layer == layer])) for layer in np.unique(lines.layer)}
    # on a tie the smaller k: the paper's larger one is for the layers that tolerate less
    target_ks, _ = min(Counter(ks_by_layer.values()).items(), key=lambda item: (-item[1], item[0]))
    sparse = [layer for layer, ks in ks_by_layer.items() if ks == target_ks]
    used = np.isin(lines.layer, sparse)
    lengths = np.unique(lines.length[used])
    num_layers, num_heads = architecture.num_layers, architecture.num_heads
    shape = (num_layers, num_heads, len(target_ks), len(lengths))
    place = (
        lines.layer[used],
        lines.head[used],
        np.searchsorted(target_ks, lines.k[used]),
        np.searchsorted(lengths, lines.length[used]),
    )
    thresholds, is_given = np.zeros(shape), np.zeros(shape, bool)
    samples = np.full(shape, np.iinfo(np.int64).max)
    thresholds[place], is_given[place], samples[place] = values[used], True, lines.samples[used]

    is_needed = np.zeros(shape, bool)
    is_needed[sparse] = is_given.any(axis=(0, 1))
    missing = np.argwhere(is_needed & ~is_given)
    if len(missing):
        layer, head, target, length = missing[0]
        raise InterchangeError(
            f"no threshold for layer {layer}, head {head}, k {target_ks[target]} at length {lengths[length]}, which "
            f"other heads have (and {len(missing) - 1} more)",
            file=lines.file,
            remedy="The file is incomplete or of another model: give it whole, and that model's directory",
        )
    row_count = np.where(is_given.any(axis=(0, 1)), samples.min(axis=(0, 1)), 0)
    for k, counts in zip(target_ks, row_count, strict=True):
        if not counts.any():
            raise InterchangeError(
                f"no threshold for k {k} has a sample behind it",
                file=lines.file,
                remedy="Give the th.txt that was calibrated, not one that was interpolated from it",
            )
    return ThresholdGrid(
        target_ks=tuple(int(k) for k in target_ks),
        lengths=lengths,
        row_count=row_count,
        thresholds=np.where(row_count > 0, thresholds, 0.0),
        dense_layers=tuple(sorted(set(range(num_layers)) - {int(layer) for layer in sparse})),
    )


def _in_store_unit(lines: CalibratedLines, placement: Placement) -> NDArray[np.float64]:
    if placement == "pre_softmax":
        return lines.value
    wrong = (lines.value < 0) | (lines.value > 1)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise InterchangeError(
            f"{lines.value[at]:g} is no probability, so these are not thresholds after the softmax",
            file=lines.file,
            field=f"line {lines.line[at]}",
            remedy="Import them with placement pre_softmax",
        )
    logarithms: NDArray[np.float64] = np.log(np.maximum(lines.value, LEAST_PROBABILITY))
    return logarithms
