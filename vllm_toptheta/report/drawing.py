"""What the figures share. Colours are Okabe and Ito's or viridis, which colour-blind readers tell apart."""

import io
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

BLUE, ORANGE, GREEN, GREY, DARK = "#0072B2", "#E69F00", "#009E73", "#999999", "#333333"
HEAT = "viridis"
_WIDTH = 9.0  # inches
_DPI = 120


class Picture(NamedTuple):
    """A figure, as a page and a folder take it."""

    name: str
    title: str
    caption: str
    alt: str
    png: bytes


def panels_of(
    height: float, *, rows: int = 1, columns: int = 1, sharex: bool = False, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """Returns a figure as wide as the page, and its panels row by row.

    Args:
        height: inches.
        rows: of panels.
        columns: of panels.
        sharex: whether panels have one horizontal axis.
        sharey: whether panels have one vertical axis.
    """
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=sharex, sharey=sharey, squeeze=False)
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, list(panels.flat)


def finished(name: str, title: str, figure: Figure, caption: str, alt: str) -> Picture:
    """Returns a figure as a picture.

    Args:
        name: of its file.
        title: above it.
        figure: what was drawn.
        caption: below it.
        alt: what it shows, with figures, for those who do not see it.
    """
    stream = io.BytesIO()
    FigureCanvasAgg(figure)
    # no metadata, so that the same findings give the same bytes
    figure.savefig(stream, format="png", dpi=_DPI, metadata={"Software": None})
    return Picture(name, title, caption, alt, stream.getvalue())


def layer_axis(axes: Axes, num_layers: int) -> None:
    """Labels the horizontal axis of figures by layer."""
    axes.set_xlabel("layer")
    axes.set_xlim(-0.6, num_layers - 0.4)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))


def log_counts(axes: Axes) -> None:
    """Makes the vertical axis one of counts, by 1, 2 and 5."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def tokens(number: int) -> str:
    """Returns a number of tokens as axes and legends have it."""
    return f"{number // 1024}K" if number % 1024 == 0 else str(number)
