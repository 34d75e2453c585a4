"""What a task is: questions, and a judge of the answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["Answers", "Question", "Task", "cut_at_stop"]


@dataclass(frozen=True)
class Question:
    """A prompt to be continued.

    Attributes:
        name: of the question, unique in its task.
        prompt: the text to continue.
        max_new_tokens: tokens to generate at most.
        stop: texts at which an answer ends.
        expected: what a right answer contains; empty where a judge finds out by itself.
        length: tokens that the prompt was made for; None where prompts have lengths of their own.
        depth: where in the prompt the answer lies, 0 at its start and 1 at its end; None where it has no place.
    """

    name: str
    prompt: str
    max_new_tokens: int
    stop: tuple[str, ...]
    expected: str = ""
    length: int | None = None
    depth: float | None = None


@dataclass(frozen=True)
class Task:
    """Questions of one kind.

    Attributes:
        name: what tables call it.
        questions: at least one.
        is_correct: whether a text is a right answer to a question.
    """

    name: str
    questions: Sequence[Question]
    is_correct: Callable[[Question, str], bool]


@dataclass(frozen=True)
class Answers:
    """The answers to one question.

    Attributes:
        num_prompt_tokens: of the prompt.
        dense: the text after the prompt, up to a stop text, with dense attention.
        sparse: the same of each contender.
    """

    num_prompt_tokens: int
    dense: str
    sparse: tuple[str, ...]


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """Returns a text up to the first of several stop texts.

    Args:
        text: the text.
        stop: the stop texts; one at the very start of the text counts too.
    """
    return text[: min((place for place in map(text.find, stop) if place >= 0), default=len(text))]
