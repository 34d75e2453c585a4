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

from vllm_toptheta.calibration.formats import decode_text, is_json, json_documents
from vllm_toptheta.errors import CalibrationError
from vllm_toptheta.store import TextSource

__all__ = [
    "Text",
    "cut_sequences",
    "different_texts",
    "join_documents",
    "load_sequences",
    "prompt_prefix",
    "read_text",
    "tokenise",
]

_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
_BETWEEN_DOCUMENTS = "\n\n"
# a tokenizer that knows a text makes a token of four characters, and in code of a dozen spaces
_MAX_CHARACTERS_PER_TOKEN = 100
_MIN_CHARACTERS = 1000  # fewer say nothing of a tokenizer
_MAX_SHARE_OF_ONE_TOKEN = 0.9
_MIN_TOKENS = 64


@dataclass(frozen=True)
class Text:
    """A text file.

    Attributes:
        source: the file's name without its folder, the sha256 of its bytes, and its number of characters.
        content: the decoded text.
    """

    source: TextSource
    content: str


def read_text(file: Path, *, text_field: str = "text") -> Text:
    """Reads a file of UTF-8 text or of JSON documents, compressed or not; see `formats`.

    Args:
        file: the file.
        text_field: the field of a JSON object that holds its text.

    Raises:
        CalibrationError: it is missing, not readable, of another format, or holds no text.
    """
    try:
        data = file.read_bytes()
    except (OSError, RuntimeError) as error:  # a cycle of links is a RuntimeError until Python 3.13
        dangling = file.is_symlink() and not file.exists()
        reason = "a link to what is not there" if dangling else getattr(error, "strerror", None) or str(error)
        raise CalibrationError(f"cannot be read: {reason}", file=file, remedy="Name files of text (--text)") from error
    content = decode_text(data, file)
    if is_json(file):
        content = join_documents(json_documents(content, file, text_field=text_field), file)
    if not content.strip():
        raise CalibrationError("the file holds no text", file=file, remedy="Leave it out")
    # a name may hold what a manifest may not
    name = "".join(character if character.isprintable() else "?" for character in file.name)
    return Text(TextSource(name=name, sha256=hashlib.sha256(data).hexdigest(), num_characters=len(content)), content)


def join_documents(documents: Sequence[str], origin: Path | str) -> str:
    """Returns documents as one text, with empty lines between them.

    Args:
        documents: texts.
        origin: the file or dataset that they come from, named by the error.

    Raises:
        CalibrationError: there is no text in them.
    """
    content = _BETWEEN_DOCUMENTS.join(documents)
    if not content.strip():
        raise CalibrationError("there is no text in it", file=origin, remedy="Leave it out")
    return content


def different_texts(texts: Sequence[Text]) -> list[Text]:
    """Returns the texts without those that came before, so that none counts twice, by whatever names it is given.

    Args:
        texts: texts, of which some may be the same file, a link to it or a copy of it.
    """
    by_content: dict[str, Text] = {}
    for text in texts:
        by_content.setdefault(text.content, text)
    return list(by_content.values())


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
        texts: the texts; the same one twice counts once.
        tokenizer: a transformers tokenizer.
        num_sequences: sequences to cut, at least 1.
        max_length: tokens of a sequence, the model's begin-of-text token included.
        seed: the same seed and texts give the same sequences.

    Raises:
        CalibrationError: the texts are too short, or the tokenizer cannot tell one from the other.
    """
    texts = different_texts(texts)
    tokens = [tokenise(tokenizer, text.content) for text in texts]
    _check_tokens(tokens, sum(len(text.content) for text in texts))
    return cut_sequences(
        tokens,
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


def _check_tokens(tokens: Sequence[Sequence[int]], num_characters: int) -> None:
    """Refuses the tokens of a tokenizer without a vocabulary for the texts, which makes much the same of everything."""
    total = sum(map(len, tokens))
    remedy = "Give the directory the tokenizer that the model was trained with, or texts in its language"
    if num_characters > max(_MIN_CHARACTERS, _MAX_CHARACTERS_PER_TOKEN * total):
        raise CalibrationError(
            f"the tokenizer makes {total} tokens of {num_characters} characters", field="tokenizer", remedy=remedy
        )
    if total < _MIN_TOKENS:
        return
    ids, counts = np.unique(np.concatenate([np.asarray(of_text, np.int64) for of_text in tokens]), return_counts=True)
    if counts.max() > _MAX_SHARE_OF_ONE_TOKEN * total:
        raise CalibrationError(
            f"the tokenizer makes token {ids[counts.argmax()]} of {counts.max() / total:.0%} of the texts",
            field="tokenizer",
            remedy=remedy,
        )


def _spread_pieces(tokens: Sequence[int], length: int, generator: np.random.Generator) -> Iterator[Sequence[int]]:
    count = math.ceil(len(tokens) / length)
    step = max(1, round(count * _GOLDEN_RATIO))
    while math.gcd(step, count) > 1:
        step += 1
    start = int(generator.integers(max(count, 1)))
    return (
        tokens[index * length : (index + 1) * length] for index in ((start + i * step) % count for i in range(count))
    )
