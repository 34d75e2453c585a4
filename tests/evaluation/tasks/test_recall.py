import re
from collections.abc import Callable

import numpy as np
import pytest

from vllm_toptheta.errors import EvaluationError
from vllm_toptheta.evaluation.tasks import Task, key_value_task, needle_task

TEXT = " ".join(
    f"{word} {'abcdefghij'[index % 10]}{word[::-1]} rest."
    for index, word in enumerate(
        "".join(letters) for letters in np.random.default_rng(0).choice(list("abcdefghijklmnop"), (400, 6))
    )
)
MAKERS = pytest.mark.parametrize("make", [needle_task, key_value_task])
Maker = Callable[..., Task]


def characters(sample: str) -> Callable[[str], int]:
    return len


def ask(make: Maker, **options: object) -> Task:
    return make(TEXT, characters, **{"lengths": [900, 1500], "depths": [0.0, 0.5, 1.0], "samples": 2, **options})


@MAKERS
def test_questions_cover_lengths_depths_and_samples(make: Maker) -> None:
    questions = ask(make).questions
    assert len({question.name for question in questions}) == len(questions) == 12
    assert len({question.prompt for question in questions}) == 12
    for question in questions:
        assert question.length is not None
        assert question.length - 120 < len(question.prompt) <= question.length
        assert len(re.findall(rf"\b{question.expected}\b", question.prompt)) == 1
        assert question.prompt.endswith(" is")


@MAKERS
def test_the_answer_lies_at_its_depth(make: Maker) -> None:
    for question in ask(make, depths=[0.0, 0.3, 1.0]).questions:
        # without the frame around it
        body = question.prompt.rsplit("\n\n", 1)[0].removeprefix("Here is a list of keys and their values.\n")
        place = body.index(question.expected) / len(body)
        assert question.depth is not None
        assert abs(place - question.depth) < 0.06


@MAKERS
def test_the_same_seed_gives_the_same_questions(make: Maker) -> None:
    assert ask(make).questions == ask(make).questions
    assert ask(make).questions != ask(make, seed=1).questions
    # a question does not depend on which others are asked
    assert set(ask(make, lengths=[900], depths=[0.5]).questions) < set(ask(make).questions)


@MAKERS
def test_an_answer_is_right_if_it_contains_the_number(make: Maker) -> None:
    task = ask(make)
    question = task.questions[0]
    assert task.is_correct(question, f" {question.expected}.")
    assert not task.is_correct(question, f" {question.expected[:-1]}")
    assert not task.is_correct(question, "")


def test_the_pair_that_is_asked_for_is_in_the_list_once() -> None:
    for question in ask(key_value_task).questions:
        (key,) = re.findall(r"The value of (\S+) is$", question.prompt)
        assert question.prompt.count(f"{key}: {question.expected}\n") == 1
        keys = re.findall(r"^(\S+): \d+$", question.prompt, re.MULTILINE)
        assert len(set(keys)) == len(keys) > 10


@MAKERS
def test_what_cannot_be_asked_is_refused(make: Maker) -> None:
    with pytest.raises(EvaluationError, match="lengths: the text is too short, or the length too small"):
        ask(make, lengths=[50])
    with pytest.raises(EvaluationError, match="depths: from 0 to 1"):
        ask(make, depths=[50])
    with pytest.raises(EvaluationError, match="give at least one length"):
        ask(make, lengths=[])
    with pytest.raises(EvaluationError, match="the text is too short"):
        make("too short to hide anything", characters, lengths=[900], depths=[0.5], samples=1)
