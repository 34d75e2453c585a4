from pathlib import Path

import pytest

from vllm_toptheta.evaluation import Subject, evaluate_perplexity, expand_variants, text_domain
from vllm_toptheta.evaluation.perplexity_report import PerplexityReport
from vllm_toptheta.evaluation.plots import draw_recall, draw_trade_offs, recall_figure, trade_off_figure
from vllm_toptheta.evaluation.tasks import Answers, Question, Task, TasksReport, compare_answers
from vllm_toptheta.evaluation.tasks.report import Endpoints
from vllm_toptheta.store import ThresholdStore


@pytest.fixture(scope="module")
def report(folder: Path, store: ThresholdStore) -> PerplexityReport:
    subject = Subject(folder / "tiny", {"": store}, device="cpu")
    domain = text_domain(
        "two words",
        [folder / "prose.txt"],
        subject.tokenizer,
        num_sequences=2,
        length=80,
        num_prompt_tokens=0,
        seed=0,
    )
    variants = expand_variants(subject.stores, targets=["8", "32"], compensations=["none", "sdc+vmc"], top_k=[8, 32])
    return evaluate_perplexity(subject, [domain], variants, progress=False)


def test_points_are_those_of_the_report(report: PerplexityReport) -> None:
    (domain,) = report.domains
    figure = trade_off_figure(report, domain)
    for axes, share in zip(figure.axes, ("value_rows_share", "attention_elements_share"), strict=True):
        drawn = {
            (label, round(x, 9), round(y, 9))
            for container, label in zip(*axes.get_legend_handles_labels(), strict=True)
            for x, y in container[0].get_xydata().tolist()
        }
        expected = {
            (
                f"{comparison.variant.method.replace('_', '-')} {comparison.variant.compensation}",
                round(100 * getattr(comparison, share), 9),
                round(comparison.change_percent, 9),
            )
            for comparison in domain.comparisons
        }
        assert drawn == expected
        assert len(expected) == 8
        assert axes.get_xlabel().startswith(share.replace("_", " ").removesuffix(" share"))


def test_files_are_named_after_domains_and_do_not_change(report: PerplexityReport, tmp_path: Path) -> None:
    (first,) = draw_trade_offs(report, tmp_path / "new" / "folder")
    assert first.name == "trade-off-two-words.png"
    (second,) = draw_trade_offs(report, tmp_path)
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes().startswith(b"\x89PNG")


def test_recall_is_drawn_over_length_and_depth(tmp_path: Path) -> None:
    questions = [
        Question(f"{length} {depth}", "", 1, (), length=length, depth=depth)
        for length in (100, 200)
        for depth in (0.0, 0.5, 1.0)
    ]

    def answer(question: Question) -> Answers:
        return Answers(1, dense="right", sparse=("wrong" if question.depth == 0.5 else "right",))

    placed = Task("recall", questions, lambda question, text: text == "right")
    unplaced = Task("other", [Question("one", "", 1, ())], lambda question, text: True)
    tasks = compare_answers([placed, unplaced], ["sparse"], answer, progress=False)
    dense, sparse, _ = recall_figure(tasks[0]).axes
    assert dense.images[0].get_array().tolist() == [[100, 100]] * 3
    assert sparse.images[0].get_array().tolist() == [[100, 100], [0, 0], [100, 100]]
    assert [label.get_text() for label in dense.get_yticklabels()] == ["0", "50", "100"]
    servers = Endpoints(dense_url="a", dense_model="m", sparse_url="b", sparse_model="m")
    report = TasksReport(setup=servers, phase="decode", seed=0, tasks=tuple(tasks))
    assert [file.name for file in draw_recall(report, tmp_path)] == ["recall-recall.png"]
