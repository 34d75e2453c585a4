"""Tasks beside a promise: the right questions, counted in pairs; and a run that was killed goes on."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.calibration.tiny_model import write_text
from tests.quality_factory import make_evidence, make_probe, make_promise
from vllm_toptheta.calibration.data import Text, read_text
from vllm_toptheta.errors import EvaluationError
from vllm_toptheta.evaluation import ProbeOptions, Probes, Subject, Variant, probes
from vllm_toptheta.evaluation.paired import compare_shares
from vllm_toptheta.evaluation.tasks import Answers, LocalAnswers, Question, Task
from vllm_toptheta.evaluation.tasks.recall import MAX_NEW_TOKENS, RECALL_TASKS
from vllm_toptheta.evaluation.variants import floor_variant
from vllm_toptheta.store import Evidence

LENGTH = 400
SMALL = ProbeOptions(("needle",), (LENGTH,), 4)


@pytest.fixture(scope="module")
def subject(folder: Path) -> Subject:
    return Subject(folder / "tiny", {}, device="cpu")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Text]:
    return [read_text(write_text(tmp_path_factory.mktemp("texts") / "long.txt", 900, seed=5))]


def kept(*floors: float, **fields: Any) -> Evidence:
    """Evidence of a user's own promise and of presets, with these floors."""
    presets = [{}, {"preset": "fast", "max_loss": 1.0}, {"preset": "high", "max_loss": 0.2}]
    promises = [make_promise(floor, lengths=(LENGTH,), **of) for floor, of in zip(floors, presets, strict=False)]
    broken = make_promise(None, preset="exact", max_loss=0.05)
    return make_evidence(*promises, broken, **fields)


def right_at(depths: Sequence[float], question: Question) -> str:
    return f" {question.expected}." if question.depth in depths else " none"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Question]:
    """Has dense attention solve depths 0 and .25, floor 1 those and 1, floor 2 only 0; lists what was asked."""
    solved = {"floor:1": (0.0, 0.25, 1.0), "floor:2": (0.0,)}
    questions: list[Question] = []

    class MadeUpAnswers:
        def __init__(self, subject: Subject, variants: Sequence[Variant]) -> None:
            self.targets = [variant.target for variant in variants]

        def __call__(self, question: Question) -> Answers:
            questions.append(question)
            sparse = tuple(right_at(solved[target], question) for target in self.targets)
            return Answers(7, right_at((0.0, 0.25), question), sparse)

    monkeypatch.setattr(probes, "LocalAnswers", MadeUpAnswers)
    return questions


def test_what_is_gained_and_lost_is_counted_in_pairs(
    subject: Subject, texts: list[Text], asked: list[Question]
) -> None:
    before = kept(2.0, 1.0, 2.0)
    options = ProbeOptions(("key-value", "needle"), (500, LENGTH), 5)
    after = Probes(subject, texts, options).measure(before, progress=False)
    # dense 2 of 5; floor 2 lost one of them, floor 1 gained one
    lost = compare_shares([True, True, False, False, False], [True, False, False, False, False])
    gained = compare_shares([True, True, False, False, False], [True, True, False, False, True])
    for promise, shares, solved, counts in (
        (after.promises[0], lost, 1, (0, 1)),
        (after.promises[1], gained, 3, (1, 0)),
        (after.promises[2], lost, 1, (0, 1)),
    ):
        assert [(one.task, one.length) for one in promise.probes or ()] == [
            *(("key-value", 500), ("key-value", LENGTH)),
            *(("needle", 500), ("needle", LENGTH)),
        ]
        for one in promise.probes or ():
            assert (one.num_questions, one.num_solved_dense, one.num_solved_sparse) == (5, 2, solved)
            assert (one.num_gained, one.num_lost) == counts
            assert (one.difference_low, one.difference_high) == (shares.low, shares.high)
            assert one.difference == pytest.approx(shares.difference)
            assert not one.tells_nothing
    assert after.promises[3] == before.promises[3]
    # nothing else is touched, and every question was asked once
    bare = [promise.model_copy(update={"probes": None}) for promise in after.promises]
    assert after.model_copy(update={"promises": tuple(bare)}) == before
    assert len({question.prompt for question in asked}) == len(asked) == 2 * 2 * 5


