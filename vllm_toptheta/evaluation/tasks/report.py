"""What a comparison of answers found: as data, as JSON, and as tables with the worst case on top."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from rich.table import Table

from vllm_toptheta.evaluation.paired import PairedShares
from vllm_toptheta.evaluation.subject import Setup
from vllm_toptheta.reference import Phase

__all__ = ["Contender", "Endpoints", "Outcome", "Place", "QuestionResult", "TaskReport", "TasksReport", "task_tables"]

_WORST_PLACES = 8


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Outcome(_Model):
    """An answer."""

    text: str
    is_correct: bool
    first_difference: int | None = Field(
        default=None, description="First character at which it differs from the dense answer; null if it does not."
    )


class QuestionResult(_Model):
    """A question with its answers."""

    name: str
    length: int | None
    depth: float | None
    num_prompt_tokens: int
    expected: str
    dense: Outcome
    sparse: dict[str, Outcome] = Field(description="By contender.")


class Place(_Model):
    """The questions of one length, or of one depth."""

    name: str
    shares: PairedShares


class Contender(_Model):
    """One sparse attention against dense attention."""

    name: str
    shares: PairedShares
    same_text_share: Annotated[float, Field(ge=0.0, le=1.0)] = Field(description="Answers equal to the dense ones.")
    mean_first_difference: float | None = Field(
        description="Characters before the first difference, mean over answers that differ; null without any."
    )
    places: tuple[Place, ...] = Field(description="The one that loses most first; empty where prompts have no place.")


class TaskReport(_Model):
    """A task, the contender that loses most first."""

    task: str
    contenders: tuple[Contender, ...] = Field(min_length=1)
    questions: tuple[QuestionResult, ...] = Field(min_length=1)


class Endpoints(_Model):
    """Two servers side by side."""

    dense_url: str
    dense_model: str
    sparse_url: str
    sparse_model: str
    value_rows_share: Annotated[float, Field(ge=0.0, le=1.0)] | None = Field(
        default=None, description="Value rows that the sparse server read over those cached; null if it does not say."
    )


class TasksReport(_Model):
    """An evaluation by tasks: how it was made, and its tasks, the one that loses most first."""

    schema_version: Literal[1] = 1
    setup: Setup | Endpoints
    phase: Phase = Field(description="Which rows were thresholded; servers keep prompts dense.")
    seed: int
    tasks: tuple[TaskReport, ...] = Field(min_length=1)


def task_tables(report: TasksReport) -> Iterator[Table]:
    """Yields a table for each task to print with rich, the worst case on top.

    Args:
        report: the report.
    """
    for task in report.tasks:
        table = Table(
            title=f"{task.task}: sparse against dense attention, {len(task.questions)} questions",
            caption="difference in points, with its paired 95 % interval; p of McNemar's exact test; greedy decoding",
        )
        table.add_column("sparse attention", no_wrap=True)
        table.add_column("questions")
        for heading in ("solved dense %", "sparse %", "difference", "95 % interval", "p", "gained", "lost"):
            table.add_column(heading, justify="right")
        table.add_column("same text %", justify="right")
        for contender in task.contenders:
            table.add_row(contender.name, "all", *_cells(contender.shares), f"{100 * contender.same_text_share:.1f}")
        table.add_section()
        places = [(contender.name, place) for contender in task.contenders for place in contender.places]
        places.sort(key=lambda named: named[1].shares.difference)
        for name, place in places[:_WORST_PLACES]:
            table.add_row(name, place.name, *_cells(place.shares), "")
        if isinstance(report.setup, Endpoints) and report.setup.value_rows_share is not None:
            table.caption = f"{table.caption}\nthe sparse server read {report.setup.value_rows_share:.1%} of value rows"
        if len(places) > _WORST_PLACES:
            table.caption = f"{table.caption}\nthe {_WORST_PLACES} worst of {len(places)} lengths and depths"
        yield table


def _cells(shares: PairedShares) -> Iterator[str]:
    yield f"{100 * shares.dense:.1f}"
    yield f"{100 * shares.sparse:.1f}"
    yield f"{100 * shares.difference:+.1f}"
    yield f"{100 * shares.low:+.1f} to {100 * shares.high:+.1f}"
    yield f"{shares.p_value:.2g}"
    yield str(shares.num_gained)
    yield str(shares.num_lost)
