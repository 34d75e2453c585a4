"""The command `toptheta serve`, and the reference of its configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

# vLLM's flags are none of our business: whatever we do not know is passed on
SERVE_SETTINGS = {"ignore_unknown_options": True}

config_app = typer.Typer(help="Describe the configuration.", no_args_is_help=True)


def serve(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL VLLM_FLAGS", help="A hub id or a directory, and flags of `vllm serve`."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML file with what follows and vLLM's flags.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Only check everything, and exit with 0 or 2.")] = False,
    device: Annotated[
        Literal["cpu", "gpu"] | None,
        typer.Option(help="What the check is for; without, what the installed vLLM is for."),
    ] = None,
    mode: Annotated[str | None, typer.Option(help="What is skipped: values, or shadow for keys too.")] = None,
    shadow_values: Annotated[
        str | None, typer.Option(help="on or off: copies of values too, in mode shadow; off needs a store.")
    ] = None,
    heavy: Annotated[
        float | None, typer.Option(help="Share of the anchors' weight from which on a key is read exactly.")
    ] = None,
    thresholds: Annotated[Path | None, typer.Option(help="A threshold store, or a directory of stores.")] = None,
    weight_floor: Annotated[
        float | None, typer.Option(help="Multiples of the average weight from which on no key is skipped; 0 is dense.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="Calibrated thresholds instead, as k:128.")] = None,
    compensation: Annotated[str | None, typer.Option(help="sdc+vmc, sdc or none.")] = None,
    dense_layers: Annotated[str | None, typer.Option(help="Layers that read everything, as 0,1.")] = None,
    min_context: Annotated[
        int | None, typer.Option(help="Tokens up to which a sequence stays dense; by default automatic.")
    ] = None,
    guard: Annotated[str | None, typer.Option(help="Where too much is lost: relax, warn or off.")] = None,
    max_lost_mass: Annotated[float | None, typer.Option(help="Share of the softmax that a token may lose.")] = None,
    guard_share: Annotated[float | None, typer.Option(help="Share of tokens that may lose too much.")] = None,
    always_shadow: Annotated[
        bool | None,
        typer.Option("--always-shadow/--no-always-shadow", help="Go by shadow keys also where that is slower."),
    ] = None,
    lossless: Annotated[
        bool | None,
        typer.Option(
            "--lossless/--no-lossless", help="Draft with thresholds, verify densely: dense attention's answers."
        ),
    ] = None,
    draft_tokens: Annotated[
        str | None, typer.Option(metavar="INTEGER|auto", help="With --lossless: tokens drafted at a time.")
    ] = None,
    per_request: Annotated[
        bool | None,
        typer.Option("--per-request/--no-per-request", help="Let requests ask for dense decoding or other floors."),
    ] = None,
    strict: Annotated[
        bool | None, typer.Option("--strict/--no-strict", help="Refuse to serve otherwise than toptheta tune measured.")
    ] = None,
    page: Annotated[bool | None, typer.Option("--page/--no-page", help="Show the page /toptheta.")] = None,
) -> None:
    """Check the thresholds against the model, print the plain `vllm serve` command, and become it."""
    from vllm_toptheta.server.command import ServeCommand
    from vllm_toptheta.server.config import ServerConfig

    options = {
        "mode": mode,
        "shadow_values": shadow_values,
        "heavy": heavy,
        "thresholds": None if thresholds is None else str(thresholds),
        "weight_floor": weight_floor,
        "target": target,
        "compensation": compensation,
        "dense_layers": dense_layers,
        "min_context": min_context,
        "guard": guard,
        "max_lost_mass": max_lost_mass,
        "guard_share": guard_share,
        "always_shadow": always_shadow,
        "lossless": lossless,
        "draft_tokens": draft_tokens,
        "per_request": per_request,
        "strict": strict,
        "page": page,
    }
    command = ServeCommand.build(
        arguments or [],
        {name: value for name, value in options.items() if value is not None},
        ServerConfig() if config is None else ServerConfig.load(config),
    )
    typer.echo(f"checked: {command.check(device)}", err=not check)
    if not check:
        typer.echo(command.text())
        command.become()


@config_app.command("docs")
def print_reference() -> None:
    """Print docs/configuration.md, made from the models that check the configuration."""
    from vllm_toptheta.server.reference import reference

    typer.echo(reference(), nl=False)
