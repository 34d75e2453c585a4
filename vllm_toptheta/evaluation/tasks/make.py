"""Tasks by their names."""

from collections.abc import Sequence
from pathlib import Path

from vllm_toptheta.calibration.data import different_texts, read_text
from vllm_toptheta.errors import EvaluationError
from vllm_toptheta.evaluation.tasks.human_eval import human_eval_task
from vllm_toptheta.evaluation.tasks.recall import RECALL_TASKS, TokenCounter
from vllm_toptheta.evaluation.tasks.task import Task

__all__ = ["TASK_NAMES", "make_tasks"]

TASK_NAMES = (*RECALL_TASKS, "human-eval")


def make_tasks(
    names: Sequence[str],
    token_counter: TokenCounter,
    *,
    texts: Sequence[Path] = (),
    lengths: Sequence[int] = (),
    depths: Sequence[float] = (),
    samples: int = 1,
    limit: int | None = None,
    shots: int = 0,
    allow_code_execution: bool = False,
    seed: int = 0,
) -> list[Task]:
    """Makes the tasks that were asked for.

    Args:
        names: out of `TASK_NAMES`.
        token_counter: given a sample, returns what counts the tokens of such text, about; for needle and key-value,
            like the arguments up to `samples`.
        texts: UTF-8 text files to make prompts of.
        lengths: tokens of the prompts, about.
        depths: where the answer lies, from 0 to 1.
        samples: questions for each length and depth.
        limit: only so many problems of human-eval, like the two that follow.
        shots: solved problems before each.
        allow_code_execution: must be true.
        seed: the same seed and texts give the same questions.

    Raises:
        CalibrationError: a text cannot be used.
        EvaluationError: a name is unknown, or the options do not fit a task.
    """
    for name in names:
        if name not in TASK_NAMES:
            raise EvaluationError(f"unknown task {name!r}", field="--tasks", remedy=f"Choose {', '.join(TASK_NAMES)}")
    tasks = []
    for name in dict.fromkeys(names):
        if name == "human-eval":
            tasks.append(human_eval_task(allow_code_execution=allow_code_execution, limit=limit, shots=shots))
            continue
        if not texts:
            raise EvaluationError(f"{name} needs text to make prompts of", field="--text", remedy="Give text files")
        content = "\n".join(text.content for text in different_texts([read_text(file) for file in texts]))
        tasks.append(
            RECALL_TASKS[name](content, token_counter, lengths=lengths, depths=depths, samples=samples, seed=seed)
        )
    return tasks
