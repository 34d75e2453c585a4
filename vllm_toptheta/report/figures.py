"""The figures of what was measured with thresholds applied: survivors, reads and lost mass, by layer and head."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator
from numpy.typing import NDArray

from vllm_toptheta.report.collect import RECENT_TOKENS, SINK_TOKENS
from vllm_toptheta.report.drawing import (
    BLUE,
    DARK,
    GREEN,
    GREY,
    HEAT,
    ORANGE,
    Picture,
    finished,
    layer_axis,
    log_counts,
    panels_of,
    tokens,
)
from vllm_toptheta.report.findings import Curves, TargetFindings, TextFindings

__all__ = ["draw"]

_PANEL_COLUMNS = 7


def draw(target: TargetFindings) -> Iterator[Picture]:
    """Yields the figures of one target, in the order in which a reader wants them."""
    painters: list[tuple[str, str, Callable[[TargetFindings], tuple[Figure, str, str]]]] = [
        ("survivors", "How many keys each head keeps", _survivors),
        ("reads", "What a group of heads reads", _reads),
        ("lengths", "What grows with the context", _lengths),
        ("positions", "Where the kept keys sit", _positions),
        ("lost-mass", "What is lost", _lost_mass),
    ]
    if target.curves is not None:
        painters.append(("thresholds", "The thresholds", partial(_thresholds, curves=target.curves)))
    for name, title, painter in painters:
        yield finished(name, title, *painter(target))


def _texts(target: TargetFindings) -> list[tuple[str, str, str, TextFindings]]:
    """Name, colour, marker and findings of each kind of text."""
    kinds = [("held-out text", BLUE, "o", target.held_out)]
    if target.calibration is not None:
        kinds.append(("calibration text", ORANGE, "^", target.calibration))
    return kinds


def _survivors(target: TargetFindings) -> tuple[Figure, str, str]:
    figure, (upper, lower) = panels_of(5.2, rows=2, sharex=True)
    layers = np.array(target.sparse_layers)
    kinds = _texts(target)
    for axes, attribute, name in (
        (upper, "head_mean_survivors", "mean over rows"),
        (lower, "head_p95_survivors", "95th percentile"),
    ):
        for index, (text, colour, marker, found) in enumerate(kinds):
            table = np.array(getattr(found, attribute))[layers]
            offset = 0.36 * (index - (len(kinds) - 1) / 2)
            axes.plot(
                np.repeat(layers + offset, table.shape[1]),
                np.maximum(table, 0.5).ravel(),  # a head that keeps nothing still has its place on a log axis
                marker,
                color=colour,
                markersize=4,
                alpha=0.75,
                markeredgewidth=0,
                label=f"a head, {text}",
            )
        if target.label == f"k:{target.dense_length}":
            axes.axhline(target.dense_length, color=DARK, linewidth=1.2, linestyle="--", label=f"target {target.label}")
        log_counts(axes)
        axes.set_ylabel(f"keys kept,\n{name}")
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    layer_axis(lower, target.num_layers)
    upper.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, frameon=False, fontsize=9)
    parts = [
        f"on {text} {found.mean_survivors:.0f} on average and {found.p95_survivors} at the 95th percentile"
        for text, _, _, found in kinds
    ]
    caption = (
        "Each mark is a query head; dense layers are left out."
        if target.curves is None
        else "Each mark is a query head. Heads far above the line keep more than was asked for; dense layers are left "
        "out."
    )
    return figure, caption, f"Keys kept by each head against the layer, over all heads {' and '.join(parts)}."


def _reads(target: TargetFindings) -> tuple[Figure, str, str]:
    shares = np.array(target.held_out.group_value_rows_share)
    figure = _heat(target, 100 * shares, ylabel="kv head", label="value rows read, % of cached", top=100)
    sparse = shares[list(target.sparse_layers)]
    caption = (
        "A value row is read if any query head of the group keeps it. Held-out text, all thresholded rows; hatched "
        "layers are dense and read everything."
    )
    alt = (
        f"Heat map of the value rows read by each kv head and layer, from {100 * sparse.min():.0f} to "
        f"{100 * sparse.max():.0f} percent, {100 * target.held_out.sparse_value_rows_share:.0f} percent overall in the "
        "sparse layers."
    )
    return figure, caption, alt


def _lengths(target: TargetFindings) -> tuple[Figure, str, str]:
    figure, (left, right) = panels_of(3.3, columns=2)
    for text, colour, marker, found in _texts(target):
        middles = [np.sqrt(rows.min_length * rows.max_length) for rows in found.by_length]
        shares = [100 * rows.expectation.value_rows_share for rows in found.by_length]
        bounds = [rows.expectation.attention_speedup for rows in found.by_length]
        style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.5, "label": text}
        left.plot(middles, shares, **style)
        right.plot(middles, bounds, **style)
    left.set_ylabel("value rows read, % of cached")
    left.set_ylim(0, 105)
    right.set_ylabel("attention, times as fast\n(bound 2 / (1 + f))")
    right.axhline(2.0, color=DARK, linewidth=1.2, linestyle="--")
    right.annotate(
        "no value read at all",
        (0.02, 2.0),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        fontsize=8,
    )
    right.set_ylim(0.95, 2.15)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlabel("context, tokens")
        _length_ticks(axes, target.held_out.by_length[0].min_length, target.held_out.longest.max_length)
        axes.grid(color="#dddddd", linewidth=0.6)
    left.legend(frameon=False, fontsize=9)
    caption = (
        "f is the share of value rows read, dense layers in full. The bound counts memory traffic alone: all keys, and "
        "the values that are read."
    )
    ends = [
        f"{100 * rows.expectation.value_rows_share:.0f} percent and {rows.expectation.attention_speedup:.2f} times at "
        f"{rows.max_length} tokens"
        for rows in (target.held_out.by_length[0], target.held_out.longest)
    ]
    alt = (
        "Share of value rows read against the context length, and beside it the bound on the speed-up of attention: "
        f"{' and '.join(ends)}, on held-out text."
    )
    return figure, caption, alt


def _positions(target: TargetFindings) -> tuple[Figure, str, str]:
    figure, (upper, lower) = panels_of(4.8, rows=2, sharex=True)
    layers = np.array(target.sparse_layers)
    shares, rates = (
        100 * np.array(table)[layers] for table in (target.held_out.position_shares, target.held_out.position_rates)
    )
    bottom = np.zeros(len(layers))
    for place, (colour, hatch, marker, name) in enumerate(
        (
            (GREEN, "", "s", f"first {SINK_TOKENS} tokens"),
            (BLUE, "///", "o", "between"),
            (ORANGE, "", "^", f"last {RECENT_TOKENS} tokens"),
        )
    ):
        share = shares[:, place]
        upper.bar(layers, share, 0.85, bottom, color=colour, hatch=hatch, edgecolor="white", label=name)
        lower.plot(layers, rates[:, place], color=colour, marker=marker, markersize=4, linewidth=1.2)
        bottom = bottom + share
    upper.set_ylabel("of the keys kept,\nshare that sits there, %")
    lower.set_ylabel("of the keys there,\nshare that is kept, %")
    for axes in (upper, lower):
        axes.set_ylim(0, 100)
    lower.grid(axis="y", color="#dddddd", linewidth=0.6)
    layer_axis(lower, target.num_layers)
    upper.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, frameon=False, fontsize=9)
    caption = (
        "Held-out text, over the heads of a layer. Above, what the kept keys are made of: those between would be lost "
        "by a window. Below, how likely a key is to be kept where it sits."
    )
    sink, middle, recent = shares.mean(axis=0)
    alt = (
        f"By layer: on average {sink:.0f} percent of the kept keys are among the first {SINK_TOKENS} tokens, "
        f"{recent:.0f} percent among the last {RECENT_TOKENS}, and {middle:.0f} percent between. Kept are "
        f"{rates[:, 0].mean():.0f} percent of the first tokens, {rates[:, 2].mean():.0f} percent of the last and "
        f"{rates[:, 1].mean():.0f} percent of those between."
    )
    return figure, caption, alt


def _lost_mass(target: TargetFindings) -> tuple[Figure, str, str]:
    lost = 100 * np.array(target.held_out.head_lost_mass)
    figure = _heat(target, lost, ylabel="query head", label="lost mass, % of the softmax", top=None)
    layer, worst = target.held_out.worst_layer
    caption = (
        "The share of the softmax that the skipped keys hold, mean over rows of held-out text. It is known exactly at "
        "every step, and given to the mean of the values. Hatched layers are dense."
    )
    alt = (
        f"Heat map of the lost mass by query head and layer: {100 * target.held_out.mean_lost_mass:.1f} percent on "
        f"average, {lost.max():.1f} percent in the worst head; layer {layer} loses most, {100 * worst:.1f} percent."
    )
    return figure, caption, alt


def _thresholds(target: TargetFindings, curves: Curves) -> tuple[Figure, str, str]:
    layers = target.sparse_layers
    table = np.array(curves.thresholds)
    columns = min(_PANEL_COLUMNS, len(layers))
    rows = -(-len(layers) // columns)
    figure, panels = panels_of(0.9 + 1.15 * rows, rows=rows, columns=columns, sharex=True, sharey=True)
    for axes, layer in zip(panels, layers, strict=False):
        axes.plot(curves.lengths, table[:, layer], color=BLUE, linewidth=0.7, alpha=0.55)
        axes.plot(curves.lengths, table[:, layer].mean(axis=1), color=DARK, linewidth=1.6)
        axes.set_title(f"layer {layer}", fontsize=8, pad=2)
        axes.set_xscale("log")
        axes.tick_params(labelsize=7)
        _length_ticks(axes, curves.lengths[0], curves.lengths[-1], most=3)
    for axes in panels[len(layers) :]:
        axes.set_visible(False)
    # with columns cut short, the panel above the gap is the last of its own
    for column in range(columns):
        last = max(index for index in range(len(layers)) if index % columns == column)
        panels[last].tick_params(labelbottom=True)
    unit = "scaled logits" if curves.placement == "pre_softmax" else "probability"
    if curves.placement == "post_softmax":
        panels[0].set_yscale("log")
    figure.supxlabel("context, tokens", fontsize=9)
    figure.supylabel(f"threshold, {unit}", fontsize=9)
    caption = (
        "A thin line is a query head, the thick one their mean. Beyond the calibrated lengths a threshold stays as it "
        "is. Dense layers are left out."
    )
    ends = table[:, list(layers)].mean(axis=(1, 2))
    alt = (
        f"One panel for each of {len(layers)} layers with the thresholds of its heads against the context length; over "
        f"all heads the mean goes from {ends[0]:.3g} at {curves.lengths[0]} tokens to {ends[-1]:.3g} at "
        f"{curves.lengths[-1]}."
    )
    return figure, caption, alt


def _heat(target: TargetFindings, table: NDArray[np.float64], *, ylabel: str, label: str, top: float | None) -> Figure:
    """A heat map of `[num_layers, num_rows]`, layers from left to right, dense layers hatched."""
    num_rows = table.shape[1]
    figure, (axes,) = panels_of(min(1.6 + 0.22 * num_rows, 7.0))
    hidden = np.isin(np.arange(len(table)), target.dense_layers)
    axes.patch.set(facecolor="#eeeeee", edgecolor=GREY, hatch="////")
    image = axes.imshow(
        np.where(hidden, np.nan, table.T),
        cmap=HEAT,
        aspect="auto",
        interpolation="nearest",
        vmin=0,
        vmax=top,
    )
    axes.set_xlabel("layer")
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    bar = figure.colorbar(image, ax=axes, pad=0.01)
    bar.set_label(label.replace(", ", ",\n"), fontsize=9)
    return figure


def _length_ticks(axes: Axes, least: int, largest: int, *, most: int = 6) -> None:
    """Powers of two between two lengths, at most so many; both ends where there are fewer than two."""
    powers = [1 << power for power in range(25) if least <= 1 << power <= largest]
    step = -(-len(powers) // most)
    ticks = powers[::-1][::step][::-1] if len(powers) > 1 else [least, largest]
    axes.set_xticks(ticks, [tokens(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
