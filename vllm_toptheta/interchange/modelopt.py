"""Exports thresholds as ModelOpt's scalar curve for skip-softmax, as far as `skip_softmax` can express them.

The config is the block `sparse_attention_config` of a model's config.json, as ModelOpt's serving plugin reads it
(https://github.com/NVIDIA/Model-Optimizer, modelopt/torch/sparsity/attention_sparsity/plugins/sparse_attn_config.py).
The way back is refused: its thresholds are relative to the largest score of a row, and the file has no statistics of
that score.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import vllm_toptheta
from vllm_toptheta.calibration.data import load_sequences
from vllm_toptheta.calibration.model import load_model, load_tokenizer
from vllm_toptheta.calibration.sources import read_file
from vllm_toptheta.errors import InterchangeError
from vllm_toptheta.interchange.skip_softmax import TILE, ScalarCurve, fit_scalar_curve
from vllm_toptheta.store import ThresholdStore, read_architecture

__all__ = ["Export", "export_modelopt", "refuse_modelopt"]

FORMULA = "a * exp(b * target_sparsity)"


@dataclass(frozen=True)
class Export:
    """A config that was written.

    Attributes:
        curve: what it says.
        notes: what was lost, a sentence each; they are in the file's comment, too.
    """

    curve: ScalarCurve
    notes: tuple[str, ...]


def export_modelopt(
    model_dir: Path,
    thresholds: ThresholdStore,
    texts: Sequence[Path],
    *,
    out: Path,
    target_ks: Sequence[int] | None = None,
    length: int = 2048,
    num_sequences: int = 2,
    seed: int = 0,
) -> Export:
    """Writes the `sparse_attention_config` that comes closest to the thresholds, for the decode phase.

    Args:
        model_dir: a Hugging Face model directory, with its tokenizer.
        thresholds: a store calibrated for the model.
        texts: text files to measure the largest scores on.
        out: JSON file to write; its content belongs into the model's config.json.
        target_ks: the k to fit the curve through, two or more; None for those calibrated that `length` exceeds. The
            largest decides the target sparsity that the file asks for.
        length: tokens of a sequence, more than the largest k.
        num_sequences: sequences to measure on.
        seed: chooses the sequences out of the texts.

    Raises:
        InterchangeError: the thresholds cannot be expressed, or the file cannot be written.
        CalibrationError: a text cannot be used, or the model is not supported.
        FingerprintMismatch: the thresholds are those of another architecture.
        TargetOutOfRange: a k was not calibrated.
    """
    manifest = thresholds.manifest
    ks = sorted(target_ks or (k for k in manifest.target_ks if k < length))
    if len(ks) < 2 or ks[-1] >= length:
        raise InterchangeError(
            f"a curve needs two k of less than {length} tokens, got {', '.join(map(str, ks)) or 'none'}",
            field="target_ks",
            remedy="Choose more of the calibrated k, or a larger length",
        )
    manifest.architecture.check(read_architecture(model_dir), file=thresholds.folder)
    sequences = load_sequences(
        [read_file(text) for text in texts],
        load_tokenizer(model_dir),
        num_sequences=num_sequences,
        max_length=length,
        seed=seed,
    )
    curve = fit_scalar_curve(load_model(model_dir), sequences, thresholds, target_ks=ks)
    notes = (
        f"one curve stands for all layers and heads, whose thresholds lie {curve.head_spread:.2f} nats apart "
        "(standard deviation)",
        f"it is relative to the largest score of a row, an absolute threshold is not: {curve.row_spread:.2f} nats "
        "between the rows of a head",
        "lambda falls as 1 / n; the calibrated growth with the length is lost",
        f"it skips tiles of {TILE} keys that no head of a group wants, not single keys: "
        f"{100 * curve.sparsities[-1]:.1f} % of them at k {ks[-1]}, in rows of up to {length} tokens",
        "the mass of what is skipped is not given to the mean value",
        "prefill is left dense",
    )
    targets = dict(zip(ks, curve.sparsities, strict=True))
    config = {
        "config_groups": {
            "group_0": {
                "algorithm": "skip_softmax",
                "targets": ["Attention"],
                "ignore": [f"*.layers.{layer}.*" for layer in manifest.dense_layers],
                "threshold_scale_factor": {
                    "formula": FORMULA,
                    "decode": {
                        "a": curve.a,
                        "b": curve.b,
                        "min_observed_sparsity": min(curve.sparsities),
                        "max_observed_sparsity": max(curve.sparsities),
                    },
                },
                "target_sparsity": {"decode": targets[ks[-1]]},
            }
        },
        "producer": {"name": "vllm-toptheta", "version": vllm_toptheta.__version__},
        "comment": [
            f"fitted to the Top-Theta thresholds of {manifest.model.id}; target_sparsity of each k: "
            + ", ".join(f"{k}: {sparsity:.4f}" for k, sparsity in targets.items()),
            *(f"lost: {note}" for note in notes),
        ],
    }
    try:
        out.write_text(json.dumps({"sparse_attention_config": config}, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise InterchangeError(f"cannot be written: {error.strerror}", file=out) from None
    return Export(curve, notes)


def refuse_modelopt(file: Path) -> NoReturn:
    """Refuses a JSON file that is offered for import, with the reason.

    Raises:
        InterchangeError: always.
    """
    raise InterchangeError(
        "skip-softmax thresholds are relative to the largest score of each row, which the file does not know, so no "
        "absolute threshold follows from them",
        file=file,
        remedy="Calibrate the model instead: toptheta calibrate --help",
    )
