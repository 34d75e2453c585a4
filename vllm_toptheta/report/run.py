"""Makes a report: a model, its thresholds and texts in, findings out."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from vllm_toptheta.calibration.data import Text, load_sequences
from vllm_toptheta.calibration.model import load_model, load_tokenizer, usable_device
from vllm_toptheta.calibration.progress import progress_bar
from vllm_toptheta.calibration.run import package_versions
from vllm_toptheta.calibration.sources import read_file
from vllm_toptheta.errors import ReportError
from vllm_toptheta.report.collect import collect
from vllm_toptheta.report.findings import Report, TargetFindings, summarise
from vllm_toptheta.store import Manifest, ThresholdCurve, ThresholdStore, read_architecture

__all__ = ["default_targets", "make_report"]

PREFERRED_K = 128  # what the server takes if nothing is said
_NUM_LENGTHS = 24


def default_targets(manifest: Manifest) -> tuple[str, ...]:
    """Returns the target that is served if nothing is said, or the store's last if it was not calibrated for that."""
    ks = manifest.target_ks
    if ks and ks[0] <= PREFERRED_K <= ks[-1]:
        return (f"k:{PREFERRED_K}",)
    return manifest.labels[-1:] or (f"k:{PREFERRED_K}",)


def make_report(
    model_dir: Path,
    texts: Sequence[Path],
    thresholds: ThresholdStore,
    *,
    calibration_texts: Sequence[Path] = (),
    targets: Sequence[str] = (),
    length: int = 2048,
    num_sequences: int = 4,
    seed: int = 0,
    attention_share: float = 0.5,
    dtype: torch.dtype = torch.float32,
    device: str = "auto",
    progress: bool = True,
) -> Report:
    """Measures what thresholds keep of texts, every row thresholded as a decode step of its length would be.

    Args:
        model_dir: a Hugging Face model directory, with its tokenizer.
        texts: text files that the thresholds were not calibrated on.
        thresholds: a store calibrated for the model.
        calibration_texts: the texts that they were calibrated on, to compare with; none to leave that out.
        targets: labels, such as k:64; none for `default_targets`.
        length: tokens of a sequence, more than any target keeps dense.
        num_sequences: sequences of each kind of text.
        seed: chooses the sequences out of the texts.
        attention_share: of the time of a dense decode step, stated by the caller, from 0 to 1.
        dtype: of the weights and activations; attention is float32 whatever it is.
        device: where the model runs, as torch names it; auto is a GPU where there is one.
        progress: show a progress bar on stderr.

    Raises:
        ReportError: an option cannot be, or no layer is sparse.
        CalibrationError: a text cannot be used, there is no such device, or the model is not supported.
        FingerprintMismatch: the thresholds are those of another architecture.
        TargetOutOfRange: a target was not calibrated.
    """
    manifest = thresholds.manifest
    curves = [thresholds.curve_of(label) for label in targets or default_targets(manifest)]
    _check(manifest, curves, length=length, num_sequences=num_sequences, attention_share=attention_share)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch_device = usable_device(device)
    architecture = manifest.architecture
    architecture.check(read_architecture(model_dir), file=thresholds.folder)
    held_out, calibrated = ([read_file(file) for file in files] for files in (texts, calibration_texts))
    kinds = [kind for kind in (held_out, calibrated) if kind]
    tokenizer = load_tokenizer(model_dir)
    sequences = [
        load_sequences(kind, tokenizer, num_sequences=num_sequences, max_length=length, seed=seed) for kind in kinds
    ]
    model = load_model(model_dir, dtype=dtype, device=torch_device)

    found: list[TargetFindings] = []
    with progress_bar("passes", enabled=progress) as bar:
        task = bar.add_task("measuring", total=len(curves) * len(kinds) * num_sequences)
        for curve in curves:
            summaries = [
                summarise(
                    collect(
                        model,
                        of_kind,
                        curve,
                        architecture=architecture,
                        dense_layers=manifest.dense_layers,
                        placement=manifest.placement,
                        on_sequence=lambda: bar.advance(task),
                    ),
                    text=[text.source for text in kind],
                    dense_layers=manifest.dense_layers,
                    attention_share=attention_share,
                )
                for kind, of_kind in zip(kinds, sequences, strict=True)
            ]
            lengths = np.geomspace(curve.dense_length + 1, max(length, curve.max_length), _NUM_LENGTHS).round()
            lengths = np.unique(lengths.astype(np.int64))
            found.append(
                TargetFindings(
                    label=curve.label,
                    dense_length=curve.dense_length,
                    lengths=tuple(lengths.tolist()),
                    thresholds=tuple(tuple(map(tuple, table)) for table in curve.threshold(lengths).tolist()),
                    held_out=summaries[0],
                    calibration=summaries[1] if calibrated else None,
                )
            )
    return Report(
        model=model_dir.absolute().name,
        thresholds=manifest.model.id,
        placement=manifest.placement,
        dense_layers=manifest.dense_layers,
        num_sequences=num_sequences,
        length=length,
        seed=seed,
        dtype=str(dtype).removeprefix("torch."),
        device=torch_device.type,
        attention_share=attention_share,
        not_held_out=_named(manifest, held_out, known=True),
        not_calibrated_on=_named(manifest, calibrated, known=False),
        versions=package_versions(),
        targets=tuple(found),
    )


def _check(
    manifest: Manifest,
    curves: Sequence[ThresholdCurve],
    *,
    length: int,
    num_sequences: int,
    attention_share: float,
) -> None:
    if len(manifest.dense_layers) >= manifest.architecture.num_layers:
        raise ReportError(
            "every layer is dense, so the thresholds keep everything", field="dense_layers", remedy="Calibrate again"
        )
    dense_length = max(curve.dense_length for curve in curves)
    if dense_length >= length:
        raise ReportError(
            f"rows of at most {dense_length} tokens are dense, so sequences of {length} tokens show nothing",
            field="length",
            remedy="Raise it",
        )
    if num_sequences < 1:
        raise ReportError(f"must be at least 1, got {num_sequences}", field="num_sequences")
    if not 0 <= attention_share <= 1:
        raise ReportError(f"must be from 0 to 1, got {attention_share}", field="attention_share")


def _named(manifest: Manifest, texts: Sequence[Text], *, known: bool) -> tuple[str, ...]:
    """The names of the texts that the manifest knows, or does not know."""
    calibrated_on = {source.sha256 for source in manifest.calibration.text}
    return tuple(text.source.name for text in texts if (text.source.sha256 in calibrated_on) == known)
