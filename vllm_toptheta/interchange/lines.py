"""The text format of the paper's own code: one calibrated number a line, for a layer, head and length.

    th.txt    L<layer>_H<head>:<length> <threshold> <samples> <k>
    sdc.txt   L<layer>_H<head>:<length> <missing mass> <samples>

The length is that of a row in tokens, the samples are the calibration rows behind the number, and the missing mass is
the sum of exp(s_j - m) over the discarded keys of a row, m its largest score. There is no header, no model's name and
no checksum. Source of the format: https://github.com/kostyanoob/top-theta-attention.
"""

import math
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from vllm_toptheta.errors import InterchangeError
from vllm_toptheta.store import Architecture
from vllm_toptheta.store.fields import MAX_TOKENS

__all__ = ["CalibratedLines", "read_lines"]

MAX_SAMPLES = (1 << 31) - 1
_MAX_LINE = 256
_THRESHOLD = re.compile(r"L(\d{1,5})_H(\d{1,5}):(\d{1,9}) (\S+) (\d{1,10}) (\d{1,9})")
_MISSING_MASS = re.compile(r"L(\d{1,5})_H(\d{1,5}):(\d{1,9}) (\S+) (\d{1,10})")


@dataclass(frozen=True)
class CalibratedLines:
    """The lines of one file, as columns of one length.

    Attributes:
        file: where they were read.
        line: int64, line numbers, from 1.
        layer: int64.
        head: int64, query heads.
        length: int64, tokens of a row.
        value: float64, a threshold or a missing mass.
        samples: int64, rows behind the value; 0 for one that was interpolated.
        k: int64, the target k of a threshold; 0 in the lines of an sdc.txt.
    """

    file: Path
    line: NDArray[np.int64]
    layer: NDArray[np.int64]
    head: NDArray[np.int64]
    length: NDArray[np.int64]
    value: NDArray[np.float64]
    samples: NDArray[np.int64]
    k: NDArray[np.int64]


def read_lines(file: Path, architecture: Architecture, *, has_k: bool) -> CalibratedLines:
    """Reads a file of calibrated numbers and checks each line by itself, and that none says a thing twice.

    Args:
        file: a th.txt or an sdc.txt.
        architecture: that of the model; its layers and heads bound those of the file.
        has_k: whether the lines end with k, as those of a th.txt do.

    Returns:
        The lines in the order of the file; empty ones are left out.

    Raises:
        InterchangeError: the file cannot be read, or a line is wrong; the message has its number.
    """
    columns = [array("q") for _ in range(6)]
    values = array("d")
    for number, text in _numbered(file):
        match = (_THRESHOLD if has_k else _MISSING_MASS).fullmatch(text)
        if match is None:
            layout = "L<layer>_H<head>:<length> <number> <samples>" + (" <k>" if has_k else "")
            _fail(file, number, f"expected {layout!r}, got {text[:80]!r}")
        layer, head, length, samples, k = (int(field) for field in match.group(1, 2, 3, 5, 6 if has_k else 5))
        value = _number(match[4])
        if layer >= architecture.num_layers or head >= architecture.num_heads:
            _fail(
                file,
                number,
                f"layer {layer}, head {head} in a model of {architecture.num_layers} layers and "
                f"{architecture.num_heads} heads",
            )
        if value is None:
            _fail(file, number, f"not a finite number: {match[4][:80]!r}")
        if not 1 <= length <= MAX_TOKENS or samples > MAX_SAMPLES:
            _fail(file, number, f"a length of {length} tokens and {samples} samples")
        if has_k and not 1 <= k < length:
            _fail(file, number, f"k {k} needs rows of more than {k} tokens, this one has {length}")
        for column, field in zip(columns, (number, layer, head, length, samples, k if has_k else 0), strict=True):
            column.append(field)
        values.append(value)
    if not values:
        raise InterchangeError("holds no line", file=file)
    line, layers, heads, lengths, all_samples, ks = (np.array(column, np.int64) for column in columns)
    lines = CalibratedLines(file, line, layers, heads, lengths, np.array(values), all_samples, ks)
    _check_unique(lines)
    return lines


def _numbered(file: Path) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        with file.open(encoding="ascii") as stream:
            # a bound on the line, because a file from elsewhere may hold no line end at all
            while text := stream.readline(_MAX_LINE):
                number += 1
                if len(text) == _MAX_LINE:
                    _fail(file, number, f"longer than {_MAX_LINE - 1} characters")
                if text.strip():
                    yield number, text.strip()
    except OSError as error:
        raise InterchangeError(f"cannot be read: {error.strerror}", file=file) from None
    except UnicodeDecodeError:
        raise InterchangeError(f"not ASCII text, after line {number}", file=file) from None


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _check_unique(lines: CalibratedLines) -> None:
    order = np.lexsort((lines.line, lines.length, lines.head, lines.layer, lines.k))
    same = np.ones(len(order) - 1, bool)
    for column in (lines.k, lines.layer, lines.head, lines.length):
        same &= np.diff(column[order]) == 0
    if same.any():
        at = int(np.flatnonzero(same)[0])
        first, second = (int(lines.line[order[place]]) for place in (at, at + 1))
        # the paper's code appends: two calibrations into one folder leave both behind
        _fail(lines.file, second, f"says again what line {first} says")


def _fail(file: Path, number: int, message: str) -> NoReturn:
    raise InterchangeError(
        message,
        file=file,
        field=f"line {number}",
        remedy="Give the file as the paper's code wrote it, and the directory of the model that it was written for",
    )
