"""What thresholds keep of texts: as data, and what follows from it for bytes and speed."""

from collections.abc import Collection, Sequence
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from vllm_toptheta.report.collect import RECENT_TOKENS, SINK_TOKENS, SurvivorCounts
from vllm_toptheta.store import TextSource

__all__ = [
    "Curves",
    "Expectation",
    "LengthFindings",
    "SurvivorReport",
    "TargetFindings",
    "TextFindings",
    "expect",
    "summarise",
]

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Table = tuple[tuple[float, ...], ...]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Expectation(_Model):
    """What follows from the value rows read, if nothing but memory traffic takes time: bounds, not measurements."""

    value_rows_share: Share = Field(description="Value rows read over those cached, dense layers in full.")
    bytes_share: Share = Field(description="Keys and values read over those of dense attention: (1 + f) / 2.")
    attention_speedup: float = Field(description="At most: 2 / (1 + f).")
    step_speedup: float = Field(description="At most, with attention_share of a dense decode step in attention.")


def expect(value_rows_share: float, attention_share: float) -> Expectation:
    """Returns what to expect of a share of value rows read.

    Keys and values take the same bytes and all keys are read, so attention moves (1 + f) / 2 of the bytes; the rest of
    the step stays as it is (Amdahl's law).

    Args:
        value_rows_share: f, from 0 to 1.
        attention_share: of the time of a dense decode step, from 0 to 1.
    """
    bytes_share = (1 + value_rows_share) / 2
    return Expectation(
        value_rows_share=value_rows_share,
        bytes_share=bytes_share,
        attention_speedup=1 / bytes_share,
        step_speedup=1 / (1 - attention_share + attention_share * bytes_share),
    )


class LengthFindings(_Model):
    """Rows of about one length."""

    min_length: int = Field(ge=1, description="Tokens.")
    max_length: int = Field(ge=1, description="Tokens.")
    expectation: Expectation


class TextFindings(_Model):
    """What the thresholds keep of some texts. In dense layers all is 0, but the share of value rows read is 1."""

    text: tuple[TextSource, ...]
    num_rows: int = Field(ge=1, description="Thresholded rows of a layer.")
    mean_survivors: float = Field(ge=0, description="Over thresholded rows and heads of the sparse layers.")
    p95_survivors: int = Field(ge=0)
    no_survivor_share: Share = Field(description="Of rows and heads: those that keep no key.")
    mean_lost_mass: Share = Field(description="Over thresholded rows and heads of the sparse layers.")
    sparse_value_rows_share: Share = Field(description="As in the expectation, of the sparse layers alone.")
    by_length: tuple[LengthFindings, ...] = Field(min_length=1)
    head_mean_survivors: Table = Field(description="[num_layers][num_heads]")
    head_p95_survivors: Table = Field(description="[num_layers][num_heads]")
    head_lost_mass: Table = Field(description="[num_layers][num_heads], mean over rows.")
    group_value_rows_share: Table = Field(description="[num_layers][num_kv_heads], 1 in dense layers.")
    position_shares: Table = Field(
        description=f"[num_layers][3] of the survivors: among the first {SINK_TOKENS} keys, between, and among the "
        f"last {RECENT_TOKENS}."
    )
    position_rates: Table = Field(description="[num_layers][3] of the keys there: those that a head keeps.")

    @property
    def longest(self) -> LengthFindings:
        """The longest rows measured."""
        return self.by_length[-1]

    @property
    def worst_layer(self) -> tuple[int, float]:
        """The layer that loses most, and its lost mass, mean over its heads."""
        by_layer = [sum(heads) / len(heads) for heads in self.head_lost_mass]
        layer = max(range(len(by_layer)), key=by_layer.__getitem__)
        return layer, by_layer[layer]


class Curves(_Model):
    """Calibrated thresholds by length, where calibration puts them."""

    placement: Literal["pre_softmax", "post_softmax"]
    lengths: tuple[int, ...] = Field(description="Tokens, at which the thresholds are given.")
    thresholds: tuple[Table, ...] = Field(description="[num_lengths][num_layers][num_heads]")


