"""Calibrates a model: texts in, a store out."""

import datetime
import hashlib
import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

import vllm_toptheta
from vllm_toptheta import store
from vllm_toptheta.calibration.data import Text, different_texts, load_sequences
from vllm_toptheta.calibration.model import load_model, load_tokenizer
from vllm_toptheta.calibration.options import CalibrationOptions, Place
from vllm_toptheta.calibration.plausible import check_understanding
from vllm_toptheta.calibration.progress import progress_bar
from vllm_toptheta.calibration.shadow import ShadowCalibration
from vllm_toptheta.calibration.state import Checkpoint
from vllm_toptheta.calibration.thresholds import ThresholdCalibration
from vllm_toptheta.errors import CalibrationError, TensorsInvalid

__all__ = ["calibrate", "default_model_id", "model_identity", "package_versions"]


def calibrate(
    model_dir: Path,
    texts: Sequence[Text],
    *,
    out: Path,
    options: CalibrationOptions,
    place: Place | None = None,
    model_id: str | None = None,
    command: str | None = None,
    resume: bool = True,
    progress: bool = True,
) -> Path:
    """Calibrates thresholds for a model, or shadow keys, or both, and writes them as a store.

    For every k, layer, head and length bucket, the threshold is mean + beta * std of the k-th largest score
    of the calibration rows (Top-Theta Attention, arXiv 2502.08363), smoothed over lengths by `fit.fit_curves`. Then
    the thresholds are applied to some of the sequences, for what compensations need to know of the discarded scores.
    `shadow` says what is calibrated for shadow keys. The same
    arguments give the same tensors to the bit, on the same machine and number of threads, however often the
    calibration was interrupted.

    Args:
        model_dir: a Hugging Face model directory, with its tokenizer.
        texts: texts to calibrate on.
        out: folder in which the store's folder `<org>--<model>` is written. Until it is, the state of the calibration
            lies there in a hidden file.
        options: what to calibrate.
        place: where the model runs, and as what; None for float32 on the CPU.
        model_id: hub id (org/name) to record; None for `default_model_id`.
        command: command line to record; None for a call from Python.
        resume: go on where an interrupted calibration with the same arguments stopped; False to forget it.
        progress: show a progress bar on stderr.

    Returns:
        The folder written.

    Raises:
        CalibrationError: the options contradict each other, a text cannot be used, the model is not supported, or the
            interrupted calibration was another one.
        ModelConfigError: there is no such directory, or no usable config.json in it.
        StoreError: the store cannot be written.
    """
    place = place or Place()
    architecture = store.read_architecture(model_dir)
    outside = [layer for layer in options.dense_layers if layer >= architecture.num_layers]
    if outside:
        raise CalibrationError(f"no layer {outside[0]} in a model of {architecture.num_layers}", field="dense_layers")
    if options.shadow:
        options.shadow.channels_of(architecture.head_size)  # said before anything is loaded
    identity = model_identity(model_dir, model_id)
    folder = out / store.folder_name(identity.id)
    store.check_place(folder)
    texts = different_texts(texts)
    sequences = load_sequences(
        texts,
        load_tokenizer(model_dir),
        num_sequences=options.num_sequences,
        max_length=options.max_length,
        seed=options.seed,
    )
    model = load_model(model_dir, **place._asdict())
    check_understanding(model, sequences, model_dir=model_dir, length_field="max_length")
    thresholds = shadow = None
    if options.targets:
        thresholds = ThresholdCalibration(model, sequences, architecture=architecture, options=options)
    if options.shadow:
        shadow = ShadowCalibration(model, sequences, architecture=architecture, options=options)
    parts = [part for part in (thresholds, shadow) if part is not None]
    # made first, so that nothing is found out at the end that could be said at once
    provenance = _provenance(
        text=tuple(text.source for text in texts),
        num_sequences=options.num_sequences,
        max_length=options.max_length,
        seed=options.seed,
        **(thresholds.provenance if thresholds else {}),
        dtype=str(place.dtype).removeprefix("torch."),
        versions=package_versions(),
        command=command or "vllm_toptheta.calibration.calibrate()",
        date=datetime.datetime.now(datetime.UTC).date(),
    )
    passes = [run_pass for part in parts for run_pass in part.passes]
    arrays = {name: array for part in parts for name, array in part.arrays.items()}
    machine = f"{place.dtype} on {place.device_map or place.device}, {torch.get_num_threads()} threads"
    checkpoint = Checkpoint(out / f".{folder.name}.calibration", _fingerprint(model_dir, texts, options, machine))
    if not resume:
        checkpoint.remove()
    done = checkpoint.restore(arrays)
    with progress_bar("passes", enabled=progress) as bar:
        task = bar.add_task("calibrating", total=len(passes), completed=done)
        for index, run_pass in enumerate(passes[done:], start=done + 1):
            run_pass()
            checkpoint.save(index, arrays)
            bar.advance(task)

    tensors = {name: tensor for part in parts for name, tensor in part.tensors().items()}
    draft = store.ManifestDraft(
        model=identity,
        architecture=architecture,
        thresholds=thresholds.section() if thresholds else None,
        shadow=shadow.section() if shadow else None,
        calibration=provenance,
    )
    try:
        store.save(folder, draft, tensors)
    except TensorsInvalid as error:
        # the same passes would come to the same numbers
        checkpoint.remove()
        raise CalibrationError(
            f"what was calibrated makes no thresholds ({error.field}: {error.message})",
            file=model_dir,
            remedy="Check the weights and config.json, and try --dtype float32",
        ) from error
    checkpoint.remove()
    return folder


