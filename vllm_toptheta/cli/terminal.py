"""What the commands share: how options are read and tables are printed. Imports nothing heavy."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from vllm_toptheta.errors import SettingsError, TopThetaError

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.table import Table

__all__ = [
    "TEXT_FILES",
    "check_file",
    "check_folder",
    "integers",
    "numbers",
    "print_error",
    "print_table",
    "recorded_command",
    "words",
    "write_json",
]

# `--text *.py` hands over many files, of which click takes one as the option's value and the rest as extra arguments
TEXT_FILES = {"allow_extra_args": True}

_MAX_COMMAND = 8192  # characters, as many as a manifest takes


def integers(option: str, text: str) -> list[int]:
    """Return the whole numbers of an option such as 32,64,128.

    Raises:
        SettingsError: They are none.
    """
    try:
        return [int(part) for part in words(text)]
    except ValueError:
        raise SettingsError(f"not whole numbers: {text!r}", field=option, remedy="Write them as 32,64,128") from None


def numbers(option: str, text: str) -> list[float]:
    """Return the numbers of an option such as 1.5,3,6.

    Raises:
        SettingsError: They are none.
    """
    try:
        return [float(part) for part in words(text)]
    except ValueError:
        raise SettingsError(f"not numbers: {text!r}", field=option, remedy="Write them as 1.5,3,6") from None


def words(text: str) -> list[str]:
    """Return the parts of an option that are separated by commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def recorded_command(*paths: Path) -> str:
    """Return this process's command for a record, with bare names of files: where they lay is nobody's business.

    Args:
        paths: The files and folders that it names, also in the form NAME=FILE.
    """
    import shlex

    names = {str(path): path.name for path in paths}
    words = []
    for argument in sys.argv[1:]:
        name, separator, path = argument.rpartition("=")
        words.append(f"{name}{separator}{names.get(path, path)}")
    command = "".join(character if character.isprintable() else "?" for character in shlex.join(["toptheta", *words]))
    # thousands of files are named one by one in the record, and take more than a command may
    return command if len(command) <= _MAX_COMMAND else command[: _MAX_COMMAND - 3] + "..."


def print_table(table: Table) -> None:
    """Print a table on stdout."""
    from rich.console import Console

    # a pipe or a file has no width, and rich would squeeze the columns into 80 characters
    Console(width=None if sys.stdout.isatty() else 180).print(table)


def write_json(file: Path | None, report: BaseModel, *, field: str = "--json") -> None:
    """Write a report to a file, if there is one to write to, whole or not at all; its folder is made if need be.

    Args:
        file: Where to.
        report: What.
        field: The option that the file comes from.

    Raises:
        SettingsError: It cannot be written.
    """
    if file is None:
        return
    from vllm_toptheta.whole_file import write_whole

    try:
        write_whole(file, (report.model_dump_json(indent=1) + "\n").encode())
    except OSError as error:
        raise SettingsError(
            f"cannot be written: {error.strerror}",
            file=file,
            field=field,
            remedy="Name a file in a folder that you may write to, on a disk with room",
        ) from None


def check_file(parameter: typer.CallbackParam, file: Path | None) -> Path | None:
    """Refuse a file that could not be written, before anything is measured for it; a callback of typer.

    Raises:
        SettingsError: It is a folder, or lies where nothing may be written.
    """
    field = parameter.opts[0]
    if file is not None and file.is_dir():
        raise SettingsError("is a folder", file=file, field=field, remedy="Name a file in it")
    return file if file is None else _in_writable(file, field)


def check_folder(parameter: typer.CallbackParam, folder: Path | None) -> Path | None:
    """Likewise of a folder for files."""
    return folder if folder is None else _in_writable(folder / "file", parameter.opts[0]).parent


def _in_writable(file: Path, field: str) -> Path:
    parent = next(parent for parent in file.absolute().parents if parent.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        raise SettingsError("nothing may be written there", file=parent, field=field, remedy="Choose another folder")
    return file


def print_error(error: TopThetaError) -> None:
    """Print an error on stderr."""
    typer.echo(f"error: {error}", err=True)
