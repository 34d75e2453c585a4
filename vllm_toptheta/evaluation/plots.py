"""Figures: quality against what is still read, as in Top-Theta Attention (arXiv 2502.08363), and recall over prompts.

Needs matplotlib, so this module is imported only where something is to be drawn.
"""

import io
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vllm_toptheta.errors import EvaluationError
from vllm_toptheta.evaluation.perplexity_report import Comparison, DomainReport, PerplexityReport
from vllm_toptheta.evaluation.tasks.report import TaskReport, TasksReport
from vllm_toptheta.evaluation.variants import Variant
from vllm_toptheta.whole_file import write_whole

__all__ = ["draw_recall", "draw_trade_offs", "recall_figure", "trade_off_figure"]

_DPI = 120
_MARKERS = "os^Dv<>pP*Xh"


def draw_trade_offs(report: PerplexityReport, folder: Path) -> list[Path]:
    """Draws `trade_off_figure` of each domain.

    Args:
        report: the report.
        folder: where to write `trade-off-<domain>.png`; made if need be.

    Returns:
        The files, the worst domain first.
    """
    return [_write(trade_off_figure(report, domain), folder, f"trade-off-{domain.domain}") for domain in report.domains]


def draw_recall(report: TasksReport, folder: Path) -> list[Path]:
    """Draws `recall_figure` of each task whose answers lie at some depth.

    Args:
        report: the report.
        folder: where to write `recall-<task>.png`; made if need be.

    Returns:
        The files, the worst task first.
    """
    return [
        _write(recall_figure(task), folder, f"recall-{task.task}")
        for task in report.tasks
        if all(question.depth is not None for question in task.questions)
    ]


def trade_off_figure(report: PerplexityReport, domain: DomainReport) -> Figure:
    """Returns the change of perplexity against value rows read, and against attention elements kept.

    A line is one method with one compensation; its points are the targets, with one standard error.

    Args:
        report: the report.
        domain: one of its domains.
    """
    figure = Figure(figsize=(12, 5), layout="constrained")
    FigureCanvasAgg(figure)
    rows, elements = figure.subplots(1, 2, sharey=True)
    for axes, share, label in (
        (rows, "value_rows_share", "value rows read by a kv head, % of those cached"),
        (elements, "attention_elements_share", "attention elements kept by a query head, %"),
    ):
        for index, (name, comparisons) in enumerate(_lines(domain)):
            _draw_line(axes, name, comparisons, share, _MARKERS[index % len(_MARKERS)])
        axes.axhline(0.0, color="black", linewidth=0.8)
        axes.set_xlim(left=0.0)
        # tenths and tens of percent have to be told apart in one picture
        axes.set_yscale("symlog", linthresh=1.0)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    rows.set_ylabel("change of perplexity against dense, %")
    figure.legend(*rows.get_legend_handles_labels(), loc="outside right center", fontsize="small")
    figure.suptitle(f"{report.setup.model} on {domain.domain}, phase {report.phase}")
    return figure


def _lines(domain: DomainReport) -> Iterator[tuple[str, list[Comparison]]]:
    by_name = sorted(domain.comparisons, key=lambda comparison: _name(comparison.variant))
    for name, comparisons in groupby(by_name, key=lambda comparison: _name(comparison.variant)):
        yield name, sorted(comparisons, key=lambda comparison: comparison.value_rows_share)


def _name(variant: Variant) -> str:
    method = variant.method.replace("_", "-")
    parts = (method, variant.thresholds, variant.compensation, variant.restrictions)
    return " ".join(part for part in parts if part)


def _draw_line(axes: Axes, name: str, comparisons: list[Comparison], share: str, marker: str) -> None:
    shares = [100 * getattr(comparison, share) for comparison in comparisons]
    changes = [comparison.change_percent for comparison in comparisons]
    errors = [comparison.change_standard_error or 0.0 for comparison in comparisons]
    style = "--" if name.startswith("top-k") else "-"
    axes.errorbar(shares, changes, yerr=errors, label=name, marker=marker, linestyle=style, markersize=5, capsize=2)


def recall_figure(task: TaskReport) -> Figure:
    """Returns the share of right answers over the length of the prompt and the depth of the answer.

    One panel is dense attention, and one each contender, the worst first.

    Args:
        task: a task whose answers lie at some depth.
    """
    lengths = sorted({question.length or 0 for question in task.questions})
    depths = sorted({question.depth or 0.0 for question in task.questions})
    names = [contender.name for contender in task.contenders]
    figure = Figure(figsize=(2 + 3 * (1 + len(names)), 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 1 + len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, [None, *names], strict=True):
        cells: dict[tuple[float, int], list[bool]] = {}
        for question in task.questions:
            outcome = question.dense if name is None else question.sparse[name]
            cells.setdefault((question.depth or 0.0, question.length or 0), []).append(outcome.is_correct)
        shares = np.array([[100 * np.mean(cells[depth, length]) for length in lengths] for depth in depths])
        image = axes.imshow(shares, vmin=0, vmax=100, cmap="viridis", aspect="auto")
        for (row, column), share in np.ndenumerate(shares):
            axes.text(column, row, f"{share:.0f}", ha="center", va="center", color="white" if share < 60 else "black")
        axes.set_title("dense" if name is None else name, fontsize="small")
        axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{100 * depth:g}" for depth in depths])
        axes.set_xlabel("prompt, tokens")
    panels[0].set_ylabel("depth of the answer, %")
    figure.colorbar(image, ax=panels, label="right answers, %")
    figure.suptitle(task.task)
    return figure


def _write(figure: Figure, folder: Path, name: str) -> Path:
    file = folder / ("".join(letter if letter.isalnum() else "-" for letter in name) + ".png")
    drawn = io.BytesIO()
    # no metadata, so that the same report gives the same bytes
    figure.savefig(drawn, dpi=_DPI, metadata={"Software": None}, format="png")
    try:
        write_whole(file, drawn.getvalue())
    except OSError as error:
        raise EvaluationError(
            f"cannot be written: {error.strerror}",
            file=file,
            field="--plots",
            remedy="Name a folder that you may write to, on a disk with room",
        ) from None
    return file
