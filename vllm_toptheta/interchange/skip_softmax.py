"""The scalar curve of skip-softmax that comes closest to per-head thresholds.

Skip-softmax has one curve for a whole model and phase,

    scale = a * exp(b * target_sparsity),    lambda = scale / n,

and skips the values of a tile of 128 keys where the largest score of the tile lies more than -ln(lambda) below the
largest score so far, for every query head of the kv head's group. So it is relative to the largest score m of each
row, which a store does not know: it is measured on texts. For each target k, ln(scale) is the mean over layers, heads
and rows of theta - m + ln(n), and target_sparsity the share of tiles that this scale skips; a and b are the line
through these points.

Sources: arXiv 2512.12087, https://github.com/NVIDIA/Model-Optimizer (modelopt/torch/sparsity/attention_sparsity).
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_toptheta.calibration.model import hidden_states, routed
from vllm_toptheta.calibration.route import DenseRoute, block_bytes_on, row_blocks
from vllm_toptheta.errors import InterchangeError
from vllm_toptheta.reference import causal_scores, score_threshold
from vllm_toptheta.store import ThresholdStore

__all__ = ["TILE", "ScalarCurve", "fit_scalar_curve", "skipped_tiles"]

TILE = 128  # keys; the tile of ModelOpt's kernels


@dataclass(frozen=True)
class ScalarCurve:
    """A fitted curve, and how well it stands for the thresholds.

    Attributes:
        a: scale at a target sparsity of 0.
        b: growth of ln(scale) with the target sparsity.
        log_scales: `[num_targets]` ln(scale) of each target k.
        sparsities: `[num_targets]` share of tiles that this scale skips.
        head_spread: standard deviation of ln(scale) between heads, nats, mean over targets.
        row_spread: the same between the rows of a head.
    """

    a: float
    b: float
    log_scales: tuple[float, ...]
    sparsities: tuple[float, ...]
    head_spread: float
    row_spread: float


def fit_scalar_curve(
    model: Any, sequences: Sequence[Tensor], thresholds: ThresholdStore, *, target_ks: Sequence[int]
) -> ScalarCurve:
    """Measures and fits the curve; the model reads the sequences twice, densely.

    Args:
        model: a transformers causal language model.
        sequences: tensors `[seq_len]` int64, of one length.
        thresholds: a store calibrated for the model.
        target_ks: two k or more, each less than the length.

    Raises:
        InterchangeError: every layer is dense, or the curve does not grow with the sparsity.
        CalibrationError: the model is not supported.
        TargetOutOfRange: a k was not calibrated.
    """
    length = len(sequences[0])
    dense_layers = thresholds.manifest.dense_layers
    is_post_softmax = thresholds.manifest.placement == "post_softmax"
    curves = [torch.from_numpy(thresholds.curve(k).threshold(np.arange(length + 1))) for k in target_ks]
    shape = (len(target_ks), curves[0].shape[1], curves[0].shape[2])
    rows = np.zeros((*shape[:2], 1))
    total, squares = np.zeros(shape), np.zeros(shape)

    def add_log_scales(layer_idx: int, scores: Tensor, start: int) -> None:
        lengths = torch.arange(start + 1, start + 1 + len(scores), device=scores.device)
        for index, k in enumerate(target_ks):
            theta = curves[index][start + 1 : start + 1 + len(scores), layer_idx].to(scores.device)
            if is_post_softmax:
                theta = score_threshold(scores, theta)
            log_scale = (theta - scores.amax(dim=-1) + lengths.log()[:, None])[lengths > k].double()
            rows[index, layer_idx] += len(log_scale)
            total[index, layer_idx] += log_scale.sum(dim=0).cpu().numpy()
            squares[index, layer_idx] += log_scale.square().sum(dim=0).cpu().numpy()

    _run(model, sequences, dense_layers, add_log_scales)
    observed = rows[0, :, 0] > 0
    if not observed.any():
        raise InterchangeError("every layer is dense, so there is no threshold to express", file=thresholds.folder)
    means = total[:, observed] / rows[:, observed]
    log_scales = means.mean(axis=(1, 2))
    row_variance = squares[:, observed] / rows[:, observed] - means**2

    counts = np.zeros((len(target_ks), 2))
    num_kv_heads = thresholds.manifest.architecture.num_kv_heads

    def add_skips(layer_idx: int, scores: Tensor, start: int) -> None:
        for index, (k, log_scale) in enumerate(zip(target_ks, log_scales, strict=True)):
            counts[index] += skipped_tiles(
                scores, start=start, target_k=k, log_scale=log_scale, num_kv_heads=num_kv_heads
            )

    _run(model, sequences, dense_layers, add_skips)
    sparsities = counts[:, 0] / counts[:, 1]
    a, b = _fit(sparsities, log_scales, thresholds)
    return ScalarCurve(
        a=a,
        b=b,
        log_scales=tuple(log_scales.tolist()),
        sparsities=tuple(sparsities.tolist()),
        head_spread=float(means.std(axis=(1, 2)).mean()),
        row_spread=float(np.sqrt(np.maximum(row_variance, 0).mean())),
    )


def skipped_tiles(scores: Tensor, *, start: int, target_k: int, log_scale: float, num_kv_heads: int) -> tuple[int, int]:
    """Counts the tiles of values that skip-softmax leaves out, of rows that see more than k keys.

    Args:
        scores: `[num_rows, num_heads, seq_len]`, scaled logits, minus infinity at the keys that a row does not see.
        start: keys that come before the first row.
        target_k: k; shorter rows are left out.
        log_scale: ln(scale).
        num_kv_heads: heads that share a kv head skip together.

    Returns:
        Tiles skipped, and tiles, both summed over rows and kv heads.
    """
    lengths = torch.arange(start + 1, start + 1 + len(scores), device=scores.device)
    scores, lengths = scores[lengths > target_k], lengths[lengths > target_k]
    padding = -scores.shape[-1] % TILE
    largest = torch.nn.functional.pad(scores, (0, padding), value=-torch.inf).unflatten(-1, (-1, TILE)).amax(dim=-1)
    so_far = largest.cummax(dim=-1).values
    is_skipped = largest < so_far + (log_scale - lengths.log())[:, None, None]
    is_skipped = is_skipped.unflatten(1, (num_kv_heads, -1)).all(dim=2)
    num_tiles = -(-lengths // TILE)
    is_tile = torch.arange(largest.shape[-1], device=scores.device) < num_tiles[:, None]
    return int((is_skipped & is_tile[:, None]).sum()), int(num_tiles.sum()) * num_kv_heads


class _ScoreRoute(DenseRoute):
    """Dense attention that shows the scores of sparse layers, some rows at a time."""

    def __init__(self, dense_layers: Collection[int], observe: Callable[[int, Tensor, int], None]) -> None:
        self.dense_layers = frozenset(dense_layers)
        self.observe = observe

    def attend(
        self,
        layer_idx: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        softmax_scale: float,
        soft_cap: float | None,
    ) -> Tensor:
        """See `AttentionRoute.attend`."""
        if layer_idx not in self.dense_layers:
            for start, stop in row_blocks(query.shape[1], query.shape[0], block_bytes_on(query.device)):
                scores = causal_scores(
                    query[start:stop], key[:stop], softmax_scale=softmax_scale, logits_soft_cap=soft_cap
                )
                self.observe(layer_idx, scores, start)
        return super().attend(layer_idx, query, key, value, softmax_scale=softmax_scale, soft_cap=soft_cap)


def _run(
    model: Any,
    sequences: Sequence[Tensor],
    dense_layers: Collection[int],
    observe: Callable[[int, Tensor, int], None],
) -> None:
    with routed(model, _ScoreRoute(dense_layers, observe)):
        for sequence in sequences:
            hidden_states(model, sequence)


def _fit(
    sparsities: NDArray[np.float64], log_scales: NDArray[np.float64], thresholds: ThresholdStore
) -> tuple[float, float]:
    """Returns a and b of the least-squares line ln(scale) = ln(a) + b * sparsity."""
    centred = sparsities - sparsities.mean()
    variance = float(centred @ centred)
    b = float(centred @ log_scales) / variance if variance > 0 else 0.0
    if b <= 0:
        raise InterchangeError(
            "the share of skipped tiles does not grow with the thresholds, so no curve goes through them",
            file=thresholds.folder,
            remedy="Measure with a larger length, or with k that lie further apart",
        )
    return math.exp(log_scales.mean() - b * sparsities.mean()), b
