"""Tasks that are answered by generating text, once dense and once sparse."""

from vllm_toptheta.evaluation.tasks.compare import compare_answers
from vllm_toptheta.evaluation.tasks.human_eval import human_eval_task, solutions_domain
from vllm_toptheta.evaluation.tasks.local import LocalAnswers
from vllm_toptheta.evaluation.tasks.make import TASK_NAMES, TaskOptions, make_tasks
from vllm_toptheta.evaluation.tasks.recall import TokenCounter, key_value_task, needle_task
from vllm_toptheta.evaluation.tasks.report import TaskReport, TasksReport, task_tables
from vllm_toptheta.evaluation.tasks.task import Answers, Question, Task

__all__ = [
    "TASK_NAMES",
    "Answers",
    "LocalAnswers",
    "Question",
    "Task",
    "TaskOptions",
    "TaskReport",
    "TasksReport",
    "TokenCounter",
    "compare_answers",
    "human_eval_task",
    "key_value_task",
    "make_tasks",
    "needle_task",
    "solutions_domain",
    "task_tables",
]
