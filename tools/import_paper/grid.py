"""Lines of a th.txt to thresholds by layer, head, k and length: which ks, which layers, and is anything missing."""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tools.import_paper.lines import PaperFileError, fail, read_lines
from vllm_toptheta.reference import Placement
from vllm_toptheta.store import Architecture

__all__ = ["ThresholdGrid", "read_grid"]

# half precision rounds small probabilities to 0, which has no logarithm
LEAST_PROBABILITY = 1e-12


class ThresholdGrid(NamedTuple):
    """Thresholds of the sparse layers, every head at the same lengths.

    Attributes:
        target_ks: ascending.
        lengths: `[num_lengths]` int64, tokens, those of any target.
        row_count: `[num_targets, num_lengths]` int64, the least rows behind a threshold of any head.
        thresholds: `[num_layers, num_heads, num_targets, num_lengths]` float64, in the unit of the store: scaled
            logits, or after the softmax the logarithm of a probability; 0 without rows and in dense layers.
        dense_layers: layers that were calibrated for other ks than most (the paper's code can give the first layers a
            larger one), or not at all.
    """

    target_ks: tuple[int, ...]
    lengths: NDArray[np.int64]
    row_count: NDArray[np.int64]
    thresholds: NDArray[np.float64]
    dense_layers: tuple[int, ...]


def read_grid(file: Path, architecture: Architecture, placement: Placement) -> ThresholdGrid:
    """Reads a th.txt.

    Args:
        file: the th.txt.
        architecture: that of the model.
        placement: what the thresholds apply to; the file does not say it.

    Raises:
        PaperFileError: a line is wrong, a threshold cannot be one of that placement, a head lacks a threshold that
            others have, or nothing is left.
    """
    lines = read_lines(file, architecture)
    lines = lines[lines["samples"] > 0]
    if not len(lines):
        raise PaperFileError(
            "every threshold was interpolated", file=file, remedy="Give the th.txt that was calibrated"
        )
    if placement == "post_softmax":
        for line in lines[(lines["threshold"] < 0) | (lines["threshold"] > 1)][:1]:
            fail(file, line["line"], f"{line['threshold']:g} is no probability, as thresholds after the softmax are")
        lines["threshold"] = np.log(np.maximum(lines["threshold"], LEAST_PROBABILITY))
    ks = {int(layer): tuple(np.unique(lines["k"][lines["layer"] == layer])) for layer in np.unique(lines["layer"])}
    # on a tie the smaller k: the paper's larger one is for the layers that tolerate less
    target_ks, _ = min(Counter(ks.values()).items(), key=lambda item: (-item[1], item[0]))
    sparse = [layer for layer in ks if ks[layer] == target_ks]
    lines = lines[np.isin(lines["layer"], sparse)]
    lengths, length_index = np.unique(lines["length"], return_inverse=True)
    place = lines["layer"], lines["head"], np.searchsorted(target_ks, lines["k"]), length_index
    shape = (architecture.num_layers, architecture.num_heads, len(target_ks), len(lengths))
    thresholds, samples = np.zeros(shape), np.zeros(shape, np.int64)
    thresholds[place], samples[place] = lines["threshold"], lines["samples"]
    missing = np.argwhere((samples[sparse] == 0) & samples.any(axis=(0, 1)))
    if len(missing):
        layer, head, target, length = missing[0]
        raise PaperFileError(
            f"no threshold for layer {sparse[layer]}, head {head}, k {target_ks[target]} at length {lengths[length]}, "
            f"which other heads have (and {len(missing) - 1} more)",
            file=file,
            remedy="The file is incomplete or of another model: give it whole, and that model's directory",
        )
    return ThresholdGrid(
        target_ks=tuple(int(k) for k in target_ks),
        lengths=lengths,
        row_count=samples[sparse].min(axis=(0, 1)),
        thresholds=thresholds,
        dense_layers=tuple(layer for layer in range(architecture.num_layers) if layer not in sparse),
    )
