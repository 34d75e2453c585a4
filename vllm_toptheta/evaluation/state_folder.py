"""A folder that keeps results while an evaluation runs, so that one that was killed goes on.

DIR/arguments.json      what the results depend on
DIR/<name>              a result, always whole: it appears by a rename
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ValidationError

from vllm_toptheta.errors import EvaluationError
from vllm_toptheta.whole_file import write_whole

__all__ = ["StateFolder", "model_files", "naming_the_flag"]


class StateFolder:
    """Writes and finds results.

    Args:
        folder: where they lie, made if need be; None to keep nothing.
        arguments: what they depend on.

    Raises:
        EvaluationError: the folder cannot be written, or is that of another evaluation.
    """

    def __init__(self, folder: Path | None, arguments: BaseModel) -> None:
        self._folder = folder
        if folder is None:
            return
        file = folder / "arguments.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not file.exists():
                if any(folder.iterdir()):
                    raise EvaluationError(
                        "the folder holds something else", file=folder, field="output", remedy="Name a new folder"
                    )
                self.write(file.name, arguments.model_dump_json(indent=1).encode() + b"\n")
            before = type(arguments).model_validate_json(file.read_bytes())
        except OSError as error:
            raise _not_usable(folder, error) from error
        except ValidationError as error:
            raise EvaluationError(
                "not the arguments of an evaluation", file=file, field="output", remedy="Name a new folder"
            ) from error
        differing = [name for name, value in arguments if getattr(before, name) != value]
        if differing:
            raise EvaluationError(
                f"the folder holds an evaluation with other {', '.join(differing)}",
                file=folder,
                field="output",
                remedy="Repeat the command that was interrupted to go on with it, or name a new folder",
            )

    def find(self, name: str) -> Path | None:
        """Returns the file of a result, None if there is none yet.

        Args:
            name: of the file.
        """
        file = None if self._folder is None else self._folder / name
        return file if file is not None and file.exists() else None

    def write(self, name: str, content: bytes) -> None:
        """Keeps a result.

        Args:
            name: of the file.
            content: of the file.

        Raises:
            EvaluationError: it cannot be written.
        """
        if self._folder is None:
            return
        try:
            write_whole(self._folder / name, content)
        except OSError as error:
            raise _not_usable(self._folder, error) from error


def model_files(model_dir: Path) -> dict[str, tuple[int, int]]:
    """Returns size and time of change of a model's files, by name: reading all weights takes too long.

    Args:
        model_dir: a model directory.
    """
    return {
        file.name: (file.stat().st_size, file.stat().st_mtime_ns)
        for file in sorted(model_dir.iterdir())
        if file.suffix in {".safetensors", ".bin", ".json", ".model"} and file.is_file()
    }


@contextmanager
def naming_the_flag() -> Iterator[None]:
    """Says of a folder of another run of tune how to be rid of it: its name is not the user's to choose."""
    try:
        yield
    except EvaluationError as error:
        if error.field != "output":
            raise
        remedy = "Repeat the command that was interrupted to go on with it, or start anew with --no-resume"
        raise EvaluationError(error.message, file=error.file, field="resume", remedy=remedy) from error


def _not_usable(folder: Path, error: OSError) -> EvaluationError:
    return EvaluationError(f"cannot be used: {error.strerror}", file=folder, field="output", remedy="Name a new folder")
