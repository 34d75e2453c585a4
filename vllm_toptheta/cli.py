"""The command `toptheta`.

Every command imports what it needs when it runs, so that `--help` answers at once and needs neither torch nor a GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_toptheta.calibrate_cli import calibrate_command
from vllm_toptheta.errors import SettingsError, TopThetaError
from vllm_toptheta.eval_cli import eval_app
from vllm_toptheta.interchange_cli import export_command, import_command
from vllm_toptheta.report_cli import report_command
from vllm_toptheta.terminal import print_table, write_json

if TYPE_CHECKING:
    from rich.table import Table

    from vllm_toptheta.store import Provenance, ThresholdStore

TABLE_LENGTHS = (512, 2048)  # tokens; `show` adds the longest calibrated length

app = typer.Typer(
    name="toptheta",
    help="Top-Theta attention for vLLM: read only the cached values that matter.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
thresholds_app = typer.Typer(
    help="Look at calibrated thresholds, check them, import and export them.", no_args_is_help=True
)
app.add_typer(thresholds_app, name="thresholds")
app.add_typer(eval_app, name="eval")
bench_app = typer.Typer(help="Measure speed against other backends.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")

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

app.command("calibrate", context_settings=_TEXT_FILES)(calibrate_command)
app.command("report", context_settings=_TEXT_FILES)(report_command)
thresholds_app.command("import", context_settings=_TEXT_FILES)(import_command)
thresholds_app.command("export", context_settings=_TEXT_FILES)(export_command)


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
    print_table(kernel_table(report))
    write_json(json, report)


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

    from vllm_toptheta.benchmarks.dummy import TARGET_K, write_model
    from vllm_toptheta.benchmarks.serving import ServingWorkload, compare, serving_table

    if random_rows is not None:
        folder, thresholds = write_model(Path(tempfile.mkdtemp()), name=model)
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
    print_table(serving_table(report))
    write_json(json, report)


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
            ", ".join(label.removeprefix("k:") for label in manifest.labels),
            f"{manifest.targets[0].min_length} to {max(target.max_length for target in manifest.targets)}",
            ", ".join(map(str, manifest.dense_layers)) or "none",
        )
    print_table(table)
    if failed:
        raise typer.Exit(2)


@thresholds_app.command("show")
def show_thresholds(
    store_or_model: Annotated[str, typer.Argument(metavar="FOLDER|MODEL", help="A store, or a model to look up.")],
    thresholds: ThresholdsOption = None,
    layer: Annotated[int | None, typer.Option(help="Layer of the table; default: the first that is not dense.")] = None,
    k: Annotated[int | None, typer.Option(help="Target k of the table; short for --target.")] = None,
    target: Annotated[str | None, typer.Option(help="Target of the table; default: the largest calibrated k.")] = None,
) -> None:
    """Summarise a store and print the thresholds of one layer."""
    from vllm_toptheta import store

    named = Path(store_or_model)
    is_folder = named.joinpath("manifest.yaml").is_file()
    loaded = store.load(named if is_folder else store.resolve(store_or_model, thresholds=thresholds))
    table = _theta_table(loaded, layer, target if k is None else f"k:{k}")
    typer.echo(_summary(loaded))
    print_table(table)


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
        "targets": "; ".join(f"{t.label} from {t.min_length} to {t.max_length} tokens" for t in manifest.targets),
        "expected": _expected(store),
        "dense layers": ", ".join(map(str, manifest.dense_layers)) or "none",
        "placement": manifest.placement,
        "polynomial": f"degree {manifest.degree} in ln n, from {manifest.num_buckets} length buckets",
        "calibrated": _calibrated(calibration),
        "text": ", ".join(text.name for text in calibration.text),
        "versions": ", ".join(f"{package} {version}" for package, version in calibration.versions.items()),
        "command": calibration.command,
        "sha256": manifest.tensors.sha256,
    }
    return "\n".join(f"{name + ':':<14}{value}" for name, value in rows.items())


def _expected(store: ThresholdStore) -> str:
    """Return what the thresholds keep and lose at the longest calibrated length, over heads of the sparse layers."""
    manifest = store.manifest
    if store.expectations is None:
        return "not measured"
    sparse = [layer for layer in range(manifest.architecture.num_layers) if layer not in manifest.dense_layers]
    texts = []
    for target in manifest.targets:
        curve = store.curve_of(target.label)
        survivors = curve.expected("survivors_mean", target.max_length)[sparse].mean()
        lost_mass = curve.expected("lost_mass_mean", target.max_length)[sparse].mean()
        texts.append(f"{target.label}: {survivors:.0f} survivors, {lost_mass:.3f} of the mass lost")
    return "; ".join(texts)


def _calibrated(calibration: Provenance) -> str:
    """Return how the thresholds were made, without what an imported file did not say."""
    known = {
        f"{calibration.num_sequences} sequences": calibration.num_sequences,
        f"at most {calibration.max_length} tokens": calibration.max_length,
        f"seed {calibration.seed}": calibration.seed,
        f"beta {calibration.beta}": calibration.beta,
        f"top-k at calibration {'on' if calibration.top_k_at_calibration else 'off'}": calibration.top_k_at_calibration,
    }
    return ", ".join([str(calibration.date), *(text for text, value in known.items() if value is not None)])


def _theta_table(store: ThresholdStore, layer: int | None, target: str | None) -> Table:
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
    largest = f"k:{manifest.target_ks[-1]}" if manifest.target_ks else manifest.labels[0]
    curve = store.curve_of(target or largest)
    lengths = [n for n in TABLE_LENGTHS if curve.min_length <= n < curve.max_length] + [curve.max_length]
    dense = ", a dense layer" if layer in manifest.dense_layers else ""
    table = Table("head", *(f"n = {n}" for n in lengths), title=f"theta, layer {layer}{dense}, {curve.label}")
    for head, thetas in enumerate(curve.threshold(lengths)[:, layer].T):
        table.add_row(str(head), *(f"{theta:.3f}" for theta in thetas))
    return table


def _print_error(error: TopThetaError) -> None:
    typer.echo(f"error: {error}", err=True)
