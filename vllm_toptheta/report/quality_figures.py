"""The figures of evidence: what floors lose against what they read, by length, and what each layer reads and loses."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from vllm_toptheta.report.drawing import DARK, GREY, HEAT, Picture, finished, layer_axis, log_counts, panels_of, tokens
from vllm_toptheta.report.quality import Quality
from vllm_toptheta.store import FLOOR_PREFIX, MeasuredLength

__all__ = ["draw_quality"]

_FAR = 8  # times a promise, beyond which losses are drawn on a logarithmic axis
_MARKERS = "os^Dv<>pP*Xh"


class _Loss(NamedTuple):
    """One of the two measures of what is lost.

    Attributes:
        name: in a sentence.
        mean: the field of `MeasuredLength`.
        error: likewise, its standard error.
        bound: likewise, what it is below with confidence.
        limit: the field of `Promise`.
        ylabel: of its axis.
        unit: behind a number.
    """

    name: str
    mean: str
    error: str
    bound: str
    limit: str
    ylabel: str
    unit: str


_PERPLEXITY = _Loss(
    *("change of perplexity", "change_percent", "change_error", "change_bound", "max_loss"),
    *("change of perplexity\nagainst dense attention, %", " %"),
)
_KL = _Loss(
    *("KL divergence", "kl_divergence", "kl_error", "kl_bound", "max_kl"),
    *("KL divergence from\ndense attention, nats per token", ""),
)


def draw_quality(quality: Quality) -> Iterator[Picture]:
    """Yields the figures of one mode, in the order in which a reader wants them.

    Args:
        quality: what is known of it.
    """
    yield finished("loss", "What is lost against what is read", *_trade_off(quality, _PERPLEXITY))
    yield finished("kl", "How far predictions move against what is read", *_trade_off(quality, _KL))
    if quality.evidence.lost_mass_p99:
        title = "What each layer reads and loses" if quality.served_layers else "What each layer loses"
        yield finished("layers", title, *_layers(quality))


def _trade_off(quality: Quality, loss: _Loss) -> tuple[Figure, str, str]:
    figure, panels = panels_of(7.4, rows=2, sharey=True)
    for axes, share in zip(panels, ("value_rows_share", "bytes_share"), strict=True):
        for index, length in enumerate(quality.lengths):
            _draw_length(axes, quality, loss, share, length, index)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_ylabel(loss.ylabel)
        if loss is _PERPLEXITY:
            axes.axhline(0.0, color=DARK, linewidth=0.8)
    _loss_axis(panels[0], quality, loss)
    for axes in panels:
        _draw_promises(axes, quality, loss)
    # halves and tenths of the rows have to be told apart
    panels[0].set_xscale("log")
    panels[0].xaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    panels[0].xaxis.set_minor_locator(NullLocator())
    panels[0].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panels[0].set_xlabel("value rows read, % of those cached")
    panels[1].set_xlabel("bytes read, % of dense attention")
    figure.legend(handles=_legend(quality), loc="outside upper left", ncols=4, frameon=False, fontsize=9)
    return figure, _trade_off_caption(quality, loss), _trade_off_alt(quality, loss)


def _draw_promises(axes: Axes, quality: Quality, loss: _Loss) -> None:
    """A line for each limit that is kept, with the names of its promises beside the panel."""
    names: dict[float, list[str]] = {}
    for promise in quality.evidence.promises:
        limit = getattr(promise, loss.limit)
        if limit is not None and promise.weight_floor is not None:
            names.setdefault(limit, []).append(promise.preset or "promised")
    served = getattr(quality.evidence.served, loss.limit)
    for limit, of_limit in sorted(names.items()):
        is_served = limit == served
        axes.axhline(limit, color=DARK if is_served else GREY, linewidth=1.4 if is_served else 1.0, linestyle="--")
        axes.annotate(
            f"{', '.join(of_limit)}:\n{limit:g}{loss.unit}",
            (1.0, limit),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            # the least one hangs below its line: the next may be near
            va="top" if len(names) > 1 and limit == min(names) else "bottom",
            fontsize=9,
            color=DARK,
        )


def _draw_length(axes: Axes, quality: Quality, loss: _Loss, share: str, length: int, index: int) -> None:
    """The ladder, exact top-k beside it, and what was confirmed, of one length."""
    colour, marker = _style(quality, index).values()
    of_length = [rung for rung in quality.rungs if rung.measured.length == length]
    floors = [rung for rung in of_length if rung.equal_rows is None]
    top_k = [rung.measured for rung in of_length if rung.equal_rows is not None]
    _draw_points(axes, [rung.measured for rung in floors], loss, share, _Mark(colour, f"{marker}-", 5))
    _draw_points(axes, top_k, loss, share, _Mark(colour, f"{marker}:", 7, is_hollow=True))
    for rung in floors:
        _name_floor(
            axes, rung.label.removeprefix(FLOOR_PREFIX), rung.measured, loss, share, colour=colour, place=(5, 4)
        )
    for promise in quality.evidence.promises:
        size = 13 if promise is quality.evidence.served else 8
        confirmed = [one for one in promise.measured if one.length == length]
        _draw_points(axes, confirmed, loss, share, _Mark(colour, "*", size, edge=DARK, zorder=4))
        for one in confirmed:
            _name_floor(axes, f"{promise.weight_floor:g}", one, loss, share, colour=DARK, place=(5, -12))


def _name_floor(
    axes: Axes,
    floor: str,
    one: MeasuredLength,
    loss: _Loss,
    share: str,
    *,
    colour: Any,
    place: tuple[float, float],
) -> None:
    """Writes a floor beside its mark, at a place in points."""
    at = (100 * getattr(one, share), getattr(one, loss.mean))
    axes.annotate(floor, at, xytext=place, textcoords="offset points", fontsize=8, color=colour)


class _Mark(NamedTuple):
    """How points look; `fmt` is matplotlib's."""

    colour: Any
    fmt: str
    size: float
    is_hollow: bool = False
    edge: str | None = None
    zorder: float = 2


