"""Text files to token sequences: read, tokenise, and choose pieces by a seed."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_toptheta.errors import CalibrationError
from vllm_toptheta.store import TextSource

__all__ = ["Text", "cut_sequences", "load_sequences", "prompt_prefix", "read_text", "tokenise"]

_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Text:
    """A text file.

    Attributes:
        source: the file's name without its folder, the sha256 of its bytes, and its number of characters.
        content: the decoded text.
    """

    source: TextSource
    content: str


def read_text(file: Path) -> Text:
    """Reads a UTF-8 text file.

    Args:
        file: the file.

    Raises:
        CalibrationError: it is missing, not readable, not UTF-8, or empty.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise CalibrationError(f"cannot be read: {error.strerror}", file=file) from error
    try:
        content = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"not UTF-8 text: byte {error.start} cannot be decoded", file=file, remedy="Give plain text files"
        ) from error
    if not content.strip():
        raise CalibrationError("the file holds no text", file=file)
    source = TextSource(name=file.name, sha256=hashlib.sha256(data).hexdigest(), num_characters=len(content))
    return Text(source, content)


def tokenise(tokenizer: Any, text: str) -> list[int]:
    """Returns the token ids of a text, without the tokens that a tokenizer puts around a prompt.

    Args:
        tokenizer: a transformers tokenizer.
        text: the text.
    """
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def load_sequences(
    texts: Sequence[Text], tokenizer: Any, *, num_sequences: int, max_length: int, seed: int
) -> list[Tensor]:
    """Returns token sequences of one length out of texts; see `cut_sequences`.

    Args:
        texts: the texts.
        tokenizer: a transformers tokenizer.
        num_sequences: sequences to cut, at least 1.
        max_length: tokens of a sequence, the model's begin-of-text token included.
        seed: the same seed and texts give the same sequences.

    Raises:
        CalibrationError: the texts are too short.
    """
    return cut_sequences(
        [tokenise(tokenizer, text.content) for text in texts],
        num_sequences=num_sequences,
        max_length=max_length,
        seed=seed,
        prefix=prompt_prefix(tokenizer),
    )


def prompt_prefix(tokenizer: Any) -> list[int]:
    """Returns the begin-of-text token, if the tokenizer starts a prompt with one.

    Models trained with that token give it much of their attention, so a sequence without it is not a prompt.

    Args:
        tokenizer: a transformers tokenizer.
    """
    ids: list[int] = tokenizer("")["input_ids"]
    return [token for token in ids[:1] if token == tokenizer.bos_token_id]


def cut_sequences(
    tokens: Sequence[Sequence[int]],
    *,
    num_sequences: int,
    max_length: int,
    seed: int,
    prefix: Sequence[int] = (),
) -> list[Tensor]:
    """Cuts token sequences of one length out of several texts.

    Every text is cut into pieces as long as a sequence, the last one shorter. The texts take turns, in an order chosen
    by the seed, each giving its next piece: in steps of the golden ratio from a start chosen by the seed, so that
    however few pieces are used, they come from all over the text. Sequences are cut from the pieces laid end to end:
    a long text gives whole pieces, short ones are joined.

    Args:
        tokens: token ids, text by text.
        num_sequences: sequences to cut, at least 1.
        max_length: tokens of a sequence, the prefix included.
        seed: the same seed and texts give the same sequences.
        prefix: token ids that every sequence starts with, such as the model's begin-of-text token.

    Returns:
        `num_sequences` tensors `[max_length]` int64.

    Raises:
        CalibrationError: the texts are too short, or nothing would be left of a sequence but its prefix.
    """
    length = max_length - len(prefix)
    if length < 1:
        raise CalibrationError(f"must be more than {len(prefix)}, got {max_length}", field="max_length")
    needed, available = num_sequences * length, sum(map(len, tokens))
    if available < needed:
        raise CalibrationError(
            f"the texts have {available} tokens, but {num_sequences} sequences of {max_length} need {needed}",
            remedy="Give more text, or ask for fewer or shorter sequences",
        )
    generator = np.random.default_rng(seed)
    turns = [_spread_pieces(tokens[index], length, generator) for index in generator.permutation(len(tokens))]
    pieces = (piece for turn in zip_longest(*turns, fillvalue=()) for piece in turn)
    stream = torch.tensor(list(islice(chain.from_iterable(pieces), needed)), dtype=torch.int64)
    start = torch.tensor(prefix, dtype=torch.int64)
    return [torch.cat([start, sequence]) for sequence in stream.view(num_sequences, length)]


def _spread_pieces(tokens: Sequence[int], length: int, generator: np.random.Generator) -> Iterator[Sequence[int]]:
    count = math.ceil(len(tokens) / length)
    step = max(1, round(count * _GOLDEN_RATIO))
    while math.gcd(step, count) > 1:
        step += 1
    start = int(generator.integers(max(count, 1)))
    return (
        tokens[index * length : (index + 1) * length] for index in ((start + i * step) % count for i in range(count))
    )
