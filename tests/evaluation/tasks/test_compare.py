import io

import pytest
from rich.console import Console

from vllm_toptheta.errors import EvaluationError
from vllm_toptheta.evaluation.tasks import Answers, Question, Task, TasksReport, compare_answers, task_tables
from vllm_toptheta.evaluation.tasks.compare import first_difference
from vllm_toptheta.evaluation.tasks.report import Endpoints
from vllm_toptheta.evaluation.tasks.task import cut_at_stop


def recall(num_samples: int = 4) -> Task:
    questions = [
        Question(f"{length} {depth} {sample}", "?", 4, (), expected="yes", length=length, depth=depth)
        for length in (100, 200)
        for depth in (0.0, 1.0)
        for sample in range(num_samples)
    ]
    return Task("recall", questions, lambda question, answer: question.expected in answer)


def answer(question: Question) -> Answers:
    """Dense attention is always right; `good` says it otherwise, `bad` fails at depth 1 of length 200."""
    is_bad = question.length == 200 and question.depth == 1.0
    return Answers(7, dense="yes", sparse=("yes indeed", "no" if is_bad else "yes"))


def test_contenders_and_places_start_with_the_worst() -> None:
    (report,) = compare_answers([recall()], ["good", "bad"], answer, progress=False)
    assert [contender.name for contender in report.contenders] == ["bad", "good"]
    bad, good = report.contenders
    assert (bad.shares.dense, bad.shares.sparse, bad.shares.num_lost) == (1.0, 0.75, 4)
    assert (good.shares.difference, good.shares.p_value) == (0.0, 1.0)
    assert bad.shares.p_value == pytest.approx(0.125)
    assert [(place.name, place.shares.difference) for place in bad.places] == [
        ("length 200", -0.5),
        ("depth 1", -0.5),
        ("length 100", 0.0),
        ("depth 0", 0.0),
    ]
    assert (bad.same_text_share, bad.mean_first_difference) == (0.75, 0.0)
    assert (good.same_text_share, good.mean_first_difference) == (0.0, 3.0)


def test_answers_keep_their_questions_however_many_are_asked_at_a_time() -> None:
    (one,) = compare_answers([recall()], ["good", "bad"], answer, progress=False)
    (many,) = compare_answers([recall()], ["good", "bad"], answer, concurrency=5, progress=False)
    assert one == many
    assert [question.name for question in many.questions] == [question.name for question in recall().questions]


def test_tasks_start_with_the_worst_and_tables_show_it() -> None:
    easy = Task("easy", [Question("one", "?", 4, ())], lambda question, text: True)
    tasks = compare_answers([easy, recall()], ["good", "bad"], answer, progress=False)
    assert [task.task for task in tasks] == ["recall", "easy"]
    report = TasksReport(
        setup=Endpoints(dense_url="http://a", dense_model="m", sparse_url="http://b", sparse_model="m"),
        phase="decode",
        seed=0,
        tasks=tuple(tasks),
    )
    assert TasksReport.model_validate_json(report.model_dump_json()) == report
    console = Console(width=200, file=io.StringIO(), record=True)
    for table in task_tables(report):
        console.print(table)
    lines = [line for line in console.export_text().splitlines() if "│" in line]
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]
    assert cells[0][:5] == ["bad", "all", "100.0", "75.0", "-25.0"]
    assert cells[0][7:] == ["0", "4", "75.0"]
    assert cells[2][:5] == ["bad", "length 200", "100.0", "50.0", "-50.0"]


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(EvaluationError, match="nothing to compare"):
        compare_answers([], ["good"], answer, progress=False)
    with pytest.raises(EvaluationError, match="nothing to compare"):
        compare_answers([recall()], [], answer, progress=False)


def test_first_difference() -> None:
    assert first_difference("same", "same") is None
    assert first_difference("same", "sane") == 2
    assert first_difference("short", "shorter") == 5
    assert first_difference("", "x") == 0


def test_a_text_is_cut_at_the_first_stop() -> None:
    assert cut_at_stop("a\nb c", ("\n", " ")) == "a"
    assert cut_at_stop("\nb", ("\n",)) == ""
    assert cut_at_stop("a b", ("\n",)) == "a b"
    assert cut_at_stop("a b", ()) == "a b"
