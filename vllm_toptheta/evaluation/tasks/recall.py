"""Recall out of long prompts, over their length and over the depth at which the answer lies.

A needle in a haystack is one sentence in a text that has nothing to do with it. Key-value recall is a list of keys and
values alone, of which one value is asked for: many near misses instead of one odd sentence.
"""

import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import chain, islice, product

import numpy as np

from vllm_toptheta.errors import EvaluationError
from vllm_toptheta.evaluation.tasks.task import Question, Task

__all__ = ["MAX_NEW_TOKENS", "RECALL_TASKS", "TokenCounter", "key_value_task", "needle_task"]

# of an answer
MAX_NEW_TOKENS = 16
_PIECE_CHARACTERS = 160
_SAMPLE_CHARACTERS = 8000
_SAMPLE_PAIRS = 200
_DIGITS = 5
_NEEDLE_SUBJECTS = (
    "bakery",
    "bridge",
    "castle",
    "cellar",
    "garden",
    "harbour",
    "library",
    "lighthouse",
    "mill",
    "museum",
    "orchard",
    "station",
    "theatre",
    "tower",
    "workshop",
)


TokenCounter = Callable[[str], Callable[[str], float]]
_Ask = Callable[[int, float, np.random.Generator], tuple[str, str]]


def needle_task(
    text: str,
    token_counter: TokenCounter,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
    seed: int = 0,
) -> Task:
    """Makes questions about one sentence that is hidden in a text.

    Args:
        text: the haystack, cut by lines, sentences and, where they are long, at spaces; every question starts at
            another place of it.
        token_counter: given a sample, returns what counts the tokens of such text, about.
        lengths: tokens of the prompts, at most.
        depths: where the sentence is put, 0 at the start of the text and 1 at its end.
        samples: questions for each length and depth.
        seed: the same seed and text give the same questions.

    Raises:
        EvaluationError: the options are impossible, or the text is too short.
    """
    sentences = re.split(r"(?<=[.!?])\s+|\n+", text)
    pieces = [piece for sentence in sentences for piece in textwrap.wrap(sentence, _PIECE_CHARACTERS)]
    # from all over the text, which may be of several kinds
    step = max(1, len(text) // _SAMPLE_CHARACTERS)
    count_tokens = token_counter("\n".join(pieces[::step]) or text)
    size_of = cache(count_tokens)

    def ask(length: int, depth: float, generator: np.random.Generator) -> tuple[str, str]:
        subject, number = generator.choice(_NEEDLE_SUBJECTS), _number(generator)
        needle = f"The secret number of the {subject} is {number}."
        question = (
            f"\n\nQuestion: What is the secret number of the {subject}?\nAnswer: The secret number of the {subject} is"
        )
        start = int(generator.integers(max(len(pieces), 1)))
        haystack = _fill(
            chain(pieces[start:], pieces[:start]), length - count_tokens(needle + "\n" + question), size_of
        )
        haystack.insert(round(depth * len(haystack)), needle)
        return "\n".join(haystack) + question, number

    return _task("needle", ask, lengths=lengths, depths=depths, samples=samples, seed=seed)


def key_value_task(
    text: str,
    token_counter: TokenCounter,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
    seed: int = 0,
) -> Task:
    """Makes questions about one value in a list of keys and values.

    Args:
        text: whose words make the keys, two for each.
        token_counter: given a sample, returns what counts the tokens of such text, about.
        lengths: tokens of the prompts, at most.
        depths: where the pair that is asked for stands, 0 at the start of the list and 1 at its end.
        samples: questions for each length and depth.
        seed: the same seed and text give the same questions.

    Raises:
        EvaluationError: the options are impossible, or the text has too few words.
    """
    words = sorted(set(re.findall(r"\b[a-z]{4,9}\b", text)))
    head = "Here is a list of keys and their values.\n"

    def pairs(generator: np.random.Generator) -> Iterator[str]:
        keys: set[str] = set()
        # half of all pairs of words is more than drawing at random finds quickly
        while len(keys) < len(words) ** 2 // 2:
            key = "-".join(generator.choice(words, 2))
            if key not in keys:
                keys.add(key)
                yield f"{key}: {_number(generator)}"

    sample = "\n".join(islice(pairs(np.random.default_rng(seed)), _SAMPLE_PAIRS))
    count_tokens = token_counter(sample or text)

    def ask(length: int, depth: float, generator: np.random.Generator) -> tuple[str, str]:
        # the question repeats a pair's key
        budget = length - count_tokens(f"{head}\nThe value of {'-'.join(words[:2])} is")
        lines = _fill(pairs(generator), budget, count_tokens)
        key, number = lines[round(depth * (len(lines) - 1))].split(": ")
        return head + "\n".join(lines) + f"\n\nThe value of {key} is", number

    return _task("key-value", ask, lengths=lengths, depths=depths, samples=samples, seed=seed)


def _task(name: str, ask: _Ask, *, lengths: Sequence[int], depths: Sequence[float], samples: int, seed: int) -> Task:
    if not lengths or not depths or samples < 1:
        raise EvaluationError(f"{name}: give at least one length, one depth and one sample", field="lengths")
    if not all(0.0 <= depth <= 1.0 for depth in depths):
        raise EvaluationError(f"from 0 to 1, got {list(depths)}", field="depths")
    questions = []
    for length, depth, sample in product(lengths, depths, range(samples)):
        generator = np.random.default_rng([seed, length, round(1000 * depth), sample])
        prompt, expected = ask(length, depth, generator)
        questions.append(
            Question(
                name=f"{name} {length} tokens, depth {depth:g}, sample {sample}",
                prompt=prompt,
                max_new_tokens=MAX_NEW_TOKENS,
                stop=("\n",),
                expected=expected,
                length=length,
                depth=depth,
            )
        )
    return Task(name, questions, is_correct=lambda question, answer: question.expected in answer)


def _fill(pieces: Iterable[str], budget: float, count_tokens: Callable[[str], float]) -> list[str]:
    """Takes pieces, each a line, until the next one would exceed a budget of tokens."""
    taken: list[str] = []
    for piece in pieces:
        budget -= count_tokens(piece + "\n")
        if budget < 0:
            if taken:
                return taken
            break
        taken.append(piece)
    raise EvaluationError(
        "the text is too short, or the length too small, for a prompt of that length",
        field="lengths",
        remedy="Give more text (--text), or ask for other lengths (--lengths)",
    )


def _number(generator: np.random.Generator) -> str:
    return str(generator.integers(10 ** (_DIGITS - 1), 10**_DIGITS))


RECALL_TASKS = {"needle": needle_task, "key-value": key_value_task}
