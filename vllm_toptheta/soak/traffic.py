"""What a soak asks for: prompts of mixed lengths, some of which begin alike, and clients of mixed patience."""

from __future__ import annotations

import inspect
import random
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

SHORTEST = 16  # tokens of the shortest prompt
_SHARED = 3  # one prompt in so many begins as another one does


class Behaviour(Enum):
    """What a client does with its request."""

    WHOLE = "waits for the whole answer"
    STREAM = "reads the answer token by token"
    LEAVE_EARLY = "closes the connection while it waits for the whole answer"
    LEAVE_MIDWAY = "closes the connection while tokens are streaming"


# how many of a hundred clients do so
_SHARES = {Behaviour.WHOLE: 50, Behaviour.STREAM: 30, Behaviour.LEAVE_EARLY: 10, Behaviour.LEAVE_MIDWAY: 10}


@dataclass(frozen=True)
class Prompt:
    """A greedy completion to ask for.

    Attributes:
        index: Its place in the pool.
        token_ids: The prompt.
        max_tokens: Tokens to generate, exactly.
        choice: How it is to be decoded, as of `vllm_xargs.toptheta`; None: as the server does by itself.
    """

    index: int
    token_ids: tuple[int, ...]
    max_tokens: int
    choice: str | None = None


def sample_text() -> str:
    """A long text that every machine has."""
    return inspect.getsource(tarfile)


def make_prompts(
    token_ids: Sequence[int],
    *,
    count: int,
    longest: int,
    max_tokens: int,
    seed: int,
    choices: Sequence[str] = (),
) -> list[Prompt]:
    """Cut a pool of prompts from a text.

    Args:
        token_ids: The text; at least `longest` tokens.
        count: Prompts in the pool.
        longest: Tokens of the longest; the lengths grow geometrically from `SHORTEST`.
        max_tokens: Tokens that the answers have at most; they have at least a quarter of it.
        seed: Decides where prompts are cut.
        choices: What prompts ask for in turn, after one that asks for nothing.
    """
    chance = random.Random(seed)  # noqa: S311 - nothing is secret
    ratio = (longest / SHORTEST) ** (1 / max(1, count - 1))
    lengths = [round(SHORTEST * ratio**index) for index in range(count)]
    prompts = []
    for index, length in enumerate(lengths):
        start = chance.randrange(len(token_ids) - length + 1)
        cut = tuple(token_ids[start : start + length])
        if index % _SHARED == 0:
            # half of it is the text's beginning, which all of these share
            cut = tuple(token_ids[: length // 2]) + cut[length // 2 :]
        answer = chance.randint(max(1, max_tokens // 4), max_tokens)
        prompts.append(Prompt(index, cut, answer, (None, *choices)[index % (1 + len(choices))]))
    return prompts


def requests(prompts: Sequence[Prompt], *, seed: int) -> Iterator[tuple[Prompt, Behaviour, float]]:
    """Yield requests without end: a prompt, what its client does, and a number in [0, 1) that says when it leaves."""
    chance = random.Random(seed)  # noqa: S311 - nothing is secret
    while True:
        behaviour = chance.choices(list(_SHARES), list(_SHARES.values()))[0]
        yield chance.choice(prompts), behaviour, chance.random()
