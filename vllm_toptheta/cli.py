"""The command `toptheta`.

Every command imports what it needs when it runs, so that `--help` answers at once and needs neither torch nor a GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_toptheta import serve_cli
from vllm_toptheta.errors import SettingsError, TopThetaError

if TYPE_CHECKING:
    from rich.table import Table

    from vllm_toptheta.store import ThresholdStore

TABLE_LENGTHS = (512, 2048)  # tokens; `show` adds the longest calibrated length

app = typer.Typer(
    name="toptheta",
    help="Top-Theta attention for vLLM: read only the cached values that matter.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
thresholds_app = typer.Typer(help="Look at calibrated thresholds and check them.", no_args_is_help=True)
app.add_typer(thresholds_app, name="thresholds")
bench_app = typer.Typer(help="Measure speed against other backends.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")
app.add_typer(serve_cli.config_app, name="config")
app.command("serve", context_settings=serve_cli.SERVE_SETTINGS)(serve_cli.serve)

ThresholdsOption = Annotated[
    Path | None,
    typer.Option(help="A store or a directory of stores; default: TOPTHETA_THRESHOLDS, else the shipped ones."),
]


def main() -> None:
    """Run the command; an error of ours is one line on stderr and exit code 2."""
    try:
        app()
    except TopThetaError as error:
        _print_error(error)
        sys.exit(2)


# `--text *.py` hands over many files, of which click takes one as the option's value and the rest as extra arguments
_TEXT_FILES = {"allow_extra_args": True}


@app.command("calibrate", context_settings=_TEXT_FILES)
def calibrate_model(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="A Hugging Face model directory.")],
    text: Annotated[list[Path], typer.Option(metavar="FILE...", help="UTF-8 text files.")],
    out: Annotated[Path, typer.Option(help="Directory in which the folder <org>--<model> is written.")],
    k: Annotated[str, typer.Option(help="Keys per query head to keep, separated by commas.")] = "32,64,128,256",
    max_length: Annotated[int, typer.Option(help="Tokens of a sequence; thresholds are clamped beyond.")] = 4096,
    sequences: Annotated[int, typer.Option(help="Sequences to calibrate on.")] = 4,
    dense_layers: Annotated[str, typer.Option(help="Layers to serve dense, separated by commas.")] = "0,1",
    beta: Annotated[float, typer.Option(help="Standard deviations added to the mean threshold.")] = 0.0,
    top_k: Annotated[bool, typer.Option(help="Hand on exact top-k attention while calibrating.")] = True,
    seed: Annotated[int, typer.Option(help="Chooses the sequences out of the texts.")] = 0,
    model_id: Annotated[
        str | None, typer.Option(help="Hub id (org/name) to record; default: the folder's name.")
    ] = None,
) -> None:
    """Calibrate thresholds for a model on texts and write them as a store."""
    from vllm_toptheta.calibration import calibrate

    texts = [*text, *map(Path, context.args)]
    folder = calibrate(
        model,
        texts,
        out=out,
        target_ks=_integers("--k", k),
        max_length=max_length,
        num_sequences=sequences,
        seed=seed,
        beta=beta,
        top_k_at_calibration=top_k,
        dense_layers=_integers("--dense-layers", dense_layers),
        model_id=model_id,
        command=_command_line([model, out, *texts]),
    )
    typer.echo(f"wrote {folder}")
    typer.echo(f"serve it: TOPTHETA_THRESHOLDS={out} vllm serve {model} --attention-backend toptheta")


@app.command("eval", context_settings=_TEXT_FILES)
def evaluate_model(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="A Hugging Face model directory.")],
    text: Annotated[list[Path], typer.Option(metavar="FILE...", help="UTF-8 text files not calibrated on.")],
    k: Annotated[str, typer.Option(help="Target ks to compare, separated by commas.")] = "64,128",
    sequences: Annotated[int, typer.Option(help="Sequences to evaluate on.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 2048,
    denominator: Annotated[str, typer.Option(help="Softmax denominator: none, exact or exp_threshold.")] = "exact",
    value_mean: Annotated[bool, typer.Option(help="Give the lost mass the mean value.")] = True,
    seed: Annotated[int, typer.Option(help="Chooses the sequences out of the texts.")] = 0,
    thresholds: ThresholdsOption = None,
    json: Annotated[Path | None, typer.Option(help="Also write the report to this file.")] = None,
) -> None:
    """Compare Top-Theta with dense attention on texts: perplexity, KL and agreement, with paired standard errors."""
    from vllm_toptheta import store
    from vllm_toptheta.evaluation import evaluate, quality_table
    from vllm_toptheta.reference import Compensation

    if denominator not in ("none", "exact", "exp_threshold"):
        raise SettingsError(
            f"unknown value {denominator!r}", field="--denominator", remedy="Choose none, exact or exp_threshold"
        )
    report = evaluate(
        model,
        [*text, *map(Path, context.args)],
        store.load(store.resolve(str(model), thresholds=thresholds)),
        target_ks=_integers("--k", k),
        length=length,
        num_sequences=sequences,
        seed=seed,
        compensation=Compensation(denominator, value_mean),  # type: ignore[arg-type]  # checked above
    )
    _print_table(quality_table(report))
    if json is not None:
        json.write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")


@app.command("demo-model")
def make_demo_model(
    out: Annotated[Path | None, typer.Option(help="Where to; default: a cache folder.")] = None,
) -> None:
    """Make the demo model SmolLM2-135M-Instruct unless it is there, and print its directory."""
    from vllm_toptheta.demo_model import demo_model

    typer.echo(demo_model(out))


@bench_app.command("kernels")
def bench_kernels(
    specs: Annotated[
        str | None, typer.Option(help="Batches in vLLM's grammar, separated by commas: 32q1s32k is 32 requests of 32K.")
    ] = None,
    k: Annotated[int, typer.Option(help="Survivors of a head, on average.")] = 128,
    block_size: Annotated[int, typer.Option(help="Tokens of a page.")] = 16,
    json: Annotated[Path | None, typer.Option(help="Also write the report to this file.")] = None,
) -> None:
    """Time of the decode kernel beside FlashAttention and others, on random data; needs an NVIDIA GPU."""
    from vllm_toptheta.benchmarks.kernels import DEFAULT_SPECS, KernelWorkload, compare, kernel_table

    batches = list(DEFAULT_SPECS) if specs is None else specs.split(",")
    workload = KernelWorkload(specs=batches, block_size=block_size, target_k=k)
    report = compare(workload, report_progress=lambda line: typer.echo(line, err=True))
    _print_table(kernel_table(report))
    if json is not None:
        json.write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")


@bench_app.command("tune")
def bench_tune(
    head_size: Annotated[int, typer.Option(help="Channels of a head.")] = 128,
    kv_dtype: Annotated[str, typer.Option(help="bfloat16 or float8_e4m3fn.")] = "bfloat16",
    specs: Annotated[str, typer.Option(help="Batches to be fast on, as for `bench kernels`.")] = "16q1s16k,1q1s32k",
    write: Annotated[bool, typer.Option(help="Write the best into the table that serving uses.")] = False,
) -> None:
    """Search launch parameters of the decode kernel for one head size and cache dtype; needs an NVIDIA GPU."""
    from vllm_toptheta.benchmarks.kernels import KernelWorkload, tune
    from vllm_toptheta.kernels.tuning import save_entry

    workload = KernelWorkload(specs=specs.split(","), head_size=head_size, kv_dtype=kv_dtype)
    card, best = tune(workload, report_progress=lambda line: typer.echo(line, err=True))
    typer.echo(best)
    if write:
        save_entry(head_size, 1 if kv_dtype.startswith("float8") else 2, card, best)


@bench_app.command("quality", context_settings=_TEXT_FILES)
def bench_quality(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="A Hugging Face model directory.")],
    text: Annotated[list[Path], typer.Option(metavar="FILE...", help="UTF-8 text files not calibrated on.")],
    k: Annotated[str, typer.Option(help="Target ks to compare, separated by commas.")] = "64,128",
    sequences: Annotated[int, typer.Option(help="Sequences to evaluate on.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 2048,
    seed: Annotated[int, typer.Option(help="Chooses the sequences out of the texts.")] = 0,
    thresholds: ThresholdsOption = None,
    json: Annotated[Path | None, typer.Option(help="Also write the report to this file.")] = None,
) -> None:
    """Perplexity of a real model on the decode kernel, beside the reference's and dense; needs an NVIDIA GPU."""
    from vllm_toptheta import store
    from vllm_toptheta.benchmarks.quality import kernel_quality_table, measure

    report = measure(
        model,
        [*text, *map(Path, context.args)],
        store.load(store.resolve(str(model), thresholds=thresholds)),
        target_ks=_integers("--k", k),
        length=length,
        num_sequences=sequences,
        seed=seed,
    )
    _print_table(kernel_quality_table(report))
    if json is not None:
        json.write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")


