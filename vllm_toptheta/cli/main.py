"""What the command consists of: each group of commands has a module of its own.

Every command imports what it needs when it runs, so that `--help` answers at once and needs neither torch nor a GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from vllm_toptheta.cli.bench import bench_app
from vllm_toptheta.cli.calibrate import calibrate_command
from vllm_toptheta.cli.evaluate import eval_app
from vllm_toptheta.cli.evaluate_servers import evaluate_endpoints, evaluate_harness
from vllm_toptheta.cli.interrupts import interruptible
from vllm_toptheta.cli.report import report_command
from vllm_toptheta.cli.serve import SERVE_SETTINGS, config_app, serve
from vllm_toptheta.cli.soak import soak_command
from vllm_toptheta.cli.terminal import TEXT_FILES, print_error
from vllm_toptheta.cli.thresholds import thresholds_app
from vllm_toptheta.cli.tune import tune_command
from vllm_toptheta.errors import TopThetaError

app = typer.Typer(
    name="toptheta",
    help="Top-Theta attention for vLLM: read only the cached values that matter.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("serve", context_settings=SERVE_SETTINGS)(serve)
app.command("calibrate", context_settings=TEXT_FILES)(calibrate_command)
app.command("tune", context_settings=TEXT_FILES)(tune_command)
app.command("report", context_settings=TEXT_FILES)(report_command)
app.command("soak")(soak_command)
eval_app.command("endpoint", context_settings=TEXT_FILES)(evaluate_endpoints)
eval_app.command("lm-eval")(evaluate_harness)
app.add_typer(eval_app, name="eval")
app.add_typer(thresholds_app, name="thresholds")
app.add_typer(bench_app, name="bench")
app.add_typer(config_app, name="config")


def main() -> None:
    """Run the command; an error of ours is one line on stderr and exit code 2, and so is an interrupt with its code."""
    try:
        with interruptible():
            app()
    except TopThetaError as error:
        print_error(error)
        sys.exit(2)


@app.command("demo-model")
def make_demo_model(
    out: Annotated[Path | None, typer.Option(help="Where to; default: a cache folder.")] = None,
) -> None:
    """Make the demo model SmolLM2-135M-Instruct unless it is there, and print its directory."""
    from vllm_toptheta.demo_model import demo_model

    typer.echo(demo_model(out))