def _draw_points(axes: Axes, measured: Sequence[MeasuredLength], loss: _Loss, share: str, mark: _Mark) -> None:
    """Points with a thick bar of one standard error to both sides, and a thin one up to the bound."""
    if not measured:
        return
    x = [100 * getattr(one, share) for one in measured]
    means, errors, bounds = ([getattr(one, name) for one in measured] for name in (loss.mean, loss.error, loss.bound))
    up = [bound - mean for bound, mean in zip(bounds, means, strict=True)]
    axes.errorbar(
        x, means, [[0.0] * len(up), up], fmt="none", ecolor=mark.colour, elinewidth=0.9, capsize=3, zorder=mark.zorder
    )
    axes.errorbar(
        *(x, means, errors),
        fmt=mark.fmt,
        color=mark.colour,
        elinewidth=2.2,
        linewidth=1.3,
        markersize=mark.size,
        markerfacecolor="white" if mark.is_hollow else mark.colour,
        markeredgecolor=mark.edge or mark.colour,
        markeredgewidth=0.8 if mark.edge else 1.2,
        zorder=mark.zorder,
    )


def _loss_axis(axes: Axes, quality: Quality, loss: _Loss) -> None:
    """Sets the scale: of KL logarithmic, for floors differ by orders of magnitude; of perplexity beyond the promise."""
    evidence = quality.evidence
    measured = [rung.measured for rung in quality.rungs]
    measured += [one for promise in evidence.promises for one in promise.measured]
    limits = [getattr(promise, loss.limit) for promise in evidence.promises if promise.weight_floor is not None]
    reached = [getattr(one, loss.bound) for one in measured] + [limit for limit in limits if limit is not None]
    means = [getattr(one, loss.mean) for one in measured]
    if loss is _KL:
        positive = [mean for mean in means if mean > 0]
        if positive:
            axes.set_yscale("log", nonpositive="clip")
            axes.set_ylim(min(positive) / 3, 2 * max(reached))
        return
    linear = max((limit for limit in limits if limit is not None), default=1.0)
    if max(map(abs, reached)) > _FAR * linear:
        axes.set_yscale("symlog", linthresh=linear)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _legend(quality: Quality) -> list[Line2D]:
    handles = _lengths(quality)
    if any(rung.equal_rows for rung in quality.rungs):
        handles.append(Line2D([], [], color=GREY, linestyle=":", marker="o", mfc="white", label="exact top-k"))
    star = Line2D([], [], linestyle="", marker="*", markersize=13, mfc=GREY, mec=DARK, label="promised, confirmed")
    return [*handles, star]


def _trade_off_caption(quality: Quality, loss: _Loss) -> str:
    if loss is _KL:
        return (
            "Marks and bars as above. KL divergence varies less between sequences than perplexity does, so it tells "
            "floors apart earlier."
        )
    parts = [
        "A star is a floor, with its number, that keeps a promise, confirmed on sequences that its choice did not see; "
        "a server reads by the large ones. A thick bar is one standard error; a thin one goes up to what the figure is "
        f"below with {quality.evidence.confidence:.0%} confidence, and a promise is kept where it ends below the line.",
    ]
    if quality.rungs:
        parts.insert(0, "A mark is a floor, with its number, on the sequences of the choice.")
    if any(rung.equal_rows for rung in quality.rungs):
        parts.append("Hollow marks are exact top-k that reads about as many value rows as a floor, on the same tokens.")
    return " ".join(parts)