@bench_app.command("serving")
def bench_serving(
    model: Annotated[str, typer.Argument(help="A model that vLLM can load.")],
    context: Annotated[int, typer.Option(help="Prompt tokens of a request.")] = 3900,
    output_tokens: Annotated[int, typer.Option(help="Tokens generated per request.")] = 64,
    batch_size: Annotated[int, typer.Option(help="Requests at a time.")] = 1,
    repeats: Annotated[int, typer.Option(help="Measured batches per engine.")] = 3,
    rounds: Annotated[int, typer.Option(help="Engines per backend, alternating.")] = 2,
    backends: Annotated[str, typer.Option(help="Backends; the others are measured against the first.")] = (
        "CPU_ATTN,TOPTHETA"
    ),
    dtype: Annotated[str, typer.Option(help="As vLLM's --dtype.")] = "auto",
    compile: Annotated[bool, typer.Option(help="Let vLLM compile the model.")] = False,
    k: Annotated[int | None, typer.Option(help="Target k; default: the backend's.")] = None,
    random_rows: Annotated[
        int | None,
        typer.Option(help="Random weights of Llama-3.1-8B's shape instead of MODEL; value rows that a kv head reads."),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the report to this file.")] = None,
) -> None:
    """Time per output token of whole engines, one backend against the other in one run."""
    import os
    import tempfile
    from contextlib import ExitStack

    from vllm_toptheta.benchmarks.dummy import TARGET_K, write_model
    from vllm_toptheta.benchmarks.serving import ServingWorkload, compare, serving_table

    with ExitStack() as stack:
        if random_rows is not None:
            scratch = stack.enter_context(tempfile.TemporaryDirectory())
            folder, thresholds = write_model(Path(scratch), name=model)
            model, k = str(folder), TARGET_K
            # the thresholds are set on the running engine, by functions sent to its workers
            os.environ.update(TOPTHETA_THRESHOLDS=str(thresholds), VLLM_ALLOW_INSECURE_SERIALIZATION="1")
        workload = ServingWorkload(
            random_rows=random_rows,
            model=model,
            context=context,
            output_tokens=output_tokens,
            batch_size=batch_size,
            repeats=repeats,
            dtype=dtype,
            enforce_eager=not compile,
            options={} if k is None else {"target_k": k},
        )
        report = compare(workload, backends.split(","), rounds)
    _print_table(serving_table(report))
    if json is not None:
        json.write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")


@thresholds_app.command("list")
def list_thresholds(thresholds: ThresholdsOption = None) -> None:
    """List the thresholds that a model can be served with."""
    from rich.markup import escape
    from rich.table import Table

    from vllm_toptheta import store

    table = Table("folder", "model", "k", "lengths", "dense layers")
    failed = False
    for folder in store.list_stores(thresholds=thresholds):
        try:
            manifest = store.load(folder).manifest
        except TopThetaError as error:
            failed = True
            _print_error(error)
            continue
        table.add_row(
            escape(folder.name),
            manifest.model.id,
            ", ".join(map(str, manifest.target_ks)),
            f"{manifest.targets[0].min_length} to {max(target.max_length for target in manifest.targets)}",
            ", ".join(map(str, manifest.dense_layers)) or "none",
        )
    _print_table(table)
    if failed:
        raise typer.Exit(2)


@thresholds_app.command("show")
def show_thresholds(
    store_or_model: Annotated[str, typer.Argument(metavar="FOLDER|MODEL", help="A store, or a model to look up.")],
    thresholds: ThresholdsOption = None,
    layer: Annotated[int | None, typer.Option(help="Layer of the table; default: the first that is not dense.")] = None,
    k: Annotated[int | None, typer.Option(help="Target k of the table; default: the largest calibrated.")] = None,
) -> None:
    """Summarise a store and print the thresholds of one layer."""
    from vllm_toptheta import store

    named = Path(store_or_model)
    is_folder = named.joinpath("manifest.yaml").is_file()
    loaded = store.load(named if is_folder else store.resolve(store_or_model, thresholds=thresholds))
    table = _theta_table(loaded, layer, k)
    typer.echo(_summary(loaded))
    _print_table(table)


@thresholds_app.command("validate")
def validate_thresholds(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="Stores to check.")],
    model: Annotated[Path | None, typer.Option(help="A Hugging Face model directory that the stores must fit.")] = None,
) -> None:
    """Check every byte of the stores; exit with 2 if one fails."""
    from vllm_toptheta import store

    architecture = None if model is None else store.read_architecture(model)
    failed = False
    for folder in folders:
        try:
            manifest = store.load(folder).manifest
            if architecture is not None:
                manifest.architecture.check(architecture, file=folder / "manifest.yaml")
        except TopThetaError as error:
            failed = True
            _print_error(error)
        else:
            typer.echo(f"valid: {folder}")
    if failed:
        raise typer.Exit(2)


