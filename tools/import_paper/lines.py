"""The th.txt of the paper's code: a threshold a line, for a layer, a head and a length.

    L<layer>_H<head>:<length> <threshold> <samples> <k>

The length is that of a row in tokens, the samples are the calibration rows behind the threshold. There is no header, no
model's name and no checksum. Source of the format: https://github.com/kostyanoob/top-theta-attention.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from vllm_toptheta.errors import StoreError
from vllm_toptheta.store import Architecture
from vllm_toptheta.store.fields import MAX_TOKENS

__all__ = ["PaperFileError", "fail", "read_lines"]

_MAX_LINE = 256
_LAYOUT = "L<layer>_H<head>:<length> <threshold> <samples> <k>"
_LINE = re.compile(r"L(\d{1,5})_H(\d{1,5}):(\d{1,9}) (\S+) (\d{1,9}) (\d{1,9})")
_ROW = [(name, np.int64) for name in ("line", "layer", "head", "length", "k", "samples")] + [("threshold", np.float64)]


class PaperFileError(StoreError):
    """A th.txt cannot be read, or makes no store."""


def read_lines(file: Path, architecture: Architecture) -> NDArray[Any]:
    """Reads a th.txt and checks each line by itself, and that none says a thing twice.

    Args:
        file: a th.txt.
        architecture: that of the model; its layers and heads bound those of the file.

    Returns:
        `[num_lines]` in the order of the file, with the fields `line` (its number), `layer`, `head`, `length`, `k`,
        `samples` (0 for a threshold that was interpolated) and `threshold`; without empty lines.

    Raises:
        PaperFileError: the file cannot be read, or a line is wrong; the message has its number.
    """
    lines = np.fromiter(_rows(file, architecture), _ROW)
    if not len(lines):
        raise PaperFileError("holds no line", file=file)
    _, first, place = np.unique(lines[["layer", "head", "length", "k"]], return_index=True, return_inverse=True)
    repeated = np.flatnonzero(first[place] != np.arange(len(lines)))
    if len(repeated):
        # the paper's code appends: two calibrations into one folder leave both behind
        earlier = lines["line"][first[place[repeated[0]]]]
        fail(file, lines["line"][repeated[0]], f"says again what line {earlier} says")
    return lines


def fail(file: Path, line: int, message: str) -> NoReturn:
    """Raises the error about a line of a file."""
    remedy = "Give the file as the paper's code wrote it, with its model's directory and its placement"
    raise PaperFileError(message, file=file, field=f"line {line}", remedy=remedy)


def _rows(file: Path, architecture: Architecture) -> Iterator[tuple[float, ...]]:
    for number, text in _numbered(file):
        match = _LINE.fullmatch(text)
        if match is None:
            fail(file, number, f"expected {_LAYOUT!r}, got {text[:80]!r}")
        layer, head, length, samples, k = (int(field) for field in match.group(1, 2, 3, 5, 6))
        try:
            threshold = float(match[4])
        except ValueError:
            threshold = math.nan
        if layer >= architecture.num_layers or head >= architecture.num_heads:
            shape = f"{architecture.num_layers} layers and {architecture.num_heads} heads"
            fail(file, number, f"layer {layer}, head {head} in a model of {shape}")
        if not math.isfinite(threshold):
            fail(file, number, f"not a finite number: {match[4][:80]!r}")
        if not 1 <= k < length <= MAX_TOKENS:
            fail(file, number, f"k {k} of rows of {length} tokens; expected 1 <= k < length <= {MAX_TOKENS}")
        yield number, layer, head, length, k, samples, threshold


def _numbered(file: Path) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        with file.open(encoding="ascii") as stream:
            # a bound on the line, because a file from elsewhere may hold no line end at all
            while text := stream.readline(_MAX_LINE):
                number += 1
                if len(text) == _MAX_LINE:
                    fail(file, number, f"longer than {_MAX_LINE - 1} characters")
                if text.strip():
                    yield number, text.strip()
    except OSError as error:
        raise PaperFileError(f"cannot be read: {error.strerror}", file=file) from None
    except UnicodeDecodeError:
        raise PaperFileError(f"not ASCII text, after line {number}", file=file) from None
