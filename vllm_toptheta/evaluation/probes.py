"""Tries the floors of kept promises on recall, beside dense attention: what is shown of a promise, and not promised.

Prompts are cut from the texts, the depths of the answers spread evenly over each. Every question is asked once densely
and once with every floor, behind one dense prompt, as a server answers it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from vllm_toptheta.calibration.data import Text, prompt_prefix, tokenise
from vllm_toptheta.errors import EvaluationError
from vllm_toptheta.evaluation.state_folder import StateFolder, model_files, naming_the_flag
from vllm_toptheta.evaluation.subject import Setup, Subject
from vllm_toptheta.evaluation.tasks.compare import compare_answers
from vllm_toptheta.evaluation.tasks.local import LocalAnswers
from vllm_toptheta.evaluation.tasks.recall import MAX_NEW_TOKENS, RECALL_TASKS
from vllm_toptheta.evaluation.tasks.report import TaskReport
from vllm_toptheta.evaluation.tasks.task import Answers, Question
from vllm_toptheta.evaluation.variants import floor_variant
from vllm_toptheta.store import Evidence, Promise, TaskProbe, TextSource, floor_label

__all__ = ["ProbeOptions", "Probes"]

# fewer show nothing; more would not all have a depth of their own
_MIN_QUESTIONS, _MAX_QUESTIONS = 4, 1000
_ANSWERS = TypeAdapter(Answers)


@dataclass(frozen=True)
class ProbeOptions:
    """What to try.

    Attributes:
        tasks: out of `needle` and `key-value`, at least one.
        lengths: tokens that a question takes with its answer, at most.
        num_questions: of each task at each length, 4 to 1000.
        seed: the same seed and texts give the same questions.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    num_questions: int = 20
    seed: int = 0


class Probes:
    """Questions, ready to be asked.

    Args:
        subject: the model.
        texts: what prompts are made of.
        options: what to try.

    Raises:
        EvaluationError: an option is impossible, or the texts are too short.
    """

    def __init__(self, subject: Subject, texts: Sequence[Text], options: ProbeOptions) -> None:
        _check(options)
        self._subject = subject
        self._options = options
        self._texts = tuple(text.source for text in texts)
        content = "\n".join(text.content for text in texts)
        last = options.num_questions - 1
        room = MAX_NEW_TOKENS + len(prompt_prefix(subject.tokenizer))
        self._tasks = {
            (name, length): replace(
                RECALL_TASKS[name](
                    content,
                    lambda sample: lambda text: len(tokenise(subject.tokenizer, text)),
                    lengths=[length - room],
                    depths=[index / last for index in range(options.num_questions)],
                    samples=1,
                    seed=options.seed,
                ),
                name=f"{name}, {length} tokens",
            )
            for name in dict.fromkeys(options.tasks)
            for length in options.lengths
        }

    def measure(self, evidence: Evidence, *, folder: Path | None = None, progress: bool = True) -> Evidence:
        """Returns evidence with what each floor that is kept solves.

        Args:
            evidence: of the subject.
            folder: keeps the answers to each question, so that a run that was killed goes on at the next one; None to
                keep nothing.
            progress: show a progress bar on stderr.

        Raises:
            CalibrationError: the model is not supported.
            EvaluationError: `folder` holds another run.
        """
        floors = sorted({promise.weight_floor for promise in evidence.promises if promise.weight_floor is not None})
        variants = [floor_variant(floor, heavy=evidence.heavy) for floor in floors]
        with naming_the_flag():
            state = StateFolder(
                folder,
                _Arguments(
                    setup=self._subject.setup(),
                    model_files=model_files(self._subject.model_dir),
                    text=self._texts,
                    floors=tuple(floors),
                    heavy=evidence.heavy,
                    **vars(self._options),
                ),
            )
            reports = compare_answers(
                list(self._tasks.values()),
                [variant.target for variant in variants],
                _KeptAnswers(LocalAnswers(self._subject, variants), state),
                progress=progress,
            )
        of_task = {report.task: report for report in reports}

        def probed(promise: Promise) -> Promise:
            if promise.weight_floor is None:
                return promise
            label = floor_label(promise.weight_floor)
            found = [_probe(name, length, of_task[task.name], label) for (name, length), task in self._tasks.items()]
            return Promise(**{**dict(promise), "probes": tuple(found)})

        return Evidence(**{**dict(evidence), "promises": tuple(map(probed, evidence.promises))})


class _Arguments(BaseModel):
    """What the answers depend on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    setup: Setup
    model_files: dict[str, tuple[int, int]]
    text: tuple[TextSource, ...]
    floors: tuple[float, ...]
    heavy: float | None
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    num_questions: int
    seed: int


class _KeptAnswers:
    """Answers questions, each once: what was answered lies in a folder under the question's name.

    Args:
        answer: answers a question.
        folder: of answers.
    """

    def __init__(self, answer: Callable[[Question], Answers], folder: StateFolder) -> None:
        self._answer = answer
        self._folder = folder

    def __call__(self, question: Question) -> Answers:
        """Returns the answers to a question, one of each floor.

        Raises:
            EvaluationError: the file is damaged, or cannot be written.
        """
        name = f"{question.name}.json"
        file = self._folder.find(name)
        if file is None:
            answers = self._answer(question)
            self._folder.write(name, _ANSWERS.dump_json(answers))
            return answers
        try:
            return _ANSWERS.validate_json(file.read_bytes())
        except (OSError, ValidationError) as error:
            raise EvaluationError("damaged", file=file, remedy="Delete it, and the question is asked again") from error


def _check(options: ProbeOptions) -> None:
    for name in options.tasks:
        if name not in RECALL_TASKS:
            raise EvaluationError(
                f"no task that floors are tried on: {name!r}",
                field="--tasks",
                remedy=f"Choose {', '.join(RECALL_TASKS)}; toptheta eval tasks has others",
            )
    if not _MIN_QUESTIONS <= options.num_questions <= _MAX_QUESTIONS:
        raise EvaluationError(
            f"{options.num_questions} questions of each task and length",
            field="--questions",
            remedy=f"Ask for {_MIN_QUESTIONS} to {_MAX_QUESTIONS}",
        )


def _probe(name: str, length: int, report: TaskReport, label: str) -> TaskProbe:
    """What a floor solved of one task at one length."""
    shares = next(contender.shares for contender in report.contenders if contender.name == label)
    return TaskProbe.model_validate(
        {
            "task": name,
            "length": length,
            "num_questions": shares.num_tasks,
            "num_solved_dense": sum(result.dense.is_correct for result in report.questions),
            "num_solved_sparse": sum(result.sparse[label].is_correct for result in report.questions),
            "num_gained": shares.num_gained,
            "num_lost": shares.num_lost,
            "difference_low": shares.low,
            "difference_high": shares.high,
        }
    )
