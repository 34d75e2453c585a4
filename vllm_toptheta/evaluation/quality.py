"""What Top-Theta attention changes in a model's predictions: the same held-out text, dense and sparse.

Every figure is paired: both sides see the same tokens, so that what differs between texts cancels.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_toptheta.calibration.data import load_sequences, read_text
from vllm_toptheta.calibration.model import hidden_states, load_model, load_tokenizer, routed
from vllm_toptheta.calibration.progress import progress_bar
from vllm_toptheta.calibration.route import DenseRoute
from vllm_toptheta.calibration.run import package_versions
from vllm_toptheta.errors import CalibrationError
from vllm_toptheta.evaluation.losses import Losses, compare_predictions
from vllm_toptheta.evaluation.report import Comparison, QualityReport
from vllm_toptheta.evaluation.route import ReadCounts, TopThetaRoute
from vllm_toptheta.reference import FULL_COMPENSATION, Compensation
from vllm_toptheta.store import ThresholdStore, read_architecture

__all__ = ["compare_perplexities", "evaluate", "evaluate_sequences"]


def evaluate(
    model_dir: Path,
    texts: Sequence[Path],
    thresholds: ThresholdStore,
    *,
    target_ks: Sequence[int],
    length: int = 2048,
    num_sequences: int = 8,
    seed: int = 0,
    compensation: Compensation = FULL_COMPENSATION,
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
) -> QualityReport:
    """Compares Top-Theta attention with dense attention on texts.

    Every row of a sequence is thresholded as a decode step would be: row n uses theta(n), rows of at most k keys and
    the dense layers of the store are dense.

    Args:
        model_dir: a Hugging Face model directory, with its tokenizer.
        texts: UTF-8 text files that the thresholds were not calibrated on.
        thresholds: a store calibrated for the model.
        target_ks: the k to compare, within the range of those calibrated.
        length: tokens of a sequence, more than the largest k.
        num_sequences: sequences to compare on.
        seed: chooses the sequences out of the texts.
        compensation: what makes up for the discarded keys.
        dtype: of the weights and activations; attention is float32 whatever it is.
        progress: show a progress bar on stderr.

    Returns:
        The report, the worst k first.

    Raises:
        CalibrationError: the options contradict each other, a text cannot be used, or the model is not supported.
        FingerprintMismatch: the thresholds are those of another architecture.
        TargetOutOfRange: a k was not calibrated.
    """
    if not target_ks or max(target_ks) >= length:
        raise CalibrationError(f"k {list(target_ks)} need rows of more tokens than length {length}", field="target_ks")
    manifest = thresholds.manifest
    manifest.architecture.check(read_architecture(model_dir), file=thresholds.folder)
    read = [read_text(file) for file in texts]
    sequences = load_sequences(
        read, load_tokenizer(model_dir), num_sequences=num_sequences, max_length=length, seed=seed
    )
    model = load_model(model_dir, dtype=dtype)
    with progress_bar("passes", enabled=progress) as bar:
        task = bar.add_task("evaluating", total=len(sequences) * (1 + len(target_ks)))
        comparisons = evaluate_sequences(
            model,
            sequences,
            thresholds,
            target_ks=target_ks,
            compensation=compensation,
            on_pass=lambda: bar.advance(task),
        )
    calibrated_on = {source.sha256 for source in manifest.calibration.text}
    return QualityReport(
        model=model_dir.absolute().name,
        thresholds=manifest.model.id,
        text=tuple(text.source for text in read),
        not_held_out=tuple(text.source.name for text in read if text.source.sha256 in calibrated_on),
        num_sequences=num_sequences,
        length=length,
        seed=seed,
        dtype=str(dtype).removeprefix("torch."),
        placement=manifest.placement,
        denominator=compensation.denominator,
        value_mean=compensation.value_mean,
        dense_layers=manifest.dense_layers,
        versions=package_versions(),
        comparisons=tuple(sorted(comparisons, key=lambda comparison: comparison.change_percent, reverse=True)),
    )


def evaluate_sequences(
    model: Any,
    sequences: Sequence[Tensor],
    thresholds: ThresholdStore,
    *,
    target_ks: Sequence[int],
    compensation: Compensation = FULL_COMPENSATION,
    on_pass: Callable[[], object] = lambda: None,
) -> list[Comparison]:
    """Compares Top-Theta attention with dense attention on token sequences.

    Args:
        model: a transformers causal language model.
        sequences: tensors `[seq_len]` int64, of one length.
        thresholds: a store calibrated for the model.
        target_ks: the k to compare.
        compensation: what makes up for the discarded keys.
        on_pass: called after each pass of the model over a sequence.

    Returns:
        One comparison for each k, in their order.

    Raises:
        CalibrationError: the model is not supported.
        TargetOutOfRange: a k was not calibrated.
    """
    length = len(sequences[0])
    counts = [ReadCounts(length) for _ in target_ks]
    routes = [
        TopThetaRoute(
            thresholds.curve(k).threshold(np.arange(length + 1)),
            target_k=k,
            dense_layers=thresholds.manifest.dense_layers,
            placement=thresholds.manifest.placement,
            compensation=compensation,
            counts=count,
        )
        for k, count in zip(target_ks, counts, strict=True)
    ]
    losses: list[list[Losses]] = [[] for _ in target_ks]
    for sequence in sequences:
        states = []
        for route in (DenseRoute(), *routes):
            with routed(model, route):
                states.append(hidden_states(model, sequence))
            on_pass()
        for index, loss in enumerate(compare_predictions(model, sequence, states[0], states[1:])):
            losses[index].append(loss)
    return [_comparison(k, loss, count) for k, loss, count in zip(target_ks, losses, counts, strict=True)]


def compare_perplexities(dense: Sequence[float], sparse: Sequence[float]) -> tuple[float, float | None]:
    """Returns the change of perplexity from dense to sparse, and its standard error.

    With d_i the change of the mean loss of sequence i, the perplexity changes by the factor exp(mean(d)). The standard
    error of mean(d) is std(d) / sqrt(number of sequences), and the factor's is that times the factor.

    Args:
        dense: mean loss of each sequence, nats per token.
        sparse: of the same sequences.

    Returns:
        The change and its standard error, both in percent of the dense perplexity; no error for a single sequence.
    """
    changes = np.asarray(sparse) - np.asarray(dense)
    factor = math.exp(changes.mean())
    if len(changes) < 2:
        return 100 * (factor - 1), None
    return 100 * (factor - 1), float(100 * factor * changes.std(ddof=1) / math.sqrt(len(changes)))


def _comparison(target_k: int, losses: Sequence[Losses], counts: ReadCounts) -> Comparison:
    dense, sparse = [loss.dense for loss in losses], [loss.sparse for loss in losses]
    change, error = compare_perplexities(dense, sparse)
    return Comparison(
        target_k=target_k,
        perplexity_dense=math.exp(np.mean(dense)),
        perplexity_sparse=math.exp(np.mean(sparse)),
        change_percent=change,
        change_standard_error=error,
        kl_divergence=float(np.mean([loss.kl_divergence for loss in losses])),
        top1_agreement=float(np.mean([loss.top1_agreement for loss in losses])),
        value_rows_share=counts.value_rows_share,
        mean_lost_mass=counts.mean_lost_mass,
        mean_survivors=counts.mean_survivors,
        p95_survivors=counts.p95_survivors,
        nll_changes=tuple(loss.sparse - loss.dense for loss in losses),
    )
