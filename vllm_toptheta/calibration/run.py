"""Calibrates a model: texts in, a store out."""

import datetime
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

import vllm_toptheta
from vllm_toptheta import store
from vllm_toptheta.calibration.accumulate import KthScoreStatistics, Moments, length_buckets
from vllm_toptheta.calibration.capture import TopKRoute
from vllm_toptheta.calibration.data import load_sequences, read_text
from vllm_toptheta.calibration.fit import fit_curves
from vllm_toptheta.calibration.model import hidden_states, load_model, load_tokenizer, routed
from vllm_toptheta.calibration.progress import progress_bar
from vllm_toptheta.errors import CalibrationError

__all__ = ["calibrate", "collect_moments", "default_model_id", "package_versions"]

NUM_BUCKETS = 14
DEGREE = 2


def calibrate(
    model_dir: Path,
    texts: Sequence[Path],
    *,
    out: Path,
    target_ks: Sequence[int] = (32, 64, 128, 256),
    max_length: int = 4096,
    num_sequences: int = 4,
    seed: int = 0,
    beta: float = 0.0,
    top_k_at_calibration: bool = True,
    dense_layers: Sequence[int] = (0, 1),
    dtype: torch.dtype = torch.float32,
    model_id: str | None = None,
    command: str | None = None,
    progress: bool = True,
) -> Path:
    """Calibrates thresholds for a model and writes them as a store.

    For every target k, layer, head and length bucket, the threshold is mean + beta * std of the k-th largest score of
    the calibration rows (Top-Theta Attention, arXiv 2502.08363), smoothed over lengths by `fit.fit_curves`. The same
    arguments give the same tensors to the bit, on the same machine and number of threads.

    Args:
        model_dir: a Hugging Face model directory, with its tokenizer.
        texts: UTF-8 text files to calibrate on.
        out: folder in which the store's folder `<org>--<model>` is written.
        target_ks: the k to calibrate for, in any order.
        max_length: tokens of a calibration sequence, more than the largest k.
        num_sequences: sequences to calibrate on.
        seed: chooses the sequences out of the texts.
        beta: standard deviations added to the mean; above 0 fewer keys survive, below 0 more.
        top_k_at_calibration: layers hand on exact top-k attention while calibrating, at the price of one pass for each
            k; without it, one dense pass serves all k.
        dense_layers: layers to serve dense. Layers that cannot be calibrated, such as those with a sliding window, are
            added to them.
        dtype: of the weights and activations; scores are float32 whatever it is.
        model_id: hub id (org/name) to record; None for `default_model_id`.
        command: command line to record; None for a call from Python.
        progress: show a progress bar on stderr.

    Returns:
        The folder written.

    Raises:
        CalibrationError: the options contradict each other, a text cannot be used, or the model is not supported.
        ModelConfigError: the model directory has no usable config.json.
        StoreError: the store cannot be written.
    """
    architecture = store.read_architecture(model_dir)
    target_ks = sorted(target_ks)
    _check_options(target_ks, max_length, num_sequences, dense_layers, architecture.num_layers)
    read = [read_text(file) for file in texts]
    try:
        identity = store.ModelIdentity(id=model_id or default_model_id(model_dir))
        provenance = store.Provenance(
            text=tuple(text.source for text in read),
            num_sequences=num_sequences,
            max_length=max_length,
            seed=seed,
            top_k_at_calibration=top_k_at_calibration,
            beta=beta,
            versions=package_versions(),
            command=command or "vllm_toptheta.calibration.calibrate()",
            date=datetime.datetime.now(datetime.UTC).date(),
        )
    except ValidationError as error:
        problem = error.errors()[0]
        raise CalibrationError(problem["msg"], field=".".join(map(str, problem["loc"]))) from None

    sequences = load_sequences(
        read, load_tokenizer(model_dir), num_sequences=num_sequences, max_length=max_length, seed=seed
    )
    model = load_model(model_dir, dtype=dtype)
    edges = length_buckets(target_ks[0] + 1, max_length, NUM_BUCKETS)
    steps = len(sequences) * (len(target_ks) if top_k_at_calibration else 1) * architecture.num_layers
    with progress_bar("layers", enabled=progress) as bar:
        task = bar.add_task("calibrating", total=steps)
        moments = collect_moments(
            model,
            sequences,
            architecture=architecture,
            target_ks=target_ks,
            bucket_edges=edges,
            top_k_at_calibration=top_k_at_calibration,
            dense_layers=dense_layers,
            on_layer=lambda: bar.advance(task),
        )
        bar.update(task, completed=steps)  # layers that are not observed never announce themselves

    unobserved = set(range(architecture.num_layers)) - set(moments.observed_layers)
    draft = store.ManifestDraft(
        model=identity,
        architecture=architecture,
        targets=tuple(store.Target(k=k, min_length=k + 1, max_length=max_length) for k in target_ks),
        dense_layers=tuple(sorted(unobserved.union(dense_layers))),
        placement="pre_softmax",
        degree=DEGREE,
        num_buckets=len(edges) - 1,
        calibration=provenance,
    )
    folder = out / store.folder_name(identity.id)
    store.save(folder, draft, _tensors(moments, edges, beta))
    return folder


