"""What the commands `toptheta eval ...` share: options, and what those mean. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vllm_toptheta.cli.terminal import check_file, check_folder, integers, words
from vllm_toptheta.errors import EvaluationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm_toptheta.evaluation.tasks import TaskOptions

ModelArgument = Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="A Hugging Face model directory.")]
ThresholdsOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[NAME=]PATH",
        help="A store or a directory of stores; several, each with a NAME, are compared in one run. "
        "Default, where a target needs one: TOPTHETA_THRESHOLDS, else the shipped ones.",
    ),
]
TargetsOption = Annotated[
    str | None,
    typer.Option(
        "--k",
        "--targets",
        help="By commas: floor:2, thresholds relative to the row, which need no store, or keys per query head and "
        "other targets of a store. Default: floor:2, or 64,128 of the stores that --thresholds names.",
    ),
]
ModeOption = Annotated[str, typer.Option(help="By commas: values, shadow; the latter needs shadow keys in the store.")]
CompensationsOption = Annotated[
    str,
    typer.Option(
        help="By commas, or all: none, sdc, offline, exp_threshold, scaled_exp_threshold, candidates, shadow, each but "
        "none also +vmc. Default: what a server of the mode has."
    ),
]
DenseLayersOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Layers that read everything, by commas, or none, or store: what the store says. Several are compared."
    ),
]
TopKOption = Annotated[str, typer.Option(help="Also exact top-k with these k, by commas, which needs no store.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1...; auto is a GPU where there is one.")]
DtypeOption = Annotated[
    Literal["float32", "bfloat16", "float16"],
    typer.Option(help="Of weights and activations; attention is float32 whatever it is."),
]
JsonOption = Annotated[Path | None, typer.Option(callback=check_file, help="Also write the report to this file.")]
PlotsOption = Annotated[
    Path | None, typer.Option(callback=check_folder, help="Also draw figures, as PNG files into this folder.")
]
TextOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[NAME=]FILE...",
        help="UTF-8 text or JSON Lines (.jsonl), not calibrated on. NAME is a domain, reported by itself; "
        "FILE may be a quoted pattern: --text 'code=src/**/*.py' --text prose=book.txt.",
    ),
]
PhaseOption = Annotated[
    Literal["prefill", "decode", "both"],
    typer.Option(help="Rows to threshold: those of the prompt (prefill), behind it (decode), or both."),
]
SeedOption = Annotated[int, typer.Option(help="Chooses the texts.")]
TasksOption = Annotated[str, typer.Option(help="Tasks by commas: needle, key-value, human-eval.")]
LengthsOption = Annotated[str, typer.Option(help="Tokens of the prompts of needle and key-value.")]
DepthsOption = Annotated[str, typer.Option(help="Where in the prompt the answer lies, percent.")]
SamplesOption = Annotated[int, typer.Option(help="Questions for each length and depth.")]
LimitOption = Annotated[int | None, typer.Option(help="Only the first problems of HumanEval.")]
ShotsOption = Annotated[int, typer.Option(help="Solved problems before each of HumanEval's, for a longer context.")]
AllowOption = Annotated[
    bool, typer.Option("--allow-code-execution", help="Let human-eval run what the model wrote on this machine.")
]
DenseUrlOption = Annotated[str, typer.Option("--dense", metavar="URL", help="A server with dense attention.")]
SparseUrlOption = Annotated[str, typer.Option("--sparse", metavar="URL", help="A server with sparse attention.")]
DenseModelOption = Annotated[str | None, typer.Option(help="Its name of the model; default: the first it lists.")]
SparseModelOption = Annotated[str | None, typer.Option(help="Likewise.")]
KeyOption = Annotated[str, typer.Option(help="Environment variable with the servers' key, if they ask for one.")]
ConcurrencyOption = Annotated[int, typer.Option(min=1, help="Questions to ask at a time.")]


def drawing(function: Literal["draw_trade_offs", "draw_recall"], folder: Path | None) -> Callable[[Any], None]:
    """Return what draws a report, before anything is measured: matplotlib is an extra of its own."""
    if folder is None:
        return lambda report: None
    import importlib

    try:
        plots = importlib.import_module("vllm_toptheta.evaluation.plots")
    except ModuleNotFoundError as error:
        raise EvaluationError(
            f"{error.name} is not installed", field="--plots", remedy='pip install "vllm-toptheta[report]"'
        ) from None

    def draw(report: Any) -> None:
        for file in getattr(plots, function)(report, folder):
            typer.echo(f"wrote {file}", err=True)

    return draw


def task_options(tasks: str, lengths: str, depths: str, **others: Any) -> TaskOptions:
    """What the flags of tasks mean; `others` are fields that are flags as they are."""
    from vllm_toptheta.evaluation.tasks import TaskOptions

    places = [depth / 100 for depth in integers("--depths", depths)]
    return TaskOptions(words(tasks), lengths=integers("--lengths", lengths), depths=places, **others)


def text_files(values: list[str]) -> list[Path]:
    """The files of --text, without their domains."""
    from vllm_toptheta.evaluation import named_paths

    return [file for files in named_paths(values, field="--text", default="text").values() for file in files]
