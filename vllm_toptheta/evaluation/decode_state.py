"""The results of an evaluation of decoding on disk, so that one that was killed goes on at the next sequence.

DIR/arguments.json                      what the results depend on
DIR/<length>-<sequence>.safetensors     the result of one sequence, always whole: it appears by a rename
DIR/report.json                         when all are there
"""

import json
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from vllm_toptheta.errors import EvaluationError
from vllm_toptheta.evaluation.decode_report import DecodeReport
from vllm_toptheta.evaluation.losses import Losses
from vllm_toptheta.evaluation.measuring import WindowResult
from vllm_toptheta.evaluation.state_folder import StateFolder
from vllm_toptheta.evaluation.subject import Setup
from vllm_toptheta.evaluation.variants import Variant
from vllm_toptheta.evaluation.window_reads import WindowReads
from vllm_toptheta.store import TextSource

__all__ = ["DecodeArguments", "DecodeState"]


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


class DecodeState:
    """Saves and finds results of sequences.

    Args:
        folder: where they lie, made if need be; None to keep nothing.
        arguments: what they depend on.

    Raises:
        EvaluationError: the folder cannot be written, or is that of another evaluation.
    """

    def __init__(self, folder: Path | None, arguments: DecodeArguments) -> None:
        self._folder = StateFolder(folder, arguments)

    def load(self, length: int, sequence: int) -> WindowResult | None:
        """Returns the result of a sequence, None if there is none yet.

        Args:
            length: its tokens.
            sequence: its number.

        Raises:
            EvaluationError: the file is damaged.
        """
        file = self._folder.find(f"{length}-{sequence}.safetensors")
        if file is None:
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
        self._folder.write(f"{length}-{sequence}.safetensors", save(arrays, metadata=numbers))

    def finish(self, report: DecodeReport) -> None:
        """Writes the report.

        Args:
            report: of all results.

        Raises:
            EvaluationError: it cannot be written.
        """
        # on one line: a number a line would make layers times variants times lengths of them
        self._folder.write("report.json", report.model_dump_json().encode() + b"\n")
