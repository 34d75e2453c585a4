"""The commands `toptheta eval endpoint` and `toptheta eval lm-eval`: two servers side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_toptheta.cli import eval_options as options
from vllm_toptheta.cli.eval_options import drawing, task_options, text_files
from vllm_toptheta.cli.terminal import print_table, words, write_json
from vllm_toptheta.errors import EvaluationError

if TYPE_CHECKING:
    from vllm_toptheta.evaluation.servers import Endpoint

__all__ = ["evaluate_endpoints", "evaluate_harness"]


def evaluate_endpoints(
    context: typer.Context,
    dense: options.DenseUrlOption,
    sparse: options.SparseUrlOption,
    text: options.TextOption = None,
    tasks: options.TasksOption = "needle,key-value",
    lengths: options.LengthsOption = "1024,2048",
    depths: options.DepthsOption = "0,25,50,75,100",
    samples: options.SamplesOption = 4,
    limit: options.LimitOption = None,
    shots: options.ShotsOption = 0,
    allow_code_execution: options.AllowOption = False,
    dense_model: options.DenseModelOption = None,
    sparse_model: options.SparseModelOption = None,
    api_key_env: options.KeyOption = "OPENAI_API_KEY",
    concurrency: options.ConcurrencyOption = 4,
    seed: options.SeedOption = 0,
    json: options.JsonOption = None,
    plots: options.PlotsOption = None,
) -> None:
    """The same tasks, asked of two running OpenAI servers side by side."""
    from vllm_toptheta.evaluation.servers import EndpointPair
    from vllm_toptheta.evaluation.tasks import TasksReport, compare_answers, make_tasks, task_tables

    draw = drawing("draw_recall", plots)
    if "perplexity" in words(tasks):
        raise EvaluationError(
            "servers compute log probabilities of prompts in prefill, densely: they would not measure decoding",
            field="--tasks",
            remedy="Use toptheta eval perplexity",
        )
    pair = EndpointPair(_endpoint(dense, dense_model, api_key_env), _endpoint(sparse, sparse_model, api_key_env))
    allowed = {"limit": limit, "shots": shots, "allow_code_execution": allow_code_execution}
    chosen = task_options(tasks, lengths, depths, samples=samples, seed=seed, **allowed)
    asked = make_tasks(chosen, pair.token_counter, text_files([*(text or []), *context.args]))
    found = compare_answers(asked, [sparse], pair, concurrency=concurrency)
    report = TasksReport(setup=pair.endpoints(), phase="decode", seed=seed, tasks=tuple(found))
    for table in task_tables(report):
        print_table(table)
    write_json(json, report)
    draw(report)


def evaluate_harness(
    task: Annotated[str, typer.Option(help="A task of the lm-evaluation-harness that generates text.")],
    dense: options.DenseUrlOption,
    sparse: options.SparseUrlOption,
    include_path: Annotated[Path | None, typer.Option(help="Folder of further tasks' YAML files.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Solved questions before each; default: the task's.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first questions.")] = None,
    dense_model: options.DenseModelOption = None,
    sparse_model: options.SparseModelOption = None,
    api_key_env: options.KeyOption = "OPENAI_API_KEY",
    concurrency: options.ConcurrencyOption = 4,
    json: options.JsonOption = None,
) -> None:
    """A task of the lm-evaluation-harness, which has to be installed, on two running OpenAI servers."""
    import os

    from vllm_toptheta.evaluation.harness import compare_harness_task, harness_table

    report = compare_harness_task(
        task,
        _endpoint(dense, dense_model, api_key_env),
        _endpoint(sparse, sparse_model, api_key_env),
        api_key=os.environ.get(api_key_env),
        include_path=include_path,
        num_fewshot=num_fewshot,
        limit=limit,
        concurrency=concurrency,
    )
    print_table(harness_table(report))
    write_json(json, report)


def _endpoint(url: str, model: str | None, api_key_env: str) -> Endpoint:
    import os

    from vllm_toptheta.evaluation.servers import Endpoint

    return Endpoint(url, model=model, api_key=os.environ.get(api_key_env))
