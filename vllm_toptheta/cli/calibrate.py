"""The command `toptheta calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from vllm_toptheta.cli.hints import serve_hint
from vllm_toptheta.cli.terminal import integers, recorded_command

__all__ = ["calibrate_command"]

USUAL_K = 128
CHARACTERS_PER_TOKEN = 8  # taken from a dataset; the most that a token stands for in ordinary text


def calibrate_command(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="A Hugging Face model directory.")],
    out: Annotated[Path, typer.Option(help="Directory in which the folder <org>--<model> is written.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE...",
            help="UTF-8 text or JSON Lines (.jsonl), also gzip, xz or zstd; default: Python's own sources.",
        ),
    ] = None,
    text_field: Annotated[str, typer.Option(help="Field of a JSON object, or column of a dataset, with the text.")] = (
        "text"
    ),
    dataset: Annotated[
        str | None, typer.Option(metavar="NAME[:SPLIT]", help="A dataset of the hub; needs the extra datasets.")
    ] = None,
    builtin: Annotated[
        bool, typer.Option("--builtin", help="Python's own sources, beside what else is given.")
    ] = False,
    k: Annotated[
        str | None,
        typer.Option(
            help="Keys per query head that thresholds should keep, separated by commas; default: 32,64,128,256 in mode "
            "values, no thresholds in mode shadow."
        ),
    ] = None,
    max_length: Annotated[int, typer.Option(help="Tokens of a sequence; thresholds are clamped beyond.")] = 4096,
    sequences: Annotated[int, typer.Option(help="Sequences to calibrate on.")] = 4,
    row_fraction: Annotated[float, typer.Option(help="Share of the rows observed, even over lengths.")] = 1.0,
    dense_layers: Annotated[str, typer.Option(help="Layers to serve dense, separated by commas.")] = "0,1",
    beta: Annotated[float, typer.Option(help="Standard deviations added to the mean threshold.")] = 0.0,
    top_k: Annotated[
        Literal["shared", "each", "off"],
        typer.Option(help="Top-k attention while calibrating: one pass for all k, one for each, or none."),
    ] = "shared",
    placement: Annotated[
        Literal["pre_softmax", "post_softmax"],
        typer.Option(help="What thresholds apply to; after the softmax is for evaluation only."),
    ] = "pre_softmax",
    mode: Annotated[
        Literal["values", "shadow"],
        typer.Option(help="shadow calibrates shadow keys, for thresholds relative to the row."),
    ] = "values",
    channels: Annotated[
        int | None, typer.Option(help="Directions of a shadow key, 4 bits each; default: half of the head size.")
    ] = None,
    weight_floor: Annotated[
        float | None,
        typer.Option(help="Of the relative thresholds that shadow keys will be served with; default: the backend's."),
    ] = None,
    candidate_mass: Annotated[
        float, typer.Option(help="Share of the survivors' softmax that candidates hold in every head.")
    ] = 0.99,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    device_map: Annotated[
        str | None, typer.Option(help="auto spreads the model over GPUs; needs the extra accelerate.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Of weights and activations; scores are float32.")
    ] = "float32",
    seed: Annotated[int, typer.Option(help="Chooses sequences and rows.")] = 0,
    resume: Annotated[bool, typer.Option(help="Go on where the same command was interrupted.")] = True,
    model_id: Annotated[
        str | None, typer.Option(help="Hub id (org/name) to record; default: the folder's name.")
    ] = None,
) -> None:
    """Calibrate thresholds or shadow keys for a model on texts and write them as a store."""
    import torch

    from vllm_toptheta.calibration import CalibrationOptions, Place, calibrate
    from vllm_toptheta.calibration.data import read_text
    from vllm_toptheta.calibration.sources import builtin_texts, read_dataset
    from vllm_toptheta.limits import gpus_lack
    from vllm_toptheta.store import read_architecture

    options = CalibrationOptions.create(
        integers("--k", ("32,64,128,256" if mode == "values" else "") if k is None else k),
        max_length=max_length,
        num_sequences=sequences,
        row_fraction=row_fraction,
        seed=seed,
        beta=beta,
        top_k=top_k,
        dense_layers=tuple(integers("--dense-layers", dense_layers)),
        placement=placement,
        shadow={
            "num_channels": channels,
            **({} if weight_floor is None else {"weight_floor": weight_floor}),
            "candidate_mass": candidate_mass,
        }
        if mode == "shadow"
        else None,
    )
    files = [*(text or []), *map(Path, context.args)]
    texts = [read_text(file, text_field=text_field) for file in files]
    if dataset is not None:
        wanted = CHARACTERS_PER_TOKEN * sequences * max_length
        texts.append(read_dataset(dataset, num_characters=wanted, text_field=text_field))
    if builtin or not texts:
        texts += builtin_texts()
    paths = [model, out, *files]
    if dataset is not None and Path(dataset.partition(":")[0]).exists():
        paths.append(Path(dataset))
    architecture = read_architecture(model)
    if missing := gpus_lack(architecture.head_size, architecture.num_heads, architecture.num_kv_heads):
        # said before hours of work, and no error: nobody knows yet where it will be served
        typer.echo(f"warning: {model}: these thresholds will serve on CPUs only, because {missing}", err=True)
    folder = calibrate(
        model,
        texts,
        out=out,
        options=options,
        place=Place(getattr(torch, dtype), device, device_map),
        model_id=model_id,
        command=recorded_command(*paths),
        resume=resume,
    )
    typer.echo(f"wrote {folder}")
    ks = [target.k for target in options.targets]
    if ks:
        # of those calibrated, the one that the documentation serves, or the next
        target = f"k:{min(ks, key=lambda k: abs(k - USUAL_K))}"
        typer.echo(serve_hint(model, thresholds=folder, target=target))
    if mode == "shadow":
        typer.echo(serve_hint(model, thresholds=folder, mode="shadow", shadow_values="off"))
