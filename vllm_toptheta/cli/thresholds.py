"""The commands `toptheta thresholds ...`: look at stores and check them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_toptheta.cli.quality import print_quality
from vllm_toptheta.cli.stores import ThresholdsOption
from vllm_toptheta.cli.terminal import print_error, print_table
from vllm_toptheta.errors import SettingsError, TopThetaError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.table import Table

    from vllm_toptheta.store import Evidence, Provenance, ShadowSection, ThresholdSection, ThresholdStore

TABLE_LENGTHS = (512, 2048)  # tokens; `show` adds the longest calibrated length

thresholds_app = typer.Typer(help="Look at calibrated thresholds and check them.", no_args_is_help=True)


@thresholds_app.command("list")
def list_thresholds(thresholds: ThresholdsOption = None) -> None:
    """List the thresholds that a model can be served with."""
    from rich.markup import escape
    from rich.table import Table

    from vllm_toptheta import store

    table = Table("folder", "model", "k", "lengths", "dense layers", "shadow keys", "quality")
    failed = False
    for folder in store.list_stores(thresholds=thresholds):
        try:
            manifest = store.load(folder).manifest
        except TopThetaError as error:
            failed = True
            print_error(error)
            continue
        table.add_row(
            escape(folder.name),
            manifest.model.id,
            ", ".join(map(str, manifest.target_ks)) or "none",
            "none" if manifest.calibration is None else f"up to {manifest.calibration.max_length}",
            ", ".join(map(str, manifest.dense_layers)) or "none",
            "none" if manifest.shadow is None else f"{manifest.shadow.num_channels} channels",
            "; ".join(f"{one.mode}: {one.served.text}" for one in manifest.quality or ()) or "none",
        )
    print_table(table)
    if failed:
        raise typer.Exit(2)


@thresholds_app.command("show")
def show_thresholds(
    store_or_model: Annotated[str, typer.Argument(metavar="FOLDER|MODEL", help="A store, or a model to look up.")],
    thresholds: ThresholdsOption = None,
    layer: Annotated[int | None, typer.Option(help="Layer of the table; default: the first that is not dense.")] = None,
    k: Annotated[int | None, typer.Option(help="Target k of the table; default: the largest calibrated.")] = None,
) -> None:
    """Summarise a store and print the thresholds of one layer, if it has any."""
    from vllm_toptheta import store

    named = Path(store_or_model)
    is_folder = named.joinpath("manifest.yaml").is_file()
    loaded = store.load(named if is_folder else store.resolve(store_or_model, thresholds=thresholds))
    table = _theta_table(loaded, layer, k) if loaded.calibrated or k else None
    typer.echo(_summary(loaded))
    for evidence in loaded.manifest.quality or ():
        print_quality(evidence)
        typer.echo(_measured(evidence))
    if table is not None:
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
            print_error(error)
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
        **(_thresholds(manifest.thresholds) if manifest.thresholds else {}),
        "shadow keys": _shadow(manifest.shadow),
        "calibrated": "nothing" if calibration is None else _calibrated(calibration),
        **({} if calibration is None else _origin(calibration)),
        "sha256": manifest.tensors.sha256,
    }
    return _lines(rows)


def _lines(rows: Mapping[str, object]) -> str:
    return "\n".join(f"{name + ':':<14}{value}" for name, value in rows.items())


def _origin(made: Provenance | Evidence) -> dict[str, str]:
    """Return what something was made from."""
    return {
        "text": ", ".join(text.name for text in made.text),
        "versions": ", ".join(f"{package} {version}" for package, version in made.versions.items()),
        "command": made.command,
    }


def _measured(evidence: Evidence) -> str:
    """Return what the figures of a mode depend on."""
    origin = _origin(evidence)
    origin["text"] = ", ".join(
        f"{text.name} (sha256 {text.sha256}, {text.num_tokens} tokens)" for text in evidence.text
    )
    weights = evidence.weights_sha256 or "unknown"
    return _lines(
        {
            "measured": f"{evidence.date}, {evidence.dtype}, quantization {evidence.quantization}, {evidence.device}",
            "weights": weights,
            **origin,
        }
    )


def _thresholds(section: ThresholdSection) -> dict[str, str]:
    """Return what calibrated thresholds cover."""
    return {
        "targets": "; ".join(f"{t.label} from {t.min_length} to {t.max_length} tokens" for t in section.targets),
        "dense layers": ", ".join(map(str, section.dense_layers)) or "none",
        "placement": section.placement,
        "polynomial": f"degree {section.degree} in ln n, from {section.num_buckets} length buckets",
    }


def _shadow(section: ShadowSection | None) -> str:
    """Return what mode `shadow` reads."""
    if section is None:
        return "none"
    return (
        f"{section.num_channels} channels, for weight_floor {section.weight_floor:g} from {section.min_length} to "
        f"{section.max_length} tokens; {section.candidate_share:.1%} of keys are candidates"
    )


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
    curve = store.curve(k or manifest.target_ks[-1])
    lengths = [n for n in TABLE_LENGTHS if curve.min_length <= n < curve.max_length] + [curve.max_length]
    dense = ", a dense layer" if layer in manifest.dense_layers else ""
    table = Table("head", *(f"n = {n}" for n in lengths), title=f"theta, layer {layer}{dense}, {curve.label}")
    for head, thetas in enumerate(curve.threshold(lengths)[:, layer].T):
        table.add_row(str(head), *(f"{theta:.3f}" for theta in thetas))
    return table