def model_identity(model_dir: Path, model_id: str | None = None) -> store.ModelIdentity:
    """Returns what a store calls a model.

    Args:
        model_dir: a model directory.
        model_id: hub id (org/name); None for `default_model_id`.

    Raises:
        CalibrationError: it is no name.
        ModelConfigError: there is no such directory.
    """
    store.check_folder(model_dir)
    name = default_model_id(model_dir) if model_id is None else model_id
    try:
        return store.ModelIdentity(id=name)
    except ValidationError:
        of_folder = "the folder is called" if model_id is None else "got"
        raise CalibrationError(
            f"{of_folder} {name!r}, and a model's name consists of letters, digits and _ . + -, the first a letter, "
            "digit or _",
            file=model_dir if model_id is None else None,
            field="--model-id",
            remedy="Give the name under which it is to be found as --model-id NAME or ORG/NAME",
        ) from None


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


def package_versions() -> dict[str, str]:
    """Returns the versions that decide the numbers, by package."""
    packages = {name: version(name) for name in ("numpy", "torch", "transformers")}
    return {"python": platform.python_version(), "vllm-toptheta": vllm_toptheta.__version__, **packages}


def _provenance(**fields: Any) -> store.Provenance:
    try:
        return store.Provenance(**fields)
    except ValidationError as error:
        problem = error.errors()[0]
        raise CalibrationError(
            f"cannot be recorded: {problem['msg']}",
            field=str(problem["loc"][0]),
            remedy="Put many texts into fewer files, or call from Python with a shorter command",
        ) from None


def _fingerprint(model_dir: Path, texts: Sequence[Text], options: CalibrationOptions, machine: str) -> str:
    """The sha256 of what decides the numbers. Weights count by size and time: reading them all takes too long."""
    config = (model_dir / "config.json").read_bytes()
    files = {
        file.name: [file.stat().st_size, file.stat().st_mtime_ns]
        for file in sorted(model_dir.iterdir())
        if file.suffix in {".safetensors", ".bin", ".json", ".model"} and file.is_file()
    }
    content: dict[str, Any] = {
        "config": hashlib.sha256(config).hexdigest(),
        "files": files,
        "texts": [text.source.sha256 for text in texts],
        "options": options.model_dump(mode="json"),
        "machine": machine,
        "versions": package_versions(),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
