"""Writes a report: one HTML page that needs nothing but itself, its numbers as JSON, and the figures as PNG files."""

import base64
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from vllm_toptheta.errors import ReportError
from vllm_toptheta.report.drawing import Picture
from vllm_toptheta.report.figures import draw
from vllm_toptheta.report.findings import SurvivorReport, TargetFindings
from vllm_toptheta.report.quality import Quality
from vllm_toptheta.report.quality_figures import draw_quality
from vllm_toptheta.report.quality_verdict import QualityVerdict, quality_verdict
from vllm_toptheta.report.record import Report
from vllm_toptheta.report.verdict import verdict
from vllm_toptheta.store import floor_label

__all__ = ["draw_report", "render", "write_report"]


def write_report(report: Report, out: Path, *, png: Path | None = None) -> tuple[Path, ...]:
    """Writes the page, and beside it the numbers under the same name with .json.

    Args:
        report: the report.
        out: the HTML file.
        png: folder for the figures, made if need be; None to leave them in the page alone.

    Returns:
        The files written.

    Raises:
        ReportError: a file cannot be written, or `out` is the name of the JSON file.
    """
    if out.suffix == ".json":
        raise ReportError("the page cannot be a .json file", file=out, remedy="Name it report.html")
    pictures = draw_report(report)
    content = {out: render(report, pictures).encode(), out.with_suffix(".json"): _json(report)}
    if png is not None:
        for slug, drawn in pictures.items():
            content |= {png / f"{slug}-{picture.name}.png": picture.png for picture in drawn}
    for file, data in content.items():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        except OSError as error:
            raise ReportError(f"cannot be written: {error.strerror}", file=file) from None
    return tuple(content)


def draw_report(report: Report) -> dict[str, list[Picture]]:
    """Returns the figures of each mode and each target, by what their sections and files are called.

    Args:
        report: the report.
    """
    pictures = {_of_mode(quality): list(draw_quality(quality)) for quality in report.quality}
    targets = () if report.survivors is None else report.survivors.targets
    return pictures | {_slug(target.label): list(draw(target)) for target in targets}


def render(report: Report, pictures: Mapping[str, Sequence[Picture]]) -> str:
    """Returns the HTML page.

    Args:
        report: the report.
        pictures: its figures, as `draw_report` returns them.
    """
    environment = Environment(
        loader=PackageLoader("vllm_toptheta.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda share, digits=0: f"{100 * share:.{digits}f} %"
    environment.filters["data_uri"] = lambda png: f"data:image/png;base64,{base64.b64encode(png).decode()}"
    environment.filters["unbroken"] = _unbroken
    return environment.get_template("template.html.j2").render(
        report=report,
        quality=[_mode(quality, pictures) for quality in report.quality],
        survivors=report.survivors,
        targets=[] if report.survivors is None else _targets(report.survivors, pictures),
    )


def _mode(quality: Quality, pictures: Mapping[str, Sequence[Picture]]) -> dict[str, Any]:
    """What the page says of one mode."""
    rungs = [(rung, rung.measured) for rung in quality.rungs]
    kept = [
        (f"{floor_label(promise.weight_floor)}, {promise.preset or 'promised'}", promise)
        for promise in quality.evidence.promises
        if promise.weight_floor is not None
    ]
    confirmed = [(label, one) for label, promise in kept for one in promise.measured]
    return {
        "slug": _of_mode(quality),
        "evidence": quality.evidence,
        "other_weights": quality.other_weights,
        "verdict": QualityVerdict(*map(_unbroken, quality_verdict(quality))),
        "pictures": pictures[_of_mode(quality)],
        "probes": [(label, probe) for label, promise in kept for probe in promise.probes or ()],
        "tables": [
            ("Promised, confirmed on sequences that the choice did not see", confirmed),
            ("The floors that were tried", [(rung.label, one) for rung, one in rungs if rung.equal_rows is None]),
            (
                "Exact top-k that reads about as many value rows, on the same tokens",
                [(f"{rung.label}, as {rung.equal_rows}", one) for rung, one in rungs if rung.equal_rows is not None],
            ),
        ],
    }


def _targets(survivors: SurvivorReport, pictures: Mapping[str, Sequence[Picture]]) -> list[dict[str, Any]]:
    """What the page says of each target."""
    sections = []
    for target in survivors.targets:
        helps, paragraph = verdict(survivors, target)
        sections.append(
            {
                "target": target,
                "slug": _slug(target.label),
                "helps": helps,
                "paragraph": _unbroken(paragraph),
                "pictures": pictures[_slug(target.label)],
                "layers": [_layer(target, layer) for layer in range(target.num_layers)],
            }
        )
    return sections


def _unbroken(text: str) -> str:
    """A number stays on one line with its unit and its error."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%").replace(" +- ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")


def _layer(target: TargetFindings, layer: int) -> dict[str, Any]:
    """One line of the table of layers; only the layer of a dense one."""
    if layer in target.dense_layers:
        return {"layer": layer, "dense": True}
    found = target.held_out

    def mean(table: Sequence[Sequence[float]]) -> float:
        return sum(table[layer]) / len(table[layer])

    return {
        "layer": layer,
        "dense": False,
        "survivors": mean(found.head_mean_survivors),
        "p95": max(found.head_p95_survivors[layer]),
        "reads": mean(found.group_value_rows_share),
        "lost": mean(found.head_lost_mass),
        "positions": found.position_shares[layer],
    }


def _json(report: Report) -> bytes:
    return (report.model_dump_json(indent=1) + "\n").encode()


def _of_mode(quality: Quality) -> str:
    return f"quality-{quality.evidence.mode}"


def _slug(label: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", label)