def collect_moments(
    model: Any,
    sequences: Sequence[Tensor],
    *,
    architecture: store.Architecture,
    target_ks: Sequence[int],
    bucket_edges: NDArray[np.int32],
    top_k_at_calibration: bool,
    dense_layers: Sequence[int],
    on_layer: Callable[[], object] = lambda: None,
) -> Moments:
    """Runs the model over token sequences and returns the statistics of its k-th largest scores.

    Args:
        model: a transformers causal language model.
        sequences: tensors `[seq_len]` int64.
        architecture: that of the model.
        target_ks: the k, ascending, each less than the longest sequence.
        bucket_edges: `[num_buckets + 1]`, as `length_buckets` returns them.
        top_k_at_calibration: one pass for each k with exact top-k attention, instead of one dense pass for all.
        dense_layers: layers that hand on dense attention all the same.
        on_layer: called after each layer of each pass.

    Raises:
        CalibrationError: the model is not supported, or none of its layers can be calibrated.
    """
    statistics = KthScoreStatistics(
        num_layers=architecture.num_layers,
        num_heads=architecture.num_heads,
        target_ks=target_ks,
        bucket_edges=bucket_edges,
    )
    passes = [(k,) for k in target_ks] if top_k_at_calibration else [tuple(target_ks)]
    for sequence in sequences:
        for observed_ks in passes:

            def report(layer_idx: int, kth_scores: Tensor, observed_ks: Sequence[int] = observed_ks) -> None:
                for k, scores in zip(observed_ks, kth_scores, strict=True):
                    statistics.add(layer_idx, target_ks.index(k), scores.cpu().numpy())
                on_layer()

            route = TopKRoute(
                target_ks=observed_ks,
                sparse_k=observed_ks[0] if top_k_at_calibration else None,
                dense_layers=dense_layers,
                report=report,
            )
            with routed(model, route):
                hidden_states(model, sequence)
    if not statistics.observed_layers:
        raise CalibrationError("no layer can be calibrated: all of them have a sliding window, or no attention")
    return statistics.moments()


def default_model_id(model_dir: Path) -> str:
    """Returns the hub id of a directory in the hub's cache, and of any other directory its name.

    The name in config.json is not asked: fine-tuned models often carry that of the model they started from.

    Args:
        model_dir: a model directory.
    """
    resolved = model_dir.absolute()
    for part in resolved.parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/", 1)
    return resolved.name


def _check_options(
    target_ks: Sequence[int], max_length: int, num_sequences: int, dense_layers: Sequence[int], num_layers: int
) -> None:
    if not target_ks or target_ks[0] < 1 or len(set(target_ks)) != len(target_ks):
        raise CalibrationError(f"give different k of at least 1, got {list(target_ks)}", field="target_ks")
    if target_ks[-1] >= max_length:
        raise CalibrationError(
            f"k {target_ks[-1]} needs rows of more than {target_ks[-1]} tokens, but max_length is {max_length}",
            field="target_ks",
            remedy="Raise max_length or leave that k out",
        )
    if num_sequences < 1:
        raise CalibrationError(f"must be at least 1, got {num_sequences}", field="num_sequences")
    outside = [layer for layer in dense_layers if not 0 <= layer < num_layers]
    if outside:
        raise CalibrationError(f"no layer {outside[0]} in a model of {num_layers}", field="dense_layers")


def package_versions() -> dict[str, str]:
    """Returns the versions that decide the numbers, by package."""
    packages = {name: version(name) for name in ("numpy", "torch", "transformers")}
    return {"python": platform.python_version(), "vllm-toptheta": vllm_toptheta.__version__, **packages}


def _tensors(moments: Moments, edges: NDArray[np.int32], beta: float) -> dict[str, NDArray[Any]]:
    thresholds = moments.mean + beta * moments.std
    return {
        "coefficients": fit_curves(moments.log_length, moments.row_count, thresholds, degree=DEGREE),
        "bucket_edges": edges,
        "row_count": moments.row_count,
        "score_mean": moments.mean.astype(np.float32),
        "score_std": moments.std.astype(np.float32),
    }