def _trade_off_alt(quality: Quality, loss: _Loss) -> str:
    digits = ".2f" if loss is _PERPLEXITY else ".5f"

    def point(name: str, one: MeasuredLength) -> str:
        return (
            f"{name} reads {100 * one.value_rows_share:.1f} percent of the value rows and {100 * one.bytes_share:.1f} "
            f"percent of the bytes: {getattr(one, loss.mean):{digits}}{loss.unit}, below "
            f"{getattr(one, loss.bound):{digits}}"
        )

    parts = []
    for length in quality.lengths:
        of_length = [rung for rung in quality.rungs if rung.measured.length == length]
        points = [
            point(rung.label if rung.equal_rows is None else f"exact top-k {rung.label}", rung.measured)
            for rung in of_length
        ]
        points += [
            point(f"confirmed, floor:{promise.weight_floor:g}", one)
            for promise in quality.evidence.promises
            for one in promise.measured
            if one.length == length
        ]
        parts.append(f"At {length} tokens, {'; '.join(points)}.")
    return f"The {loss.name} against the share of value rows and of bytes read. {' '.join(parts)}"


def _layers(quality: Quality) -> tuple[Figure, str, str]:
    """What the promised floor loses by layer, and above it, with a record, what it reads and keeps there."""
    served = quality.evidence.served
    of_lengths = sorted(served.measured, key=lambda one: one.length)
    has_reads = bool(quality.served_layers)
    figure, panels = panels_of(6.8 if has_reads else 3.0, rows=3 if has_reads else 1, sharex=True)
    lost = panels[-1]
    for index, one in enumerate(of_lengths):
        style = {**_style(quality, index), "markersize": 4, "linewidth": 1.2}
        masses = [(layer, 100 * mass) for layer, mass in enumerate(one.lost_mass_p99 or ()) if mass is not None]
        lost.plot(*zip(*masses, strict=True), **style)
        layers = quality.served_layers.get(one.length, ())
        if not layers:
            continue
        panels[0].plot([layer.layer for layer in layers], [100 * layer.value_rows_share for layer in layers], **style)
        kept = [(layer.layer, layer.survivors) for layer in layers if layer.survivors is not None]
        for name, line in (("p50", "-"), ("p99", "--")):
            # a head that keeps nothing still has its place on a log axis
            counts = [max(getattr(survivors, name), 0.5) for _, survivors in kept]
            panels[1].plot([layer for layer, _ in kept], counts, **style, linestyle=line)
    if has_reads:
        panels[0].set_ylabel("value rows read,\n% of those cached")
        panels[0].set_ylim(bottom=0.0)
        panels[1].set_ylabel("keys kept by a head,\nmedian; dashed, p99")
        log_counts(panels[1])
    lost.set_ylabel("lost mass, p99,\n% of the softmax")
    lost.set_ylim(bottom=0.0)
    for axes in panels:
        axes.grid(color="#dddddd", linewidth=0.6)
    layer_axis(lost, max(len(one.lost_mass_p99 or ()) for one in of_lengths))
    figure.legend(handles=_lengths(quality), loc="outside upper left", ncols=6, frameon=False, fontsize=9)
    caption = (
        f"With the promised floor {served.weight_floor:g}, where it was confirmed. Layers without thresholds lose "
        "nothing. One decoded token of a head in a hundred loses more than the p99 of its layer; a server counts how "
        "many do."
    )
    return figure, caption, _layers_alt(quality)


def _layers_alt(quality: Quality) -> str:
    largest = quality.evidence.lost_mass_p99
    worst = max(largest, key=largest.__getitem__)
    parts = [f"layer {worst} loses most, {100 * largest[worst]:.1f} percent of the softmax at the 99th percentile"]
    for length, layers in sorted(quality.served_layers.items()):
        most = max(layers, key=lambda one: one.value_rows_share)
        parts.append(
            f"at {length} tokens layer {most.layer} reads most, {100 * most.value_rows_share:.1f} percent of its value "
            "rows"
        )
    return f"By layer, with floor {quality.evidence.served.weight_floor:g}: {'; '.join(parts)}."


def _lengths(quality: Quality) -> list[Line2D]:
    """Entries of a legend."""
    return [
        Line2D([], [], **_style(quality, index), label=f"{tokens(length)} tokens")
        for index, length in enumerate(quality.lengths)
    ]


def _style(quality: Quality, index: int) -> dict[str, Any]:
    """Of a length: the longer, the lighter, for lengths have an order."""
    share = index / max(1, len(quality.lengths) - 1)
    return {"color": colormaps[HEAT](0.05 + 0.6 * share), "marker": _MARKERS[index % len(_MARKERS)]}
