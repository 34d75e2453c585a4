"""What an evaluation of decoding found: results of windows, summed up by length, as JSON and as a table."""

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from rich.table import Table

from vllm_toptheta.evaluation.losses import Losses
from vllm_toptheta.evaluation.measuring import WindowResult
from vllm_toptheta.evaluation.paired import compare_perplexities, mean_and_error
from vllm_toptheta.evaluation.subject import Setup
from vllm_toptheta.evaluation.variants import Variant
from vllm_toptheta.evaluation.window_reads import WindowReads
from vllm_toptheta.store import TextSource
from vllm_toptheta.store.fields import MAX_LAYERS

__all__ = [
    "DecodeComparison",
    "DecodeReport",
    "LengthReport",
    "LostMass",
    "Survivors",
    "decode_table",
    "length_report",
    "share_of_bytes",
]

_DIGITS = 5


def _short(number: Any) -> Any:
    """Five digits: what is beyond them is rounding of float32 activations, and differs from machine to machine."""
    return float(f"{number:.{_DIGITS}g}") if isinstance(number, float) else number


Number = Annotated[float, BeforeValidator(_short)]
Share = Annotated[float, BeforeValidator(_short), Field(ge=0.0, le=1.0)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Survivors(_Model):
    """Keys kept, over rows and query heads."""

    p50: int = Field(ge=0)
    p99: int = Field(ge=0)
    max: int = Field(ge=0)


class LostMass(_Model):
    """Share of the dense softmax that does not survive, over rows and query heads."""

    mean: Share
    p99: Share
    above_half: Share = Field(description="Share of rows and query heads that lose more than .5.")
    above_nine_tenths: Share = Field(description="Likewise, more than .9.")


class LayerReads(_Model):
    """What one layer reads and loses."""

    layer: int = Field(ge=0, lt=MAX_LAYERS)
    value_rows_share: Share
    survivors: Survivors | None = Field(description="null for a dense layer.")
    lost_mass: LostMass | None


class DecodeComparison(_Model):
    """One sparse attention against dense attention, over the windows of one length."""

    variant: Variant
    equal_rows: str | None = Field(description="The target that this exact top-k reads as many value rows as.")
    change_percent: Number = Field(description="Of the perplexity, 100 * (sparse / dense - 1).")
    change_standard_error: Number | None = Field(description="From the spread between sequences; null for one.")
    kl_divergence: Number = Field(description="KL(dense || sparse) of the next token, mean over tokens, nats.")
    kl_standard_error: Number | None
    top1_agreement: Share = Field(description="Share of tokens for which both predict the same one.")
    acceptance: Share = Field(description="Sum over the vocabulary of the smaller probability, mean over tokens.")
    value_rows_share: Share = Field(description="Value rows read by a kv head over those cached, dense layers too.")
    keys_read_share: Share | None = Field(
        default=None, description="Likewise of keys, those read exactly; null in reports from before it was measured."
    )
    copies_read_share: Share | None = Field(
        default=None, description="Likewise of values read as copies; null without copies."
    )
    bytes_share: Number | None = Field(
        default=None,
        description="Bytes read over those of dense attention, see `share_of_bytes`; null like `keys_read_share`.",
    )
    survivors: Survivors | None = Field(description="Of thresholded layers; null if there are none.")
    lost_mass: LostMass | None
    layers: tuple[LayerReads, ...] = Field(description="Those without a sliding window.")
    nll_changes: tuple[Number, ...] = Field(description="Change of the mean loss of each sequence, nats per token.")


class LengthReport(_Model):
    """What was compared at one length."""

    length: int = Field(ge=2, description="Tokens of a sequence, the window included.")
    num_sequences: int = Field(ge=1)
    num_predicted_tokens: int = Field(ge=1)
    perplexity_dense: Number
    comparisons: tuple[DecodeComparison, ...] = Field(min_length=1)


class DecodeReport(_Model):
    """An evaluation of decoding behind dense prompts."""

    schema_version: Literal[1] = 1
    setup: Setup
    text: tuple[TextSource, ...]
    window: int = Field(ge=2, description="Tokens decoded at the end of each sequence, all but the first predicted.")
    seed: int
    lengths: tuple[LengthReport, ...] = Field(min_length=1)


def length_report(
    length: int, variants: Sequence[Variant], results: Sequence[WindowResult], *, head_size: int
) -> LengthReport:
    """Sums up the sequences of one length.

    Args:
        length: their tokens.
        variants: those that were asked for, in the order of the results.
        results: at least one.
        head_size: channels of a key.
    """
    compared: list[tuple[Variant, str | None]] = [(variant, None) for variant in variants]
    compared += [(variant, label) for label, variant in results[0].equal_rows.items()]
    comparisons = tuple(
        _comparison(
            variant,
            label,
            [result.losses[index] for result in results],
            [result.reads[index] for result in results],
            head_size=head_size,
        )
        for index, (variant, label) in enumerate(compared)
    )
    first = [result.losses[0] for result in results]
    dense, _ = mean_and_error([loss.dense for loss in first], [loss.num_tokens for loss in first])
    return LengthReport(
        length=length,
        num_sequences=len(results),
        num_predicted_tokens=sum(loss.num_tokens for loss in first),
        perplexity_dense=math.exp(dense),
        comparisons=comparisons,
    )


def _comparison(
    variant: Variant, equal_rows: str | None, losses: Sequence[Losses], reads: Sequence[WindowReads], *, head_size: int
) -> DecodeComparison:
    num_tokens = [loss.num_tokens for loss in losses]
    dense, sparse = [loss.dense for loss in losses], [loss.sparse for loss in losses]
    change, error = compare_perplexities(dense, sparse, num_tokens)
    kl_divergence, kl_error = mean_and_error([loss.kl_divergence for loss in losses], num_tokens)
    row_lengths = np.concatenate([read.row_lengths for read in reads])
    keys, value_rows, copies, survivors, lost_mass = (
        np.concatenate([getattr(read, name) for read in reads], axis=1)
        for name in ("keys", "value_rows", "copies", "survivors", "lost_mass")
    )
    sparse_layers = reads[0].sparse_layers.tolist()
    keys_share, value_rows_share = _rows_share(keys, row_lengths), _rows_share(value_rows, row_lengths)
    copies_share = _rows_share(copies, row_lengths) if variant.method == "tiers" else None
    return DecodeComparison(
        variant=variant,
        equal_rows=equal_rows,
        change_percent=change,
        change_standard_error=error,
        kl_divergence=kl_divergence,
        kl_standard_error=kl_error,
        top1_agreement=mean_and_error([loss.top1_agreement for loss in losses], num_tokens)[0],
        acceptance=mean_and_error([min(loss.acceptance, 1.0) for loss in losses], num_tokens)[0],
        value_rows_share=value_rows_share,
        keys_read_share=keys_share,
        copies_read_share=copies_share,
        bytes_share=share_of_bytes(
            head_size=head_size,
            keys=keys_share,
            value_rows=value_rows_share,
            key_copies=0.0 if copies_share is None else len(sparse_layers) / max(1, len(reads[0].layers)),
            value_copies=0.0 if copies_share is None else copies_share,
        ),
        survivors=_survivors(survivors),
        lost_mass=_lost_mass(lost_mass),
        layers=tuple(
            LayerReads(
                layer=layer,
                value_rows_share=_rows_share(value_rows[index : index + 1], row_lengths),
                survivors=_survivors(survivors[sparse_layers.index(layer)]) if layer in sparse_layers else None,
                lost_mass=_lost_mass(lost_mass[sparse_layers.index(layer)]) if layer in sparse_layers else None,
            )
            for index, layer in enumerate(reads[0].layers.tolist())
        ),
        nll_changes=tuple(np.subtract(sparse, dense).tolist()),
    )


def share_of_bytes(
    *, head_size: int, keys: float, value_rows: float, key_copies: float = 0.0, value_copies: float = 0.0
) -> float:
    """Returns the bytes that attention reads of a 16-bit cache, over those that dense attention reads.

    With a head size of D, a key and a value have 2 D bytes each. A copy has 2 bytes for its step, and 4 bits a channel
    if it is of a key, 2 if it is of a value.

    Args:
        head_size: D.
        keys: share of the keys cached that are read exactly.
        value_rows: share of the values cached that are read exactly.
        key_copies: share of the keys cached whose copies are read: tiers read all of them, in layers that have tiers.
        value_copies: share of the values cached that are read as copies.
    """
    exact = 2 * head_size * (keys + value_rows)
    copied = (head_size / 2 + 2) * key_copies + (head_size / 4 + 2) * value_copies
    return (exact + copied) / (4 * head_size)


def _rows_share(value_rows: NDArray[np.int32], row_lengths: NDArray[np.int64]) -> float:
    num_layers, _, num_kv_heads = value_rows.shape
    return float(value_rows.sum(dtype=np.int64) / max(1, num_layers * num_kv_heads * row_lengths.sum()))


def _survivors(survivors: NDArray[np.int32]) -> Survivors | None:
    if survivors.size == 0:
        return None
    p50, p99 = np.quantile(survivors, [0.5, 0.99], method="inverted_cdf").tolist()
    return Survivors(p50=p50, p99=p99, max=int(survivors.max()))


def _lost_mass(lost_mass: NDArray[np.float32]) -> LostMass | None:
    if lost_mass.size == 0:
        return None
    return LostMass(
        mean=float(lost_mass.mean(dtype=np.float64)),
        p99=float(np.quantile(lost_mass, 0.99)),
        above_half=float((lost_mass > 0.5).mean()),
        above_nine_tenths=float((lost_mass > 0.9).mean()),
    )


def decode_table(report: DecodeReport) -> Table:
    """Returns the report as a table to print with rich.

    Args:
        report: the report.
    """
    of_lengths = ", ".join(
        f"{one.length} ({one.num_sequences} sequences, dense perplexity {one.perplexity_dense:.3f})"
        for one in report.lengths
    )
    table = Table(
        title=f"{report.setup.model}: the last {report.window} tokens, decoded behind a dense prompt",
        caption=f"lengths {of_lengths}; +- is one standard error",
    )
    for heading in ("length", "attention"):
        table.add_column(heading, no_wrap=True, justify="right" if heading == "length" else "left")
    for heading in (
        *("ppl change %", "KL", "same top-1 %", "accepted %", "keys %", "value rows %", "copies %", "bytes %"),
        "survivors p50 / p99 / max",
        *("lost mass mean / p99", "rows losing > .5 / .9, %"),
    ):
        table.add_column(heading, justify="right")
    for one in report.lengths:
        for index, comparison in enumerate(one.comparisons):
            last = index == len(one.comparisons) - 1
            table.add_row(str(one.length), *_cells(comparison), end_section=last)
    return table


def _cells(one: DecodeComparison) -> list[str]:
    name = one.variant.name if one.equal_rows is None else f"{one.variant.name} (rows of {one.equal_rows})"
    survivors, lost = one.survivors, one.lost_mass
    return [
        name,
        f"{one.change_percent:+.2f}"
        + ("" if one.change_standard_error is None else f" +- {one.change_standard_error:.2f}"),
        f"{one.kl_divergence:.5f}" + ("" if one.kl_standard_error is None else f" +- {one.kl_standard_error:.5f}"),
        f"{100 * one.top1_agreement:.1f}",
        f"{100 * one.acceptance:.2f}",
        _percent(one.keys_read_share),
        _percent(one.value_rows_share),
        _percent(one.copies_read_share),
        _percent(one.bytes_share),
        "" if survivors is None else f"{survivors.p50} / {survivors.p99} / {survivors.max}",
        "" if lost is None else f"{lost.mean:.3f} / {lost.p99:.3f}",
        "" if lost is None else f"{100 * lost.above_half:.2f} / {100 * lost.above_nine_tenths:.2f}",
    ]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"
