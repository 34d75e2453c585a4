"""Tasks by their names."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_toptheta.calibration.data import different_texts, read_text
from vllm_toptheta.errors import EvaluationError
from vllm_toptheta.evaluation.tasks.human_eval import human_eval_task
from vllm_toptheta.evaluation.tasks.recall import RECALL_TASKS, TokenCounter
from vllm_toptheta.evaluation.tasks.task import Task

__all__ = ["TASK_NAMES", "TaskOptions", "make_tasks"]

TASK_NAMES = (*RECALL_TASKS, "human-eval")


@dataclass(frozen=True)
class TaskOptions:
    """What can be chosen about tasks.

    Attributes:
        names: out of `TASK_NAMES`.
        lengths: tokens of the prompts of needle and key-value, about.
        depths: where the answer lies, from 0 to 1.
        samples: questions for each length and depth.
        seed: the same seed and texts give the same questions.
        limit: only so many problems of human-eval.
        shots: solved problems before each.
        allow_code_execution: must be true for human-eval.
    """

    names: Sequence[str]
    lengths: Sequence[int] = ()
    depths: Sequence[float] = ()
    samples: int = 1
    seed: int = 0
    limit: int | None = None
    shots: int = 0
    allow_code_execution: bool = False


def make_tasks(options: TaskOptions, token_counter: TokenCounter, texts: Sequence[Path] = ()) -> list[Task]:
    """Makes the tasks that were asked for.

    Args:
        options: what was asked for.
        token_counter: given a sample, returns what counts the tokens of such text, about.
        texts: UTF-8 text files to make prompts of.

    Raises:
        CalibrationError: a text cannot be used.
        EvaluationError: a name is unknown, or the options do not fit a task.
    """
    for name in options.names:
        if name not in TASK_NAMES:
            raise EvaluationError(f"unknown task {name!r}", field="--tasks", remedy=f"Choose {', '.join(TASK_NAMES)}")
    tasks = []
    for name in dict.fromkeys(options.names):
        if name == "human-eval":
            allowed = options.allow_code_execution
            tasks.append(human_eval_task(allow_code_execution=allowed, limit=options.limit, shots=options.shots))
            continue
        if not texts:
            raise EvaluationError(f"{name} needs text to make prompts of", field="--text", remedy="Give text files")
        content = "\n".join(text.content for text in different_texts([read_text(file) for file in texts]))
        tasks.append(
            RECALL_TASKS[name](
                content,
                token_counter,
                lengths=options.lengths,
                depths=options.depths,
                samples=options.samples,
                seed=options.seed,
            )
        )
    return tasks
