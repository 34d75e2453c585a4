"""The lm-evaluation-harness itself is not needed here: what it is asked, and what is made of its results."""

import io
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from tests.evaluation.fake_server import FakeServer
from vllm_toptheta.errors import EvaluationError
from vllm_toptheta.evaluation.harness import HarnessReport, compare_harness_task, harness_table
from vllm_toptheta.evaluation.servers import Endpoint

NUM_QUESTIONS = 6


class FakeHarness:
    """Answers as lm_eval 0.4 does; the sparse server misses every third question and is wordier."""

    def __init__(self, output_type: str = "generate_until", error: Exception | None = None) -> None:
        self.output_type = output_type
        self.error = error
        self.calls: list[dict[str, Any]] = []

    def get_task_dict(self, names: list[str], manager: Any) -> dict[str, Any]:
        assert manager == ("manager", None)
        return {"group": {name: SimpleNamespace(OUTPUT_TYPE=self.output_type) for name in names}}

    def simple_evaluate(self, **arguments: Any) -> dict[str, Any]:
        self.calls.append(arguments)
        if self.error is not None:
            raise self.error
        is_sparse = "sparse" in arguments["model_args"]["base_url"]
        questions = range(arguments["limit"] or NUM_QUESTIONS)
        samples = [
            {
                "doc_id": doc_id,
                "filter": used_filter,
                "metrics": ["exact_match", "words", "bleu"],
                "exact_match": float(not (is_sparse and doc_id % 3 == 0)),
                "words": 10 + doc_id + 2 * is_sparse,
                "bleu": ("a", "b"),
            }
            for used_filter in ("none", "strict")
            for doc_id in (reversed(questions) if is_sparse else questions)
        ]
        return {
            "samples": {"quiz": samples},
            "higher_is_better": {"quiz": {"exact_match": True, "words": False}},
        }


def install(monkeypatch: pytest.MonkeyPatch, harness: FakeHarness) -> FakeHarness:
    package, tasks = ModuleType("lm_eval"), ModuleType("lm_eval.tasks")
    package.simple_evaluate = harness.simple_evaluate  # type: ignore[attr-defined]
    package.__version__ = "0.4.9"  # type: ignore[attr-defined]
    tasks.TaskManager = lambda include_path: ("manager", include_path)  # type: ignore[attr-defined]
    tasks.get_task_dict = harness.get_task_dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval", package)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
    return harness


def compare(**options: Any) -> HarnessReport:
    dense, sparse = (
        Endpoint(f"http://{name}", transport=FakeServer().transport(), model="m") for name in ("dense", "sparse")
    )
    return compare_harness_task("quiz", dense, sparse, **options)


def test_scores_are_paired_by_question_and_start_with_the_worst(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = install(monkeypatch, FakeHarness())
    report = compare(api_key="sesame", num_fewshot=2)
    assert [(score.metric, round(score.loss, 6)) for score in report.scores] == [
        ("words", 2.0),
        ("words, strict", 2.0),
        ("exact_match", pytest.approx(1 / 3)),
        ("exact_match, strict", pytest.approx(1 / 3)),
    ]
    match = report.scores[2]
    assert (match.num_questions, match.dense, match.sparse) == (6, 1.0, pytest.approx(2 / 3))
    assert match.p_value == 0.5
    assert match.standard_error == pytest.approx((1 / 3 * 2 / 3 / 5) ** 0.5)
    # the documents differ far more than the two servers do
    assert report.scores[0].standard_error == 0.0
    assert report.scores[0].p_value is None
    assert HarnessReport.model_validate_json(report.model_dump_json()) == report

    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(harness_table(report))
    printed = console.export_text()
    assert printed.index("words (lower is better)") < printed.index("exact_match")
    assert [call["num_fewshot"] for call in harness.calls] == [2, 2]
    assert harness.calls[0]["model_args"] == {
        "base_url": "http://dense/v1/completions",
        "model": "m",
        "num_concurrent": 4,
        "tokenizer_backend": None,
        "tokenized_requests": False,
        "header": {"Authorization": "Bearer sesame"},
    }
    assert harness.calls[1]["model_args"]["base_url"] == "http://sparse/v1/completions"
    assert "sesame" not in report.model_dump_json()


def test_tasks_that_read_the_prompt_are_refused_before_anything_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = install(monkeypatch, FakeHarness("multiple_choice"))
    with pytest.raises(EvaluationError, match="--task: quiz reads log probabilities of prompts"):
        compare()
    assert harness.calls == []


def test_what_the_harness_raises_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeHarness(error=FileNotFoundError("no data")))
    with pytest.raises(EvaluationError, match="cannot run 'quiz': FileNotFoundError: no data"):
        compare()
