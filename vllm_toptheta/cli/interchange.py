"""The commands `toptheta thresholds import` and `export`: other projects' formats."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from vllm_toptheta.cli.terminal import integers

__all__ = ["export_command", "import_command"]


def import_command(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="TH_TXT", help="A th.txt of the paper's code.")],
    model: Annotated[Path, typer.Option(help="Directory of the model that it was calibrated on.")],
    placement: Annotated[
        Literal["pre_softmax", "post_softmax"],
        typer.Option(help="What the thresholds apply to: scores or probabilities."),
    ],
    out: Annotated[Path, typer.Option(help="Directory in which the folder <org>--<model> is written.")],
    sdc: Annotated[Path | None, typer.Option(help="The sdc.txt of the same calibration.")] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE...", help="Texts to measure on what the thresholds keep and lose."),
    ] = None,
    sequences: Annotated[int, typer.Option(help="Sequences to measure on.")] = 1,
    length: Annotated[int, typer.Option(help="Tokens of such a sequence.")] = 2048,
    seed: Annotated[int, typer.Option(help="Chooses the sequences out of the texts.")] = 0,
    dense_layers: Annotated[str, typer.Option(help="Layers to serve dense, separated by commas.")] = "",
    model_id: Annotated[
        str | None, typer.Option(help="Hub id (org/name) to record; default: the folder's name.")
    ] = None,
) -> None:
    """Make a store of thresholds that the paper's own code calibrated."""
    import shlex

    from vllm_toptheta.interchange import import_paper, refuse_modelopt

    if file.suffix == ".json":
        refuse_modelopt(file)
    texts = [*(text or []), *map(Path, context.args)]
    # files by their bare names: where they lay is nobody's business
    names = {str(path): path.name for path in (file, model, out, sdc, *texts) if path is not None}
    imported = import_paper(
        file,
        model,
        placement=placement,
        out=out,
        sdc=sdc,
        texts=texts,
        num_sequences=sequences,
        length=length,
        seed=seed,
        dense_layers=integers("--dense-layers", dense_layers),
        model_id=model_id,
        command=shlex.join(["toptheta", *(names.get(argument, argument) for argument in sys.argv[1:])]),
    )
    for note in imported.notes:
        typer.echo(f"note: {note}", err=True)
    typer.echo(f"wrote {imported.folder}")


def export_command(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="A Hugging Face model directory.")],
    text: Annotated[list[Path], typer.Option(metavar="FILE...", help="UTF-8 text files to measure on.")],
    out: Annotated[Path, typer.Option(help="The JSON file; its content belongs into config.json.")],
    k: Annotated[
        str, typer.Option(help="Target ks to fit through, separated by commas; default: all that are calibrated.")
    ] = "",
    sequences: Annotated[int, typer.Option(help="Sequences to measure on.")] = 2,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 2048,
    seed: Annotated[int, typer.Option(help="Chooses the sequences out of the texts.")] = 0,
    thresholds: Annotated[
        Path | None,
        typer.Option(help="A store or a directory of stores; default: TOPTHETA_THRESHOLDS, else the shipped ones."),
    ] = None,
) -> None:
    """Write the skip-softmax curve of ModelOpt that comes closest to the thresholds, and say what is lost."""
    from vllm_toptheta import store
    from vllm_toptheta.interchange import export_modelopt

    exported = export_modelopt(
        model,
        store.load(store.resolve(str(model), thresholds=thresholds)),
        [*text, *map(Path, context.args)],
        out=out,
        target_ks=integers("--k", k) or None,
        length=length,
        num_sequences=sequences,
        seed=seed,
    )
    for note in exported.notes:
        typer.echo(f"lost: {note}", err=True)
    typer.echo(f"wrote {out}")
