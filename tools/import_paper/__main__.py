"""Makes a store of a th.txt, the thresholds that the paper's own code calibrated.

    python -m tools.import_paper th.txt --model MODEL_DIR --placement pre_softmax --out thresholds

Through the thresholds of every layer and head goes the curve that our own calibration fits. What the file does not say
is left out of the manifest: texts, seed, beta and top-k at calibration, the spread between rows (`score_std` is 0), and
what the thresholds keep and lose. Its survivors exceed the threshold, ours reach it: they differ at exact ties only.
"""

import datetime
import hashlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from pydantic import ValidationError

from tools.import_paper.grid import ThresholdGrid, read_grid
from tools.import_paper.lines import PaperFileError
from vllm_toptheta import store
from vllm_toptheta.calibration.fit import fit_curves
from vllm_toptheta.calibration.run import default_model_id, package_versions
from vllm_toptheta.calibration.sampling import NUM_BUCKETS, bucket_of, length_buckets
from vllm_toptheta.calibration.thresholds import DEGREE
from vllm_toptheta.cli.terminal import integers, print_error
from vllm_toptheta.errors import TopThetaError
from vllm_toptheta.reference import Placement
from vllm_toptheta.store.schema import describe

__all__ = ["import_paper", "main"]


def import_paper(
    file: Path,
    model: Path,
    *,
    placement: Placement,
    out: Path,
    dense_layers: Sequence[int] = (),
    model_id: str | None = None,
    command: str = "tools.import_paper",
) -> Path:
    """Makes a store of a th.txt.

    Args:
        file: the th.txt.
        model: directory of the model that it was calibrated on; only config.json is read.
        placement: what the thresholds apply to; the file does not say it.
        out: folder in which the store's folder `<org>--<model>` is written.
        dense_layers: layers to serve dense, besides those without thresholds for the ks of most layers.
        model_id: hub id (org/name) to record; None for `default_model_id`.
        command: command line to record.

    Returns:
        The folder written.

    Raises:
        PaperFileError: a line is wrong, a threshold is missing, or an option cannot be.
        ModelConfigError: the model directory has no usable config.json.
        StoreError: the store cannot be written.
    """
    architecture = store.read_architecture(model)
    grid = read_grid(file, architecture, placement)
    data = file.read_bytes()
    filled = [grid.lengths[counts > 0] for counts in grid.row_count]
    edges = length_buckets(int(grid.lengths[0]), int(grid.lengths[-1]), NUM_BUCKETS)
    try:
        draft = store.ManifestDraft(
            model=store.ModelIdentity(id=model_id or default_model_id(model)),
            architecture=architecture,
            thresholds=store.ThresholdSection(
                targets=tuple(
                    store.Target(k=k, min_length=int(lengths[0]), max_length=int(lengths[-1]))
                    for k, lengths in zip(grid.target_ks, filled, strict=True)
                ),
                dense_layers=tuple(sorted({*grid.dense_layers, *dense_layers})),
                placement=placement,
                degree=DEGREE,
                num_buckets=len(edges) - 1,
            ),
            calibration=store.Provenance(
                text=(
                    store.TextSource(name=file.name, sha256=hashlib.sha256(data).hexdigest(), num_characters=len(data)),
                ),
                max_length=int(grid.lengths[-1]),
                versions=package_versions(),
                command=command,
                date=datetime.datetime.now(datetime.UTC).date(),
            ),
        )
    except ValidationError as error:
        field, message = describe(error)
        raise PaperFileError(message, field=field) from None
    folder = out / store.folder_name(draft.model.id)
    store.save(folder, draft, _tensors(grid, edges))
    return folder


def _tensors(grid: ThresholdGrid, edges: NDArray[np.int32]) -> dict[str, NDArray[Any]]:
    membership = bucket_of(grid.lengths, edges)[:, None] == np.arange(len(edges) - 1)
    row_count = grid.row_count @ membership
    score_mean = (grid.thresholds * grid.row_count) @ membership / np.maximum(row_count, 1)
    log_length = np.broadcast_to(np.log(grid.lengths), grid.row_count.shape)
    return {
        "coefficients": fit_curves(log_length, grid.row_count, grid.thresholds, degree=DEGREE),
        "bucket_edges": edges,
        "row_count": row_count,
        "score_mean": score_mean.astype(np.float32),
        "score_std": np.zeros_like(score_mean, np.float32),
    }


def _command(
    file: Annotated[Path, typer.Argument(metavar="TH_TXT", help="A th.txt of the paper's code.")],
    model: Annotated[Path, typer.Option(help="Directory of the model that it was calibrated on.")],
    placement: Annotated[
        Placement, typer.Option(help="What the thresholds apply to: scores or probabilities; the file does not say.")
    ],
    out: Annotated[Path, typer.Option(help="Directory in which the folder <org>--<model> is written.")],
    dense_layers: Annotated[str, typer.Option(help="Layers to serve dense, separated by commas.")] = "",
    model_id: Annotated[
        str | None, typer.Option(help="Hub id (org/name) to record; default: the folder's name.")
    ] = None,
) -> None:
    """Make a store of thresholds that the paper's own code calibrated."""
    # files by their bare names: where they lay is nobody's business
    names = {str(path): path.name for path in (file, model, out)}
    folder = import_paper(
        file,
        model,
        placement=placement,
        out=out,
        dense_layers=integers("--dense-layers", dense_layers),
        model_id=model_id,
        command=shlex.join(["tools.import_paper", *(names.get(argument, argument) for argument in sys.argv[1:])]),
    )
    typer.echo(f"wrote {folder}")


def main() -> None:
    """Run the command; an error of ours is one line on stderr and exit code 2."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(_command)
    try:
        app()
    except TopThetaError as error:
        print_error(error)
        sys.exit(2)


if __name__ == "__main__":
    main()
