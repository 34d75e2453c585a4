"""What predictions are compared on: token sequences, grouped by the domain of their text."""

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vllm_toptheta.calibration.data import different_texts, load_sequences, read_text
from vllm_toptheta.errors import EvaluationError
from vllm_toptheta.store import TextSource

__all__ = ["Domain", "Sample", "named_paths", "text_domain"]


@dataclass(frozen=True)
class Sample:
    """A token sequence.

    Attributes:
        token_ids: `[seq_len]` int64.
        num_prompt_tokens: how many of them are a prompt, whose predictions are not compared.
    """

    token_ids: Tensor
    num_prompt_tokens: int = 0


@dataclass(frozen=True)
class Domain:
    """Samples of one kind of text.

    Attributes:
        name: what tables call it.
        sources: the texts.
        samples: at least one.
    """

    name: str
    sources: tuple[TextSource, ...]
    samples: tuple[Sample, ...]


def named_paths(values: Sequence[str], *, field: str, default: str) -> dict[str, list[Path]]:
    """Reads options of the form [NAME=]PATH, where PATH may be a pattern such as sources/**/*.py.

    Args:
        values: the options' values; those with the same name belong together.
        field: the option, for the message of an error.
        default: the name of those without one.

    Returns:
        Paths by name, in the order of the options.

    Raises:
        EvaluationError: a pattern matches nothing.
    """
    paths: dict[str, list[Path]] = {}
    for value in values:
        name, equals, pattern = value.partition("=")
        # a path of its own may contain the sign
        if not equals or Path(value).exists():
            name, pattern = default, value
        matches = sorted(map(Path, glob.glob(pattern, recursive=True))) if glob.has_magic(pattern) else [Path(pattern)]
        if not matches:
            raise EvaluationError(f"no file matches {pattern!r}", field=field)
        paths.setdefault(name, []).extend(matches)
    return paths


def text_domain(
    name: str,
    files: Sequence[Path],
    tokenizer: Any,
    *,
    num_sequences: int,
    length: int,
    num_prompt_tokens: int,
    seed: int,
) -> Domain:
    """Cuts a domain's samples out of text files.

    Args:
        name: of the domain.
        files: UTF-8 text files.
        tokenizer: a transformers tokenizer.
        num_sequences: samples to cut, at least 1.
        length: tokens of a sample.
        num_prompt_tokens: tokens of a sample that are its prompt.
        seed: the same seed and texts give the same samples.

    Raises:
        CalibrationError: a text cannot be used, or the texts are too short.
    """
    texts = different_texts([read_text(file) for file in files])
    sequences = load_sequences(texts, tokenizer, num_sequences=num_sequences, max_length=length, seed=seed)
    return Domain(
        name,
        sources=tuple(text.source for text in texts),
        samples=tuple(Sample(sequence, num_prompt_tokens) for sequence in sequences),
    )
