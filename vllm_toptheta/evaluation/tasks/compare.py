"""Asks the questions of tasks and compares the answers, paired."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from vllm_toptheta.calibration.progress import progress_bar
from vllm_toptheta.errors import EvaluationError
from vllm_toptheta.evaluation.paired import PairedShares, compare_shares
from vllm_toptheta.evaluation.tasks.report import Contender, Outcome, Place, QuestionResult, TaskReport
from vllm_toptheta.evaluation.tasks.task import Answers, Question, Task

__all__ = ["compare_answers", "first_difference"]


def compare_answers(
    tasks: Sequence[Task],
    contenders: Sequence[str],
    answer: Callable[[Question], Answers],
    *,
    concurrency: int = 1,
    progress: bool = True,
) -> list[TaskReport]:
    """Asks every question and compares the answers of each contender with the dense ones.

    Args:
        tasks: the tasks, each with at least one question.
        contenders: names of the sparse attentions, in the order of `Answers.sparse`.
        answer: answers a question; called from several threads if `concurrency` is more than 1.
        concurrency: questions to ask at a time.
        progress: show a progress bar on stderr.

    Returns:
        A report for each task, the one with the largest loss first.

    Raises:
        EvaluationError: there is nothing to ask or to compare.
    """
    if not tasks or not contenders:
        raise EvaluationError("nothing to compare: give at least one task and one target")
    reports = []
    with progress_bar("questions", enabled=progress) as bar, ThreadPoolExecutor(concurrency) as pool:
        for task in tasks:
            row = bar.add_task(task.name, total=len(task.questions))
            results = []
            for question, answers in zip(task.questions, pool.map(answer, task.questions), strict=True):
                results.append(_result(task, question, contenders, answers))
                bar.advance(row)
            reports.append(_report(task.name, contenders, results))
    return sorted(reports, key=lambda report: report.contenders[0].shares.difference)


def first_difference(first: str, second: str) -> int | None:
    """Returns the first place at which two texts differ, in characters; None if they are the same.

    Args:
        first: a text.
        second: another one; where one is the start of the other, they differ at its end.
    """
    if first == second:
        return None
    places = (place for place, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1])
    return next(places, min(len(first), len(second)))


def _result(task: Task, question: Question, contenders: Sequence[str], answers: Answers) -> QuestionResult:
    return QuestionResult(
        name=question.name,
        length=question.length,
        depth=question.depth,
        num_prompt_tokens=answers.num_prompt_tokens,
        expected=question.expected,
        dense=Outcome(text=answers.dense, is_correct=task.is_correct(question, answers.dense)),
        sparse={
            name: Outcome(
                text=text,
                is_correct=task.is_correct(question, text),
                first_difference=first_difference(answers.dense, text),
            )
            for name, text in zip(contenders, answers.sparse, strict=True)
        },
    )


def _report(task: str, contenders: Sequence[str], results: Sequence[QuestionResult]) -> TaskReport:
    found = []
    for name in contenders:
        differences = [result.sparse[name].first_difference for result in results]
        places = [place for place in differences if place is not None]
        found.append(
            Contender(
                name=name,
                shares=_shares(name, results),
                same_text_share=differences.count(None) / len(differences),
                mean_first_difference=sum(places) / len(places) if places else None,
                places=tuple(sorted(_places(name, results), key=lambda place: place.shares.difference)),
            )
        )
    return TaskReport(
        task=task,
        contenders=tuple(sorted(found, key=lambda contender: contender.shares.difference)),
        questions=tuple(results),
    )


def _places(name: str, results: Sequence[QuestionResult]) -> Iterator[Place]:
    for length in sorted({result.length for result in results if result.length is not None}):
        yield Place(
            name=f"length {length}", shares=_shares(name, [result for result in results if result.length == length])
        )
    for depth in sorted({result.depth for result in results if result.depth is not None}):
        yield Place(
            name=f"depth {depth:g}", shares=_shares(name, [result for result in results if result.depth == depth])
        )


def _shares(name: str, results: Sequence[QuestionResult]) -> PairedShares:
    return compare_shares(
        [result.dense.is_correct for result in results], [result.sparse[name].is_correct for result in results]
    )
