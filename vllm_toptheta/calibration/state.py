"""The state of a calibration on disk, so that one that was killed goes on where it was.

One safetensors file holds all arrays, and in its metadata the fingerprint of the calibration and the number of passes
done. It replaces its predecessor by a rename, so it is always whole; a killed pass is simply done again.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from vllm_toptheta.errors import CalibrationError
from vllm_toptheta.whole_file import unfinished, write_whole

__all__ = ["Checkpoint"]


class Checkpoint:
    """Saves the arrays of a calibration, and restores them.

    Args:
        file: where the state lies; its folder is created.
        fingerprint: of all that decides the result.
    """

    def __init__(self, file: Path, fingerprint: str) -> None:
        self.file = file
        self.fingerprint = fingerprint

    def save(self, passes_done: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Replaces the state.

        Args:
            passes_done: passes whose results the arrays hold.
            arrays: all that later passes and the result need, by name.

        Raises:
            CalibrationError: the file cannot be written.
        """
        metadata = {"fingerprint": self.fingerprint, "passes_done": str(passes_done)}
        try:
            write_whole(self.file, safetensors.numpy.save(dict(arrays), metadata))
        except OSError as error:
            raise CalibrationError(
                f"cannot be written: {error.strerror}",
                file=self.file,
                field="out",
                remedy="Choose a folder that you may write to, on a disk with room",
            ) from error

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> int:
        """Writes the saved state into arrays of the same shapes, and returns the number of passes done.

        Args:
            arrays: as for `save`; left as they are where nothing was saved.

        Returns:
            Passes done; 0 where nothing was saved.

        Raises:
            CalibrationError: the file belongs to another calibration, or is damaged.
        """
        if not self.file.is_file():
            return 0
        try:
            with safetensors.safe_open(self.file, framework="numpy") as saved:
                metadata = saved.metadata() or {}
                tensors = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118 - no mapping
            passes_done = int(metadata["passes_done"])
        except (OSError, safetensors.SafetensorError, KeyError, ValueError) as error:
            raise self._refuse(f"not the state of a calibration: {error}") from error
        if metadata.get("fingerprint") != self.fingerprint:
            raise self._refuse("the state of a calibration with other options, texts, model or versions")
        if {name: tensor.shape for name, tensor in tensors.items()} != {name: a.shape for name, a in arrays.items()}:
            raise self._refuse("the state of a calibration of another shape")
        for name, array in arrays.items():
            array[...] = tensors[name]
        return passes_done

    def remove(self) -> None:
        """Deletes the state."""
        for file in (self.file, unfinished(self.file)):
            with contextlib.suppress(FileNotFoundError):
                file.unlink()

    def _refuse(self, message: str) -> CalibrationError:
        remedy = "Repeat the command that was interrupted to go on with it, or start anew with --no-resume"
        return CalibrationError(message, file=self.file, remedy=remedy)
