"""How measured quality is printed: by the command that measures it, and by the one that shows stores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from vllm_toptheta.cli.terminal import print_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from vllm_toptheta.store import Evidence, MeasuredLength, Promise, TaskProbe

__all__ = ["print_quality"]


def print_quality(evidence: Evidence) -> None:
    """Print what was measured in one mode: a row for each promise and length, why others are not kept, and tasks."""
    print_table(_table(evidence))
    for promise in evidence.promises:
        if promise.reason is not None:
            typer.echo(f"not kept: {promise.preset or 'own'}, {promise.text}: {promise.reason}")
    probes = [(promise, probe) for promise in evidence.promises for probe in promise.probes or ()]
    if probes:
        print_table(_probe_table(probes))


def _table(evidence: Evidence) -> Table:
    from rich.markup import escape
    from rich.table import Table

    tokens = sum(text.num_tokens for text in evidence.text)
    heavy = "" if evidence.heavy is None else f", copies, heavy {evidence.heavy:g}"
    table = Table(
        title=f"quality in mode {evidence.mode}{heavy}: the last {evidence.window} tokens, decoded behind a dense "
        f"prompt; {evidence.dtype}, {evidence.device}",
        caption=escape(
            f"{', '.join(text.name for text in evidence.text)} ({tokens} tokens); +- is one standard error, below "
            f"holds with {evidence.confidence:.0%} confidence"
        ),
    )
    table.add_column("promise", no_wrap=True)
    for heading in (
        "floor",
        "length",
        "tokens",
        "ppl change %",
        "below",
        "KL",
        "below",
        "top-1 %",
        "rows %",
        "bytes %",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for promise in evidence.promises:
        name = promise.text if promise.preset is None else f"{promise.preset}: {promise.text}"
        for one in promise.measured:
            last = one is promise.measured[-1]
            table.add_row(name, f"{promise.weight_floor:g}", *_cells(one), end_section=last)
    return table


def _cells(one: MeasuredLength) -> list[str]:
    return [
        str(one.length),
        f"{one.num_sequences} x {one.num_tokens // one.num_sequences}",
        f"{one.change_percent:+.3f} +- {one.change_error:.3f}",
        f"{one.change_bound:+.3f}",
        f"{one.kl_divergence:.6f} +- {one.kl_error:.6f}",
        f"{one.kl_bound:.6f}",
        f"{100 * one.top1_agreement:.1f}",
        f"{100 * one.value_rows_share:.1f}",
        f"{100 * one.bytes_share:.1f}",
    ]


def _probe_table(probes: Sequence[tuple[Promise, TaskProbe]]) -> Table:
    from rich.table import Table

    table = Table(
        title="recall with the floors that are kept: shown, not promised",
        caption="the same questions, answered densely and with the floor behind one dense prompt; difference of the "
        "shares solved in points, with its paired 95 % interval",
    )
    table.add_column("promise", no_wrap=True)
    table.add_column("floor", justify="right")
    table.add_column("task", no_wrap=True)
    for heading in ("length", "questions", "solved dense", "with floor", "gained", "lost", "difference"):
        table.add_column(heading, justify="right")
    table.add_column("95 % interval", no_wrap=True)
    # empty for most models
    if any(probe.tells_nothing for _, probe in probes):
        table.add_column("")
    for promise, probe in probes:
        remark = [probe.remark] if probe.tells_nothing else []
        table.add_row(promise.preset or "own", f"{promise.weight_floor:g}", *_probe_cells(probe), *remark)
    return table


def _probe_cells(probe: TaskProbe) -> list[str]:
    return [
        probe.task,
        str(probe.length),
        str(probe.num_questions),
        str(probe.num_solved_dense),
        str(probe.num_solved_sparse),
        str(probe.num_gained),
        str(probe.num_lost),
        f"{100 * probe.difference:+.1f}",
        f"{100 * probe.difference_low:+.1f} to {100 * probe.difference_high:+.1f}",
    ]