@pytest.mark.parametrize("heavy", [None, 0.01])
def test_floors_answer_as_they_do_alone(
    subject: Subject, texts: list[Text], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heavy: float | None
) -> None:
    """A tiny model solves nothing, so an answer counts as right if the sum of its characters is even."""

    def is_right(answer: str) -> bool:
        return sum(map(ord, answer)) % 2 == 0

    tasks: list[Task] = []

    def judged(*arguments: Any, **options: Any) -> Task:
        tasks.append(replace(needle(*arguments, **options), is_correct=lambda question, answer: is_right(answer)))
        return tasks[-1]

    needle = RECALL_TASKS["needle"]
    monkeypatch.setitem(RECALL_TASKS, "needle", judged)
    evidence = kept(0.3, 3.0, mode="values" if heavy is None else "shadow", heavy=heavy)
    after = Probes(subject, texts, SMALL).measure(evidence, folder=tmp_path / "state", progress=False)
    differing = 0
    for promise in after.promises[:2]:
        alone = LocalAnswers(subject, [floor_variant(promise.weight_floor or 0.0, heavy=heavy)])
        found = [alone(question) for question in tasks[0].questions]
        # a prompt leaves room for its answer, and no more than the next piece of the text would have taken
        assert all(LENGTH - MAX_NEW_TOKENS - 162 <= one.num_prompt_tokens <= LENGTH - MAX_NEW_TOKENS for one in found)
        differing += sum(one.dense != one.sparse[0] for one in found)
        dense = [is_right(one.dense) for one in found]
        sparse = [is_right(one.sparse[0]) for one in found]
        shares = compare_shares(dense, sparse)
        (probe,) = promise.probes or ()
        assert (probe.num_solved_dense, probe.num_solved_sparse) == (sum(dense), sum(sparse))
        assert (probe.num_gained, probe.num_lost) == (shares.num_gained, shares.num_lost)
    assert differing


def test_one_that_was_killed_goes_on_at_the_next_question(
    subject: Subject, texts: list[Text], asked: list[Question], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Probes(subject, texts, SMALL).measure(kept(2.0, 1.0), progress=False)
    asked.clear()
    made_up = probes.LocalAnswers.__call__

    def dies(self: Any, question: Question) -> Answers:
        answers = made_up(self, question)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return answers

    monkeypatch.setattr(probes.LocalAnswers, "__call__", dies)
    with pytest.raises(KeyboardInterrupt):
        Probes(subject, texts, SMALL).measure(kept(2.0, 1.0), folder=tmp_path, progress=False)
    num_asked = len(asked)
    assert Probes(subject, texts, SMALL).measure(kept(2.0, 1.0), folder=tmp_path, progress=False) == whole
    # only the question that was never answered
    assert len(asked) == 4 + 1
    assert num_asked < len(asked)
    with pytest.raises(EvaluationError, match=r"resume: .* with other floors\. .* start anew with --no-resume"):
        Probes(subject, texts, SMALL).measure(kept(2.0), folder=tmp_path, progress=False)
    damaged = next(file for file in tmp_path.iterdir() if file.name.startswith("needle"))
    damaged.write_text("{")
    with pytest.raises(EvaluationError, match="damaged. Delete it, and the question is asked again") as caught:
        Probes(subject, texts, SMALL).measure(kept(2.0, 1.0), folder=tmp_path, progress=False)
    assert caught.value.file == damaged


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"tasks": ("needle", "human-eval")},
            "--tasks: no task that floors are tried on: 'human-eval'. Choose needle, ",
        ),
        ({"num_questions": 3}, "--questions: 3 questions of each task and length. Ask for 4 to 1000"),
        ({"num_questions": 1001}, "--questions: 1001 questions"),
        ({"lengths": (LENGTH, 9000)}, r"lengths: the text is too short, .* more text \(--text\), .* \(--lengths\)"),
        ({"lengths": (160,)}, "lengths: the text is too short, or the length too small"),
    ],
)
def test_what_cannot_be_asked_is_refused_at_once(
    subject: Subject, texts: list[Text], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(EvaluationError, match=message):
        Probes(subject, texts, replace(SMALL, **change))


@pytest.mark.parametrize(("solved", "tells_nothing"), [(0, True), (3, True), (4, False), (20, False)])
def test_a_model_that_solves_nothing_densely_says_nothing_of_a_floor(solved: int, tells_nothing: bool) -> None:
    probe = make_probe(dense=solved, lost=0)
    assert probe.tells_nothing == tells_nothing
    assert ("tells nothing of this model at this length" in probe.remark) == tells_nothing
