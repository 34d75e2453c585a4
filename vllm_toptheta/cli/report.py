"""The command `toptheta report`: what a user of some thresholds may expect, as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from vllm_toptheta.cli.stores import ThresholdsOption, load_store
from vllm_toptheta.cli.terminal import words
from vllm_toptheta.errors import ReportError, SettingsError

__all__ = ["report_command"]

_PATTERN = "FILE may be a quoted pattern: 'src/**/*.py'."


def report_command(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="A Hugging Face model directory.")],
    text: Annotated[
        list[str],
        typer.Option(metavar="FILE...", help=f"UTF-8 text files or .jsonl files not calibrated on. {_PATTERN}"),
    ],
    out: Annotated[Path, typer.Option(help="The HTML page; its numbers are written beside it, as .json.")],
    calibration_text: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help=f"A text that was calibrated on, to compare with; repeatable. {_PATTERN}"),
    ] = None,
    png: Annotated[Path | None, typer.Option(metavar="DIR", help="Also write the figures into this folder.")] = None,
    k: Annotated[
        str | None,
        typer.Option(
            "--k",
            "--targets",
            help="By commas: floor:2, which needs no store, or keys per query head and other targets of a store. "
            "Default: the floor that is served if nothing is said.",
        ),
    ] = None,
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
    """Measure what thresholds keep, read and lose, and write a page that says what to expect."""
    # before anything is measured: matplotlib and jinja2 are an extra of their own
    try:
        from vllm_toptheta.report.page import write_report
    except ModuleNotFoundError as error:
        raise ReportError(
            f"needs the package {error.name}", remedy="Install it: pip install 'vllm-toptheta[report]'"
        ) from None
    import torch

    from vllm_toptheta.report import make_report
    from vllm_toptheta.report.verdict import verdict

    if context.args and calibration_text:
        # click cannot tell after which of the two options a further file came
        raise SettingsError(
            f"which texts does {context.args[0]!r} belong to?",
            field="--calibration-text",
            remedy="Repeat the options, or quote a pattern: --text 'held-out/*.txt' --calibration-text 'seen/*.txt'",
        )
    targets = words(k or "")
    report = make_report(
        model,
        _files([*text, *context.args]),
        load_store(model, thresholds, targets=targets),
        calibration_texts=_files(calibration_text or []),
        targets=targets,
        length=length,
        num_sequences=sequences,
        seed=seed,
        attention_share=attention_share,
        dtype=getattr(torch, dtype),
        device=device,
    )
    for target in report.targets:
        typer.echo(verdict(report, target)[1])
    for file in write_report(report, out, png=png):
        typer.echo(f"wrote {file}", err=True)


def _files(patterns: list[str]) -> list[Path]:
    """Return the files that names and patterns stand for; a name without a file is left for its reader to refuse."""
    from glob import glob

    return [
        Path(file)
        for pattern in patterns
        for file in ([pattern] if Path(pattern).exists() else sorted(glob(pattern, recursive=True)) or [pattern])
    ]
