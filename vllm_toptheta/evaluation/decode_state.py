"""The results of an evaluation of decoding on disk, so that one that was killed goes on at the next sequence.

DIR/arguments.json                      what the results depend on
DIR/<length>-<sequence>.safetensors     the result of one sequence, always whole: it appears by a rename
DIR/report.json                         when all are there
"""

import json
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from vllm_toptheta.errors import EvaluationError
from vllm_toptheta.evaluation.decode_report import DecodeReport, WindowResult
from vllm_toptheta.evaluation.losses import Losses
from vllm_toptheta.evaluation.subject import Setup
from vllm_toptheta.evaluation.variants import Variant
from vllm_toptheta.evaluation.window_reads import WindowReads
from vllm_toptheta.store import TextSource
from vllm_toptheta.whole_file import write_whole

__all__ = ["DecodeArguments", "DecodeState", "model_files"]


class DecodeArguments(BaseModel):
    """What the results depend on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    setup: Setup
    model_files: dict[str, tuple[int, int]]
    text: tuple[TextSource, ...]
    variants: tuple[Variant, ...]
    lengths: tuple[int, ...]
    num_sequences: int
    window: int
    equal_rows: tuple[float, ...]
    seed: int
    skip: int = 0


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


class DecodeState:
    """Saves and finds results of sequences.

    Args:
        folder: where they lie, made if need be; None to keep nothing.
        arguments: what they depend on.

    Raises:
        EvaluationError: the folder cannot be written, or is that of another evaluation.
    """

    def __init__(self, folder: Path | None, arguments: DecodeArguments) -> None:
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
                self._write(file.name, arguments.model_dump_json(indent=1).encode() + b"\n")
            before = DecodeArguments.model_validate_json(file.read_bytes())
        except OSError as error:
            raise _not_usable(folder, error) from error
        except ValidationError as error:
            raise EvaluationError(
                "not the arguments of an evaluation", file=file, field="output", remedy="Name a new folder"
            ) from error
        differing = [name for name in DecodeArguments.model_fields if getattr(before, name) != getattr(arguments, name)]
        if differing:
            raise EvaluationError(
                f"the folder holds an evaluation with other {', '.join(differing)}",
                file=folder,
                field="output",
                remedy="Repeat the command that was interrupted to go on with it, or name a new folder",
            )

    def load(self, length: int, sequence: int) -> WindowResult | None:
        """Returns the result of a sequence, None if there is none yet.

        Args:
            length: its tokens.
            sequence: its number.

        Raises:
            EvaluationError: the file is damaged.
        """
        file = None if self._folder is None else self._folder / f"{length}-{sequence}.safetensors"
        if file is None or not file.exists():
            return None
        try:
            with safe_open(file, "numpy") as saved:
                arrays = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118 - no mapping
                numbers = saved.metadata()
            losses, equal_rows = json.loads(numbers["losses"]), json.loads(numbers["equal_rows"])
            return WindowResult(
                equal_rows={label: Variant.model_validate(variant) for label, variant in equal_rows.items()},
                losses=tuple(Losses(**of_variant) for of_variant in losses),
                reads=tuple(
                    WindowReads(**{field.name: arrays[f"{index}.{field.name}"] for field in fields(WindowReads)})
                    for index in range(len(losses))
                ),
            )
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise EvaluationError(
                f"damaged: {error}", file=file, remedy="Delete it, and it is measured again"
            ) from error

    def save(self, length: int, sequence: int, result: WindowResult) -> None:
        """Keeps the result of a sequence.

        Args:
            length: its tokens.
            sequence: its number.
            result: what it gave.

        Raises:
            EvaluationError: it cannot be written.
        """
        if self._folder is None:
            return
        arrays = {
            f"{index}.{name}": np.ascontiguousarray(array)
            for index, reads in enumerate(result.reads)
            for name, array in vars(reads).items()
        }
        chosen = {label: variant.model_dump(mode="json") for label, variant in result.equal_rows.items()}
        numbers = {
            "losses": json.dumps([asdict(losses) for losses in result.losses]),
            "equal_rows": json.dumps(chosen),
        }
        self._write(f"{length}-{sequence}.safetensors", save(arrays, metadata=numbers))

    def finish(self, report: DecodeReport) -> None:
        """Writes the report.

        Args:
            report: of all results.

        Raises:
            EvaluationError: it cannot be written.
        """
        # on one line: a number a line would make layers times variants times lengths of them
        self._write("report.json", report.model_dump_json().encode() + b"\n")

    def _write(self, name: str, content: bytes) -> None:
        if self._folder is None:
            return
        try:
            write_whole(self._folder / name, content)
        except OSError as error:
            raise _not_usable(self._folder, error) from error


def _not_usable(folder: Path, error: OSError) -> EvaluationError:
    return EvaluationError(f"cannot be used: {error.strerror}", file=folder, field="output", remedy="Name a new folder")
