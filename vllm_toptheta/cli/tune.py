"""The command `toptheta tune`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vllm_toptheta.cli import eval_options as options
from vllm_toptheta.cli.hints import serve_hint
from vllm_toptheta.cli.quality import print_quality
from vllm_toptheta.cli.terminal import integers, numbers, print_table, recorded_command, words, write_json
from vllm_toptheta.errors import EvaluationError, PromiseNotKept

if TYPE_CHECKING:
    from vllm_toptheta.evaluation import TuneOptions
    from vllm_toptheta.evaluation.subject import DecodedSubject

__all__ = ["tune_command"]


def tune_command(
    context: typer.Context,
    model: options.ModelArgument,
    max_loss: Annotated[
        float | None, typer.Option(help="Change of perplexity that is promised at most, percent; 0.5 if nothing is.")
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="KL divergence from dense attention that is promised at most, nats per token.")
    ] = None,
    presets: Annotated[
        bool,
        typer.Option("--presets", help="Also floors that requests can name: high (0.2 %), exact (0.05 %), fast (1 %)."),
    ] = False,
    text: options.TextOption = None,
    lengths: Annotated[str, typer.Option(help="Tokens of the sequences, by commas.")] = "2048,8192",
    mode: Annotated[
        Literal["values", "shadow"], typer.Option(help="What is skipped; shadow is by copies of keys and values.")
    ] = "values",
    heavy: Annotated[
        float | None,
        typer.Option(help="In mode shadow, what a key must weigh to be read exactly, over its row's anchors."),
    ] = None,
    sequences: Annotated[
        int, typer.Option(help="Sequences to confirm on, after half as many others to choose on, 4 at least.")
    ] = 8,
    window: Annotated[
        int, typer.Option(help="Tokens at the end of each that are decoded; the others are read densely.")
    ] = 256,
    floors: Annotated[str | None, typer.Option(help="Weight floors to try, ascending; default: 0.1 to 4.5.")] = None,
    equal_rows: Annotated[
        str, typer.Option(help="Floors by commas: also exact top-k that reads as many value rows, to compare with.")
    ] = "",
    out: Annotated[
        Path, typer.Option(help="Directory of stores: that of the model, <org>--<model>, is amended or made.")
    ] = Path("thresholds"),
    tasks: Annotated[
        str,
        typer.Option(
            help="Also try the floors that are kept on these, by commas: needle, key-value. Shown, not promised."
        ),
    ] = "",
    questions: Annotated[
        int | None, typer.Option(help="With --tasks: questions of each task at each length; default: 20.")
    ] = None,
    seed: options.SeedOption = 0,
    engine: Annotated[
        Literal["transformers", "vllm"],
        typer.Option(help="What runs the model; vllm runs it as it is served: quantised, or spread over GPUs."),
    ] = "transformers",
    engine_args: Annotated[
        str, typer.Option(help="With --engine vllm: flags of vllm serve, as in '--tensor-parallel-size 2'.")
    ] = "",
    device: Annotated[
        str, typer.Option(help="Of --engine transformers: cpu, cuda, cuda:1...; auto is a GPU where there is one.")
    ] = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="Of weights and activations; auto is what vLLM serves. Attention is float32 whatever it is."),
    ] = "auto",
    resume: Annotated[bool, typer.Option(help="Go on where the same command was interrupted.")] = True,
    model_id: Annotated[
        str | None, typer.Option(help="Hub id (org/name) to record; default: the folder's name.")
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(help="Also write all that was measured to this file; it lies beside the store anyway."),
    ] = None,
) -> None:
    """Find the largest weight floor that loses less than promised, and write it with the evidence into the store."""
    import shutil

    from vllm_toptheta import store
    from vllm_toptheta.calibration.data import read_text
    from vllm_toptheta.calibration.run import model_identity
    from vllm_toptheta.evaluation import (
        FLOORS,
        Goal,
        ProbeOptions,
        Probes,
        Subject,
        TuneOptions,
        decode_table,
        named_paths,
        tune_floors,
        tuned_file,
    )
    from vllm_toptheta.limits import DEFAULT_HEAVY

    if engine_args and engine != "vllm":
        raise EvaluationError("flags of vllm serve are for --engine vllm", field="--engine-args", remedy="Leave it out")
    if device != "auto" and engine == "vllm":
        raise EvaluationError(
            "vLLM runs on the device that it was built for", field="--device", remedy="Leave it out with --engine vllm"
        )
    asked = words(tasks)
    if asked and engine == "vllm":
        raise EvaluationError(
            "--engine vllm measures windows of texts only, and answers no questions",
            field="--tasks",
            remedy="Leave --tasks out, or measure with --engine transformers; toptheta eval endpoint asks servers",
        )
    if questions is not None and not asked:
        raise EvaluationError("there are no questions without --tasks", field="--questions", remedy="Leave it out")
    if heavy is not None and mode != "shadow":
        raise EvaluationError("keys are heavy in mode shadow only", field="--heavy", remedy="Leave it out")
    goals = [Goal(max_loss, max_kl)] if max_loss is not None or max_kl is not None else []
    if presets:
        goals += [Goal(max_loss=store.PRESETS[name], preset=name) for name in ("high", "exact", "fast")]
    files = named_paths([*(text or []), *context.args], field="--text", default="text")
    if not files:
        raise EvaluationError("nothing to measure on", field="--text", remedy="Give UTF-8 text files that are held out")
    identity = model_identity(model, model_id)
    folder = out / store.folder_name(identity.id)
    state = out / f".{folder.name}.tune-{mode}"
    if not resume:
        shutil.rmtree(state, ignore_errors=True)
    wanted = TuneOptions(
        goals=tuple(goals or [Goal(max_loss=0.5)]),
        lengths=tuple(integers("--lengths", lengths)),
        num_sequences=sequences,
        window=window,
        floors=FLOORS if floors is None else tuple(numbers("--floors", floors)),
        heavy=None if mode == "values" else DEFAULT_HEAVY if heavy is None else heavy,
        equal_rows=tuple(numbers("--equal-rows", equal_rows)),
        seed=seed,
    )
    content = [read_text(file) for paths in files.values() for file in paths]
    probes = None
    subject: DecodedSubject
    if engine == "vllm":
        subject = _served(model, wanted, f"--dtype {dtype} {engine_args}")
    else:
        subject = local = Subject(model, {}, device=device, dtype=dtype)
        if asked:
            # before anything is measured: what cannot be asked is said first
            number = ProbeOptions.num_questions if questions is None else questions
            probes = Probes(local, content, ProbeOptions(tuple(asked), wanted.lengths, number, seed))
    try:
        found = tune_floors(
            subject,
            content,
            wanted,
            command=recorded_command(
                model, out, *([json] if json else []), *(file for paths in files.values() for file in paths)
            ),
            folder=state,
            show=lambda report: print_table(decode_table(report)),
        )
    except PromiseNotKept:
        # nothing is left to go on with, and the next command will ask for something else
        shutil.rmtree(state)
        raise
    if probes is not None:
        probed = probes.measure(found.evidence, folder=state / "probing")
        found = found.model_copy(update={"evidence": probed})
    # before the store: what cannot be written is said while the measurements can still be gone on with
    write_json(json, found)
    record = tuned_file(folder, mode)
    write_json(record, found, field="--out")
    store.record_quality(folder, found.evidence, model=identity, architecture=subject.architecture)
    shutil.rmtree(state)
    print_quality(found.evidence)
    typer.echo(f"{found.evidence.line}; floor:{found.evidence.served.weight_floor:g}")
    if found.evidence.served.weight_floor == wanted.floors[-1]:
        typer.echo("that is the largest floor that was tried: larger ones (--floors) may keep the promise too")
    typer.echo(f"wrote {folder} and {record.name}; peak memory {_peak_memory(subject.device.type)}")
    typer.echo(f"draw it: toptheta report {folder} --out report.html")
    copies = {} if mode == "values" else {"mode": "shadow", "shadow_values": "on", "heavy": found.evidence.heavy}
    typer.echo(serve_hint(model, thresholds=folder, **copies))


def _served(model: Path, wanted: TuneOptions, engine_args: str) -> DecodedSubject:
    from importlib.util import find_spec

    if find_spec("vllm") is None:
        raise EvaluationError("vLLM is not installed", field="--engine", remedy="Install it, or use transformers")
    from vllm_toptheta.engine import EngineSubject

    return EngineSubject(model, max_length=max(wanted.lengths), window=wanted.window, engine_args=engine_args)


def _peak_memory(device: str) -> str:
    """The most memory that this process has held, on the host and on a GPU."""
    import resource

    # kilobytes on Linux, bytes on macOS
    scale = 1 if sys.platform == "darwin" else 1024
    host = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**30:.2f} GiB"
    if device != "cuda":
        return host
    import torch

    return f"{host}, on the GPU {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"