def _summary(store: ThresholdStore) -> str:
    manifest = store.manifest
    architecture, calibration = manifest.architecture, manifest.calibration
    rope = ", ".join(f"{name} {value}" for name, value in architecture.rope.items())
    rows = {
        "folder": store.folder,
        "model": manifest.model.id,
        "architecture": f"{architecture.num_layers} layers, {architecture.num_heads} query heads, "
        f"{architecture.num_kv_heads} kv heads, head size {architecture.head_size}",
        "rope": rope,
        "targets": "; ".join(f"k {t.k}: {t.min_length} to {t.max_length} tokens" for t in manifest.targets),
        "dense layers": ", ".join(map(str, manifest.dense_layers)) or "none",
        "placement": manifest.placement,
        "polynomial": f"degree {manifest.degree} in ln n, from {manifest.num_buckets} length buckets",
        "calibrated": f"{calibration.date}, {calibration.num_sequences} sequences of at most {calibration.max_length} "
        f"tokens, seed {calibration.seed}, beta {calibration.beta:g}, "
        f"top-k at calibration {'on' if calibration.top_k_at_calibration else 'off'}",
        "text": ", ".join(text.name for text in calibration.text),
        "versions": ", ".join(f"{package} {version}" for package, version in calibration.versions.items()),
        "command": calibration.command,
        "sha256": manifest.tensors.sha256,
    }
    return "\n".join(f"{name + ':':<14}{value}" for name, value in rows.items())


