"""Tasks of EleutherAI's lm-evaluation-harness, asked of two running servers and compared question by question.

The harness talks to the servers itself (`local-completions`). Only tasks that generate text say anything about sparse
decoding: all others read log probabilities of prompts, which a server computes in prefill, densely.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from rich.table import Table

from vllm_toptheta.errors import EvaluationError
from vllm_toptheta.evaluation.paired import compare_shares, mean_and_error
from vllm_toptheta.evaluation.servers import Endpoint, EndpointPair
from vllm_toptheta.evaluation.tasks.report import Endpoints

__all__ = ["HarnessReport", "HarnessScore", "compare_harness_task", "harness_table"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class HarnessScore(_Model):
    """One metric of one task."""

    task: str
    metric: str = Field(description="Its name, and the filter that was applied to the answers.")
    num_questions: int = Field(ge=1)
    higher_is_better: bool
    dense: float
    sparse: float
    difference: float = Field(description="sparse - dense.")
    standard_error: float | None = Field(description="Of the difference, paired; null for a single question.")
    p_value: float | None = Field(description="Of McNemar's exact test, where every score is 0 or 1.")

    @property
    def loss(self) -> float:
        """How much worse the sparse score is; negative if it is better."""
        return -self.difference if self.higher_is_better else self.difference


class HarnessReport(_Model):
    """What the harness measured, the score that loses most first."""

    schema_version: Literal[1] = 1
    setup: Endpoints
    harness_version: str
    num_fewshot: int | None = Field(description="Null for the task's own.")
    scores: tuple[HarnessScore, ...] = Field(min_length=1)


def compare_harness_task(
    task: str,
    dense: Endpoint,
    sparse: Endpoint,
    *,
    api_key: str | None = None,
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    concurrency: int = 4,
) -> HarnessReport:
    """Runs a task of the harness on both servers.

    Args:
        task: name of a task or group.
        dense: the server with dense attention.
        sparse: the server with sparse attention.
        api_key: of both servers; None for servers that ask for none.
        include_path: folder of further tasks' YAML files.
        num_fewshot: solved questions before each; None for the task's own.
        limit: only so many questions, the first ones.
        concurrency: questions to ask at a time.

    Raises:
        EvaluationError: the harness is not installed, cannot run the task, or the task generates no text.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager, get_task_dict
    except ImportError as error:
        raise EvaluationError(
            f"the lm-evaluation-harness is not installed ({error})",
            field="--task",
            remedy='Install it: pip install "lm-eval[api]"',
        ) from None
    pair = EndpointPair(dense, sparse)
    with _one_error(task):
        manager = TaskManager(include_path=None if include_path is None else str(include_path))
        kinds = dict(_output_types(get_task_dict([task], manager)))
    for name, output_type in kinds.items():
        if output_type != "generate_until":
            raise EvaluationError(
                f"{name} reads log probabilities of prompts, which servers compute in prefill, densely: "
                "it would not measure sparse decoding",
                field="--task",
                remedy="Choose one that generates text (output_type generate_until), or use toptheta eval perplexity",
            )

    def run(endpoint: Endpoint) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "base_url": f"{endpoint.url}/v1/completions",
            "model": endpoint.model,
            "num_concurrent": concurrency,
            # prompts go as text, so no tokenizer is needed here
            "tokenizer_backend": None,
            "tokenized_requests": False,
        }
        if api_key is not None:
            arguments["header"] = {"Authorization": f"Bearer {api_key}"}
        with _one_error(task):
            results: dict[str, Any] = lm_eval.simple_evaluate(
                model="local-completions",
                model_args=arguments,
                tasks=[task],
                task_manager=manager,
                num_fewshot=num_fewshot,
                limit=limit,
                log_samples=True,
                bootstrap_iters=0,
            )
        return results

    scores = _scores(run(dense), run(sparse))
    return HarnessReport(
        setup=pair.endpoints(),
        harness_version=lm_eval.__version__,
        num_fewshot=num_fewshot,
        scores=tuple(sorted(scores, key=lambda score: score.loss, reverse=True)),
    )


def harness_table(report: HarnessReport) -> Table:
    """Returns the report as a table to print with rich, the worst score on top.

    Args:
        report: the report.
    """
    setup = report.setup
    table = Table(
        title=f"lm-eval {report.harness_version}: {setup.sparse_url} against {setup.dense_url}",
        caption="+- is one standard error, paired; p of McNemar's exact test",
    )
    table.add_column("task", no_wrap=True)
    table.add_column("metric", no_wrap=True)
    for heading in ("questions", "dense", "sparse", "difference", "p"):
        table.add_column(heading, justify="right")
    for score in report.scores:
        error = "" if score.standard_error is None else f" +- {score.standard_error:.4f}"
        table.add_row(
            score.task,
            score.metric if score.higher_is_better else f"{score.metric} (lower is better)",
            str(score.num_questions),
            f"{score.dense:.4f}",
            f"{score.sparse:.4f}",
            f"{score.difference:+.4f}{error}",
            "" if score.p_value is None else f"{score.p_value:.2g}",
        )
    return table


@contextmanager
def _one_error(task: str) -> Iterator[None]:
    try:
        yield
    # whatever a task, its data, its metrics or a request raise: the harness has no errors of its own
    except Exception as error:
        raise EvaluationError(
            f"the lm-evaluation-harness cannot run {task!r}: {type(error).__name__}: {error}", field="--task"
        ) from error


def _output_types(tasks: Mapping[Any, Any]) -> Iterator[tuple[str, str]]:
    """Yields the name and the kind of every task, out of groups of groups."""
    for name, task in tasks.items():
        if isinstance(task, Mapping):
            yield from _output_types(task)
        else:
            yield str(name), task.OUTPUT_TYPE


def _scores(dense: dict[str, Any], sparse: dict[str, Any]) -> Iterator[HarnessScore]:
    """Pairs the samples of two runs by their document and filter."""
    for task, dense_samples in dense["samples"].items():
        others = {(sample["doc_id"], sample["filter"]): sample for sample in sparse["samples"][task]}
        values: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for sample in dense_samples:
            other = others[sample["doc_id"], sample["filter"]]
            for metric in sample["metrics"]:
                # metrics of whole collections (such as BLEU) have no number for one question
                if isinstance(sample[metric], bool | int | float):
                    pair = float(sample[metric]), float(other[metric])
                    values.setdefault((metric, sample["filter"]), []).append(pair)
        for (metric, used_filter), pairs in values.items():
            before, after = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
            difference, error = mean_and_error([y - x for x, y in pairs], [1.0] * len(pairs))
            is_binary = set(before + after) <= {0.0, 1.0}
            better = dense.get("higher_is_better", {}).get(task, {}).get(metric)
            yield HarnessScore(
                task=task,
                metric=metric if used_filter == "none" else f"{metric}, {used_filter}",
                num_questions=len(pairs),
                higher_is_better=better is not False,
                dense=sum(before) / len(before),
                sparse=sum(after) / len(after),
                difference=difference,
                standard_error=error,
                p_value=compare_shares([bool(x) for x in before], [bool(y) for y in after]).p_value
                if is_binary
                else None,
            )
