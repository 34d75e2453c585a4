"""Measures what thresholds keep: a model, its thresholds and texts in, findings out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vllm_toptheta.calibration.data import Text, load_sequences, read_text
from vllm_toptheta.calibration.model import load_model, load_tokenizer, usable_device
from vllm_toptheta.calibration.plausible import check_understanding
from vllm_toptheta.calibration.progress import progress_bar
from vllm_toptheta.calibration.run import package_versions
from vllm_toptheta.errors import ReportError
from vllm_toptheta.evaluation.sparse import SparseAttention
from vllm_toptheta.evaluation.variants import expand_variants, floor_label, store_of
from vllm_toptheta.limits import DEFAULT_WEIGHT_FLOOR
from vllm_toptheta.report.collect import collect
from vllm_toptheta.report.findings import Curves, SurvivorReport, TargetFindings, summarise
from vllm_toptheta.store import ThresholdStore, read_architecture

__all__ = ["SurvivorOptions", "measure_survivors"]

_NUM_LENGTHS = 24


@dataclass(frozen=True)
class SurvivorOptions:
    """What can be chosen about a measurement of survivors.

    Attributes:
        targets: labels, such as floor:2 or k:64; none for the floor that is served if nothing is said.
        length: tokens of a sequence, more than any target keeps dense.
        num_sequences: sequences of each kind of text.
        seed: chooses the sequences out of the texts.
        attention_share: of the time of a dense decode step, stated by the caller, from 0 to 1.
        dtype: of the weights and activations; attention is float32 whatever it is.
        device: where the model runs, as torch names it; auto is a GPU where there is one.
    """

    targets: Sequence[str] = ()
    length: int = 2048
    num_sequences: int = 4
    seed: int = 0
    attention_share: float = 0.5
    dtype: torch.dtype = torch.float32
    device: str = "auto"


def measure_survivors(
    model_dir: Path,
    texts: Sequence[Path],
    thresholds: ThresholdStore | None = None,
    *,
    options: SurvivorOptions | None = None,
    calibration_texts: Sequence[Path] = (),
    progress: bool = True,
) -> SurvivorReport:
    """Measures what thresholds keep of texts, every row thresholded as a decode step of its length would be.

    Args:
        model_dir: a Hugging Face model directory, with its tokenizer.
        texts: text files that the thresholds were not calibrated on.
        thresholds: a store calibrated for the model; None where every target is a floor.
        options: what is measured, and where; None for the defaults.
        calibration_texts: the texts that the store was calibrated on, to compare with; none to leave that out.
        progress: show a progress bar on stderr.

    Raises:
        ReportError: an option cannot be, or no layer is sparse.
        CalibrationError: a text cannot be used, there is no such device, or the model is not supported.
        EvaluationError: a target needs a store, and there is none; or it is no floor.
        FingerprintMismatch: the thresholds are those of another architecture.
        TargetOutOfRange: a target was not calibrated.
    """
    options = options or SurvivorOptions()
    architecture = read_architecture(model_dir)
    if thresholds is not None:
        thresholds.manifest.architecture.check(architecture, file=thresholds.folder)
    stores = {} if thresholds is None else {"": thresholds}
    default = floor_label(DEFAULT_WEIGHT_FLOOR, field="targets")
    variants = expand_variants(stores, targets=options.targets or [default])
    if calibration_texts and thresholds is None:
        raise ReportError(
            "nothing was calibrated for floors", field="calibration_texts", remedy="Give a store too, or leave them out"
        )
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch_device = usable_device(device)
    _check_numbers(options)
    attentions = [
        SparseAttention(variant, store_of(variant, stores), max_length=options.length, device=torch_device)
        for variant in variants
    ]
    for attention in attentions:
        _check_rows(attention, length=options.length, num_layers=architecture.num_layers)
    held_out, calibrated = ([read_text(file) for file in files] for files in (texts, calibration_texts))
    tokenizer = load_tokenizer(model_dir)
    sequences = [
        load_sequences(
            kind, tokenizer, num_sequences=options.num_sequences, max_length=options.length, seed=options.seed
        )
        for kind in (held_out, calibrated)
        if kind
    ]
    model = load_model(model_dir, dtype=options.dtype, device=torch_device)
    for of_kind in sequences:
        check_understanding(model, of_kind, model_dir=model_dir)

    found: list[TargetFindings] = []
    with progress_bar("passes", enabled=progress) as bar:
        num_kinds = [len(sequences) if attention.variant.weight_floor is None else 1 for attention in attentions]
        task = bar.add_task("measuring", total=sum(num_kinds) * options.num_sequences)
        for attention, kinds in zip(attentions, num_kinds, strict=True):
            summaries = [
                summarise(
                    collect(
                        model, of_kind, attention, architecture=architecture, on_sequence=lambda: bar.advance(task)
                    ),
                    text=[text.source for text in kind],
                    dense_layers=attention.dense_layers,
                    attention_share=options.attention_share,
                )
                for kind, of_kind in zip((held_out, calibrated), sequences[:kinds], strict=False)
            ]
            variant = attention.variant
            found.append(
                TargetFindings(
                    label=variant.target,
                    weight_floor=variant.weight_floor,
                    dense_length=attention.dense_length,
                    dense_layers=tuple(sorted(attention.dense_layers)),
                    curves=_curves(store_of(variant, stores), variant.target, length=options.length),
                    held_out=summaries[0],
                    calibration=summaries[1] if len(summaries) > 1 else None,
                )
            )
    return SurvivorReport(
        model=model_dir.absolute().name,
        thresholds=thresholds.manifest.model.id if thresholds else None,
        num_sequences=options.num_sequences,
        length=options.length,
        seed=options.seed,
        dtype=str(options.dtype).removeprefix("torch."),
        device=torch_device.type,
        attention_share=options.attention_share,
        not_held_out=_named(thresholds, held_out, known=True),
        not_calibrated_on=_named(thresholds, calibrated, known=False),
        versions=package_versions(),
        targets=tuple(found),
    )


def _curves(thresholds: ThresholdStore | None, target: str, *, length: int) -> Curves | None:
    """The thresholds of a target by length, as far as both the sequences and calibration go; None without a store."""
    if thresholds is None:
        return None
    curve = thresholds.curve_of(target)
    lengths = np.geomspace(curve.dense_length + 1, max(length, curve.max_length), _NUM_LENGTHS).round()
    lengths = np.unique(lengths.astype(np.int64))
    return Curves(
        placement=thresholds.manifest.placement,
        lengths=tuple(lengths.tolist()),
        thresholds=tuple(tuple(map(tuple, table)) for table in curve.threshold(lengths).tolist()),
    )


def _check_rows(attention: SparseAttention, *, length: int, num_layers: int) -> None:
    """Refuse what would leave no row thresholded."""
    if len(attention.dense_layers) >= num_layers:
        raise ReportError(
            "every layer is dense, so the thresholds keep everything", field="dense_layers", remedy="Calibrate again"
        )
    if attention.dense_length >= length:
        raise ReportError(
            f"rows of at most {attention.dense_length} tokens are dense, so sequences of {length} tokens show nothing",
            field="length",
            remedy="Raise it",
        )


def _check_numbers(options: SurvivorOptions) -> None:
    if options.length < 2:
        raise ReportError(f"must be at least 2, got {options.length}", field="length")
    if options.num_sequences < 1:
        raise ReportError(f"must be at least 1, got {options.num_sequences}", field="num_sequences")
    if not 0 <= options.attention_share <= 1:
        raise ReportError(f"must be from 0 to 1, got {options.attention_share}", field="attention_share")


def _named(thresholds: ThresholdStore | None, texts: Sequence[Text], *, known: bool) -> tuple[str, ...]:
    """The names of the texts that the manifest knows, or does not know; none without a store."""
    if thresholds is None:
        return ()
    calibrated_on = thresholds.manifest.calibrated_on
    return tuple(text.source.name for text in texts if (text.source.sha256 in calibrated_on) == known)
