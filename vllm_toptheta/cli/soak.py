"""The command `toptheta soak`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from vllm_toptheta.cli.eval_options import JsonOption, KeyOption
from vllm_toptheta.cli.terminal import print_table, write_json


def soak_command(
    command: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[-- COMMAND...]",
            help="Starts the server, here. Without it the one at --url is only asked: not measured, stopped or killed.",
        ),
    ] = None,
    url: Annotated[str, typer.Option(help="Where the server answers.")] = "http://127.0.0.1:8000",
    requests: Annotated[int, typer.Option(help="Requests at least.")] = 500,
    concurrency: Annotated[int, typer.Option(help="Requests in flight at a time.")] = 500,
    seconds: Annotated[float, typer.Option(help="How long the load lasts at least.")] = 600.0,
    warm_up: Annotated[
        float, typer.Option(min=0.0, max=0.9, help="Share of the load after which memory is measured.")
    ] = 0.25,
    prompts: Annotated[int, typer.Option(help="Different prompts; a quiet server answers each of them first.")] = 40,
    longest: Annotated[int, typer.Option(help="Tokens of the longest prompt; the shortest has 16.")] = 3000,
    max_tokens: Annotated[int, typer.Option(help="Tokens of the longest answer.")] = 48,
    choices: Annotated[
        str,
        typer.Option(
            help="By commas: what prompts ask for in vllm_xargs.toptheta, in turn after one without; or none."
        ),
    ] = "dense",
    seed: Annotated[int, typer.Option(help="Chooses prompts and who does what.")] = 0,
    rounding: Annotated[
        float, typer.Option(help="Nats by which rounding moves two candidates; 0.005 in float32, 0.35 in bfloat16.")
    ] = 0.005,
    max_growth: Annotated[float, typer.Option(help="MiB per minute by which memory may grow.")] = 2.0,
    restart: Annotated[bool, typer.Option(help="Stop the server by SIGTERM under load, and start it again.")] = True,
    keep_asking: Annotated[
        bool, typer.Option("--keep-asking", help="Also make requests while the server is being stopped.")
    ] = False,
    kill: Annotated[
        Literal["none", "EngineCore", "Worker"], typer.Option(help="SIGKILL this process under load, in the end.")
    ] = "none",
    log: Annotated[Path, typer.Option(help="What the server prints is appended here.")] = Path("soak.log"),
    api_key_env: KeyOption = "OPENAI_API_KEY",
    json: JsonOption = None,
) -> None:
    """Load a server for a while, and disturb it.

    Exit code 1 if a request is lost, a text is not that of the quiet server, memory grows, or the server ends badly.
    """
    import os

    from vllm_toptheta.soak.report import SoakConfig, soak_table
    from vllm_toptheta.soak.run import soak

    config = SoakConfig(
        requests=requests,
        concurrency=concurrency,
        seconds=seconds,
        warm_up=warm_up,
        prompts=prompts,
        longest=longest,
        max_tokens=max_tokens,
        choices=[] if choices == "none" else [choice.strip() for choice in choices.split(",")],
        seed=seed,
        rounding=rounding,
        max_growth=max_growth,
        restart=restart,
        keep_asking=keep_asking,
        kill=kill,
    )
    report = soak(
        config,
        url,
        command or [],
        log=log,
        api_key=os.environ.get(api_key_env),
        report_progress=lambda line: typer.echo(line, err=True),
    )
    print_table(soak_table(report))
    write_json(json, report)
    if report.failures():
        raise typer.Exit(1)