class TargetFindings(_Model):
    """One floor, or one target of the store."""

    label: str
    weight_floor: float | None = Field(description="In multiples of a row's average weight; null if calibrated.")
    dense_length: int = Field(ge=0, description="Rows of at most this many tokens are dense.")
    dense_layers: tuple[int, ...]
    curves: Curves | None = Field(description="Of a target of the store; null where thresholds follow each row.")
    held_out: TextFindings
    calibration: TextFindings | None

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return len(self.held_out.head_lost_mass)

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """Layers that are not dense."""
        return tuple(layer for layer in range(self.num_layers) if layer not in self.dense_layers)


class SurvivorReport(_Model):
    """What thresholds keep of texts: what was run, and what was found for each target."""

    model: str = Field(description="Name of the model's directory.")
    thresholds: str | None = Field(description="Model id that a store was calibrated for; null without one.")
    num_sequences: int = Field(ge=1)
    length: int = Field(ge=2, description="Tokens of a sequence.")
    seed: int
    dtype: str
    device: str
    attention_share: Share = Field(description="Stated, not measured: of a dense decode step's time.")
    not_held_out: tuple[str, ...] = Field(description="Held-out texts that the thresholds were calibrated on.")
    not_calibrated_on: tuple[str, ...] = Field(description="Calibration texts that the manifest does not name.")
    versions: dict[str, str]
    targets: tuple[TargetFindings, ...] = Field(min_length=1)


def summarise(
    counts: SurvivorCounts, *, text: Sequence[TextSource], dense_layers: Collection[int], attention_share: float
) -> TextFindings:
    """Returns what was counted, per head and in total.

    Args:
        counts: of one target and some texts, with rows in every layer that is not dense.
        text: those texts.
        dense_layers: layers that count as reading every value row.
        attention_share: of the time of a dense decode step, from 0 to 1.
    """
    num_layers, num_heads, _ = counts.rows_by_survivors.shape
    sparse = np.array([layer for layer in range(num_layers) if layer not in dense_layers])
    per_layer = np.maximum(counts.rows, 1)[:, None]
    survivors = counts.survivors_by_position.sum(axis=2)
    cached = counts.value_rows_cached
    read = counts.value_rows_read
    shares = np.ones(read.shape[:2])
    shares[sparse] = read[sparse].sum(axis=2) / cached[sparse].sum(axis=1)[:, None]
    by_position = counts.survivors_by_position.sum(axis=1)
    pooled = counts.rows_by_survivors[sparse].sum(axis=(0, 1), dtype=np.int64)

    by_length = []
    edges = counts.bucket_edges
    for bucket in np.flatnonzero(cached[sparse[0]]):
        share = read[sparse, :, bucket].sum() / (cached[sparse, bucket].sum() * read.shape[1])
        whole = (len(sparse) * share + num_layers - len(sparse)) / num_layers
        by_length.append(
            LengthFindings(
                min_length=int(edges[bucket]),
                max_length=int(edges[bucket + 1]) - 1,
                expectation=expect(float(whole), attention_share),
            )
        )
    return TextFindings(
        text=tuple(text),
        num_rows=int(counts.rows[sparse[0]]),
        mean_survivors=float(survivors.sum() / pooled.sum()),
        p95_survivors=int(_percentile(pooled)),
        no_survivor_share=float(pooled[0] / pooled.sum()),
        mean_lost_mass=float(np.clip(counts.lost_mass.sum() / pooled.sum(), 0, 1)),
        sparse_value_rows_share=float(read[sparse].sum() / (cached[sparse].sum() * read.shape[1])),
        by_length=tuple(by_length),
        head_mean_survivors=_rows(survivors / per_layer),
        head_p95_survivors=_rows(_percentile(counts.rows_by_survivors)),
        head_lost_mass=_rows(counts.lost_mass / per_layer),
        group_value_rows_share=_rows(shares),
        position_shares=_rows(by_position / np.maximum(by_position.sum(axis=1, keepdims=True), 1)),
        position_rates=_rows(by_position / np.maximum(counts.keys_by_position * num_heads, 1)),
    )


def _percentile(rows_by_survivors: NDArray[np.int32] | NDArray[np.int64]) -> NDArray[np.int64]:
    """The least number of survivors that 95 % of the rows do not exceed; 0 without rows."""
    cumulative = rows_by_survivors.cumsum(axis=-1, dtype=np.int64)
    return np.asarray((cumulative < 0.95 * cumulative[..., -1:]).sum(axis=-1))


def _rows(table: NDArray[np.float64] | NDArray[np.int64]) -> Table:
    return tuple(map(tuple, table.astype(float).tolist()))
