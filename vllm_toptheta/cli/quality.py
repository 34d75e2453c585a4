"""How measured quality is printed: by the command that measures it, and by those that show stores."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from vllm_toptheta.store import Evidence, MeasuredLength

__all__ = ["quality_table"]


def quality_table(evidence: Evidence) -> Table:
    """Return what was measured in one mode: a row for each promise and length, with the reason where none is kept."""
    from rich.markup import escape
    from rich.table import Table

    tokens = sum(text.num_tokens for text in evidence.text)
    heavy = "" if evidence.heavy is None else f", copies, heavy {evidence.heavy:g}"
    table = Table(
        "promise",
        "within",
        "floor",
        *("length", "tokens", "ppl change %", "below", "KL", "below ", "same top-1 %", "value rows %", "bytes %"),
        title=f"quality in mode {evidence.mode}{heavy}: the last {evidence.window} tokens, decoded behind a dense "
        f"prompt; {evidence.dtype}, {evidence.device}",
        caption=escape(
            f"{', '.join(text.name for text in evidence.text)} ({tokens} tokens); +- is one standard error, below "
            f"holds with {evidence.confidence:.0%} confidence"
        ),
    )
    for promise in evidence.promises:
        named = (promise.preset or "own", promise.text)
        if promise.weight_floor is None:
            table.add_row(*named, "none", escape(promise.reason or ""), end_section=True)
        for one in promise.measured:
            table.add_row(*named, f"{promise.weight_floor:g}", *_cells(one), end_section=one is promise.measured[-1])
    return table


def _cells(one: MeasuredLength) -> list[str]:
    return [
        str(one.length),
        f"{one.num_tokens} ({one.num_sequences})",
        f"{one.change_percent:+.3f} +- {one.change_error:.3f}",
        f"{one.change_bound:+.3f}",
        f"{one.kl_divergence:.6f} +- {one.kl_error:.6f}",
        f"{one.kl_bound:.6f}",
        f"{100 * one.top1_agreement:.1f}",
        f"{100 * one.value_rows_share:.1f}",
        f"{100 * one.bytes_share:.1f}",
    ]