def _theta_table(store: ThresholdStore, layer: int | None, k: int | None) -> Table:
    """Return a table of theta: a row per head, a column per length."""
    from rich.table import Table

    manifest = store.manifest
    layers = range(manifest.architecture.num_layers)
    if layer is None:
        layer = next((index for index in layers if index not in manifest.dense_layers), 0)
    if layer not in layers:
        raise SettingsError(
            f"no layer {layer}", file=store.folder, field="--layer", remedy=f"Choose one from 0 to {layers[-1]}"
        )
    curve = store.curve(manifest.target_ks[-1] if k is None else k)
    lengths = [n for n in TABLE_LENGTHS if curve.min_length <= n < curve.max_length] + [curve.max_length]
    dense = ", a dense layer" if layer in manifest.dense_layers else ""
    table = Table("head", *(f"n = {n}" for n in lengths), title=f"theta, layer {layer}{dense}, k = {curve.target_k}")
    for head, thetas in enumerate(curve.threshold(lengths)[:, layer].T):
        table.add_row(str(head), *(f"{theta:.3f}" for theta in thetas))
    return table


def _print_table(table: Table) -> None:
    from rich.console import Console

    # a pipe or a file has no width, and rich would squeeze the columns into 80 characters
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def _print_error(error: TopThetaError) -> None:
    typer.echo(f"error: {error}", err=True)


def _integers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise SettingsError(f"not whole numbers: {text!r}", field=option, remedy="Write them as 32,64,128") from None


def _command_line(paths: list[Path]) -> str:
    """This process's command, with files by their bare names: where they lay is nobody's business."""
    import shlex

    names = {str(path): path.name for path in paths}
    return shlex.join(["toptheta", *(names.get(argument, argument) for argument in sys.argv[1:])])
