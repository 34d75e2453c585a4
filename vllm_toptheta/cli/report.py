"""The command `toptheta report`: what is promised, and what thresholds keep of texts, as one page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vllm_toptheta.cli.stores import ThresholdsOption, load_store
from vllm_toptheta.cli.terminal import check_file, check_folder, words
from vllm_toptheta.errors import ReportError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_toptheta.report.quality import Quality
    from vllm_toptheta.store import ThresholdStore

__all__ = ["report_command"]

_RENAME = "Name another page"
_PATTERN = "FILE may be a quoted pattern: 'src/**/*.py'."


TargetsOption = Annotated[
    str | None,
    typer.Option(
        "--k",
        "--targets",
        help="By commas: floor:2, which needs no store, or keys per query head and other targets of a store. "
        "Default: the promised floor, else that which is served if nothing is said.",
    ),
]


def report_command(
    context: typer.Context,
    *,
    model: Annotated[
        Path | None,
        typer.Argument(
            metavar="[MODEL_DIR|STORE]", help="A Hugging Face model directory, or a store: its evidence needs no model."
        ),
    ] = None,
    records: Annotated[
        list[Path] | None,
        typer.Option(
            "--from",
            metavar="FILE",
            help="What toptheta tune --json has written; repeatable. The record beside a store is found.",
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE...",
            help=f"Also measure what is kept of these: UTF-8 text or .jsonl files not calibrated on. {_PATTERN}",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(callback=check_file, help="The HTML page; its numbers are written beside it, as .json.")
    ],
    calibration_text: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help=f"A text that was calibrated on, to compare with; repeatable. {_PATTERN}"),
    ] = None,
    png: Annotated[
        Path | None, typer.Option(callback=check_folder, metavar="DIR", help="Also write the figures into this folder.")
    ] = None,
    k: TargetsOption = None,
    sequences: Annotated[int, typer.Option(help="Sequences of each kind of text.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 2048,
    attention_share: Annotated[
        float, typer.Option(help="Share of a dense decode step that attention takes, for the step's speed-up.")
    ] = 0.5,
    seed: Annotated[int, typer.Option(help="Chooses the sequences out of the texts.")] = 0,
    thresholds: ThresholdsOption = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1...; auto is a GPU where there is one.")] = "auto",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        typer.Option(help="Of weights and activations; attention is float32 whatever it is."),
    ] = "float32",
) -> None:
    """Draw what was measured of a promise, measure what thresholds keep of texts, and write a page that says both."""
    # before anything is measured: matplotlib and jinja2 are an extra of their own
    try:
        from vllm_toptheta.report.page import write_report
    except ModuleNotFoundError as error:
        raise ReportError(
            f"needs the package {error.name}", remedy="Install it: pip install 'vllm-toptheta[report]'"
        ) from None
    import torch

    from vllm_toptheta import store
    from vllm_toptheta.report import Report, SurvivorOptions, find_quality, measure_survivors
    from vllm_toptheta.report.quality_verdict import quality_verdict
    from vllm_toptheta.report.verdict import verdict

    _check_texts(context.args, text, calibration_text)
    if out.with_suffix(".json").resolve() in {file.resolve() for file in records or ()}:
        raise ReportError(
            f"its numbers would take the place of {out.with_suffix('.json')}", file=out, field="--out", remedy=_RENAME
        )
    model_dir = None if model is not None and (model / "manifest.yaml").is_file() else model
    if text and model_dir is None:
        raise ReportError(
            "texts are measured with a model, and none is named",
            file=model,
            field="--text",
            remedy="Name its directory first, and a store with --thresholds; or leave the texts out",
        )
    targets = words(k or "")
    found: store.ThresholdStore | None = None
    if model is not None and model_dir is None:
        found = store.load(model)
    elif model is not None and (text or records):
        found = load_store(model, thresholds, targets=targets)
    elif model is not None:
        found = store.load(store.resolve(str(model), thresholds=thresholds))
    weights = None if model_dir is None else store.weights_sha256(model_dir)
    quality = find_quality(found, records or (), weights_sha256=weights)
    if not text and not quality:
        raise ReportError(
            "there is no evidence of quality to draw",
            file=found.folder if found else None,
            remedy="Measure it (toptheta tune MODEL_DIR --text FILE...), name its record (--from FILE), or name a "
            "model and texts to count survivors on (--text)",
        )
    survivors = None
    if model_dir is not None and text:
        promised = [store.floor_label(one.evidence.served.weight_floor or 0.0) for one in quality]
        survivors = measure_survivors(
            model_dir,
            _files([*text, *context.args]),
            found,
            options=SurvivorOptions(
                targets=targets or promised[:1],
                length=length,
                num_sequences=sequences,
                seed=seed,
                attention_share=attention_share,
                dtype=getattr(torch, dtype),
                device=device,
            ),
            calibration_texts=_files(calibration_text or []),
        )
        for target in survivors.targets:
            typer.echo(verdict(survivors, target)[1])
    for one in quality:
        for paragraph in quality_verdict(one):
            typer.echo(paragraph)
    report = Report(model=_name(model_dir, found, quality), quality=quality, survivors=survivors)
    for file in write_report(report, out, png=png):
        typer.echo(f"wrote {file}", err=True)


def _check_texts(further: list[str], text: list[str] | None, calibration_text: list[str] | None) -> None:
    """Refuse files that belong to no option, or to one that needs another."""
    if further and (calibration_text or not text):
        # click cannot tell after which of the two options a further file came
        raise SettingsError(
            f"which texts does {further[0]!r} belong to?",
            field="--calibration-text" if calibration_text else "--text",
            remedy="Repeat the options, or quote a pattern: --text 'held-out/*.txt' --calibration-text 'seen/*.txt'",
        )
    if calibration_text and not text:
        raise SettingsError("nothing to compare with", field="--calibration-text", remedy="Give --text too")


def _name(model_dir: Path | None, store: ThresholdStore | None, quality: Sequence[Quality]) -> str:
    """Return what the page calls the model."""
    if model_dir is not None:
        return model_dir.absolute().name
    if store is not None:
        return store.manifest.model.id
    return next((one.ladder.setup.model for one in quality if one.ladder is not None), "")


def _files(patterns: list[str]) -> list[Path]:
    """Return the files that names and patterns stand for; a name without a file is left for its reader to refuse."""
    from glob import glob

    return [
        Path(file)
        for pattern in patterns
        for file in ([pattern] if Path(pattern).exists() else sorted(glob(pattern, recursive=True)) or [pattern])
    ]
