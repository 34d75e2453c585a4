"""Writes a report: one HTML page that needs nothing but itself, its numbers as JSON, and the figures as PNG files."""

import base64
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from vllm_toptheta.errors import ReportError
from vllm_toptheta.report.figures import Picture, draw
from vllm_toptheta.report.findings import Report, TargetFindings
from vllm_toptheta.report.verdict import verdict

__all__ = ["render", "write_report"]


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
    pictures = [list(draw(target)) for target in report.targets]
    content = {out: render(report, pictures).encode(), out.with_suffix(".json"): _json(report)}
    if png is not None:
        for target, drawn in zip(report.targets, pictures, strict=True):
            content |= {png / f"{_slug(target.label)}-{picture.name}.png": picture.png for picture in drawn}
    for file, data in content.items():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        except OSError as error:
            raise ReportError(f"cannot be written: {error.strerror}", file=file) from None
    return tuple(content)


def render(report: Report, pictures: Sequence[Sequence[Picture]]) -> str:
    """Returns the HTML page.

    Args:
        report: the report.
        pictures: the figures of each target.
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
    sections: list[dict[str, Any]] = []
    for target, drawn in zip(report.targets, pictures, strict=True):
        helps, paragraph = verdict(report, target)
        sections.append(
            {
                "target": target,
                "slug": _slug(target.label),
                "helps": helps,
                # a number and its unit stay on one line
                "paragraph": paragraph.replace(" %", "\N{NO-BREAK SPACE}%"),
                "pictures": drawn,
                "layers": [_layer(target, layer) for layer in range(target.num_layers)],
            }
        )
    return environment.get_template("template.html.j2").render(report=report, sections=sections)


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


def _slug(label: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", label)
