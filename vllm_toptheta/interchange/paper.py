"""Imports thresholds that the paper's own code calibrated: th.txt into a store with our curve through its numbers."""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from vllm_toptheta import store
from vllm_toptheta.calibration.data import load_sequences
from vllm_toptheta.calibration.model import load_model, load_tokenizer
from vllm_toptheta.calibration.run import default_model_id
from vllm_toptheta.calibration.sources import read_file
from vllm_toptheta.errors import InterchangeError
from vllm_toptheta.interchange.assemble import assemble, fit_error
from vllm_toptheta.interchange.grid import ThresholdGrid, build_grid
from vllm_toptheta.interchange.lines import CalibratedLines, read_lines
from vllm_toptheta.interchange.measured import check_missing_masses, measure, with_missing_masses
from vllm_toptheta.reference import Placement

__all__ = ["Import", "import_paper"]


@dataclass(frozen=True)
class Import:
    """A store that was imported.

    Attributes:
        folder: where it was written.
        notes: what the file does not say or the store cannot hold, a sentence each.
    """

    folder: Path
    notes: tuple[str, ...]


def import_paper(
    file: Path,
    model_dir: Path,
    *,
    placement: Placement,
    out: Path,
    sdc: Path | None = None,
    texts: Sequence[Path] = (),
    num_sequences: int = 1,
    length: int = 2048,
    seed: int = 0,
    dense_layers: Collection[int] = (),
    model_id: str | None = None,
    command: str | None = None,
) -> Import:
    """Makes a store of a th.txt.

    Through the thresholds of every layer and head goes the curve that our own calibration fits. A layer that was
    calibrated for another k than most (the paper's code can give the first layers a larger one) becomes a dense layer.

    Args:
        file: the th.txt.
        model_dir: directory of the model that it was calibrated on; without texts only config.json is read.
        placement: what the thresholds apply to; the file does not say it.
        out: folder in which the store's folder `<org>--<model>` is written.
        sdc: the sdc.txt of the same calibration. Its masses are kept beside what is measured on texts.
        texts: text files to measure on what the thresholds keep and lose; none for a store without a measurement.
        num_sequences: sequences to measure on.
        length: tokens of such a sequence.
        seed: chooses the sequences out of the texts.
        dense_layers: layers to serve dense, besides those that the file leaves no choice about.
        model_id: hub id (org/name) to record; None for `default_model_id`.
        command: command line to record; None for a call from Python.

    Returns:
        The folder written, and what was lost.

    Raises:
        InterchangeError: a line is wrong, a threshold is missing, or an option cannot be.
        CalibrationError: a text cannot be used, or the model is not supported.
        ModelConfigError: the model directory has no usable config.json.
        StoreError: the store cannot be written.
    """
    architecture = store.read_architecture(model_dir)
    lines = read_lines(file, architecture, has_k=True)
    outside = [layer for layer in dense_layers if not 0 <= layer < architecture.num_layers]
    if outside:
        raise InterchangeError(f"no layer {outside[0]} in a model of {architecture.num_layers}", field="dense_layers")
    if num_sequences < 1:
        raise InterchangeError(f"must be at least 1, got {num_sequences}", field="num_sequences")
    grid = build_grid(lines, architecture, placement)
    sums = None if sdc is None else read_lines(sdc, architecture, has_k=False)
    if sums is not None:
        check_missing_masses(sums, lines)
        if len(grid.target_ks) > 1:
            raise InterchangeError(
                f"it has no k, but {file.name} has k {', '.join(map(str, grid.target_ks))}",
                file=sdc,
                remedy="Import each k from a file of its own",
            )
    draft, tensors = assemble(
        grid,
        identity=_identity(model_id or default_model_id(model_dir)),
        architecture=architecture,
        placement=placement,
        dense_layers=dense_layers,
        sources=tuple(_source(source) for source in (file, sdc) if source is not None),
        command=command or "vllm_toptheta.interchange.import_paper()",
    )
    if texts:
        sequences = load_sequences(
            [read_file(text) for text in texts],
            load_tokenizer(model_dir),
            num_sequences=num_sequences,
            max_length=length,
            seed=seed,
        )
        measured = measure(load_model(model_dir), sequences, grid, draft, tensors, seed=seed)
        if sums is not None:
            measured = with_missing_masses(measured, sums, tensors["bucket_edges"])
        tensors |= measured
        draft = draft.model_copy(update={"measurement": store.Measurement(num_sequences=num_sequences)})
    folder = out / store.folder_name(draft.model.id)
    store.save(folder, draft, tensors)
    error, worst = fit_error(grid, tensors["coefficients"])
    unit = "scaled logits" if placement == "pre_softmax" else "of the logarithm"
    notes = [
        *_notes(lines, grid, placement),
        f"the file has a number for each length, the store a curve: they differ by {error:.3g} {unit} (root mean "
        f"square over rows; the worst head {worst:.3g})",
        *_measurement_notes(sdc, measured=bool(texts)),
    ]
    return Import(folder, tuple(notes))


def _notes(lines: CalibratedLines, grid: ThresholdGrid, placement: Placement) -> list[str]:
    notes = [
        "the texts, the seed, beta and top-k at calibration are not in the file; the manifest leaves them out, and "
        "names the file as its source",
        "the spread of the thresholds between rows is not in the file; score_std is 0",
    ]
    if grid.dense_layers:
        listed = ", ".join(map(str, grid.dense_layers))
        ks = ", ".join(map(str, grid.target_ks))
        notes.append(f"layers {listed} have no thresholds for k {ks}, so they are dense")
    if placement == "post_softmax":
        notes.append("thresholds after the softmax are for evaluation only; the server applies them before it")
    elif ((lines.value >= 0) & (lines.value <= 1)).all():
        notes.append("every threshold lies between 0 and 1: if they apply to probabilities, import with post_softmax")
    return notes


def _measurement_notes(sdc: Path | None, *, measured: bool) -> list[str]:
    if measured:
        return []
    kept = "what the thresholds keep and lose is not known"
    if sdc is not None:
        kept += f", and {sdc.name} was checked but is kept only beside that"
    return [f"{kept}: give texts to measure it"]


def _identity(model_id: str) -> store.ModelIdentity:
    try:
        return store.ModelIdentity(id=model_id)
    except ValidationError as error:
        raise InterchangeError(error.errors()[0]["msg"], field="model_id", remedy="Give a hub id, org/name") from None


def _source(file: Path) -> store.TextSource:
    data = file.read_bytes()
    return store.TextSource(name=file.name, sha256=hashlib.sha256(data).hexdigest(), num_characters=len(data))
