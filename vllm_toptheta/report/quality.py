"""What is known of the quality of a mode: the evidence of a store, and all that tune measured, where its record is."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field

from vllm_toptheta.errors import ReportError
from vllm_toptheta.evaluation import DecodeReport, Tuned, read_tuned, tuned_file
from vllm_toptheta.evaluation.decode_report import LayerReads
from vllm_toptheta.evaluation.tuned import measured_length
from vllm_toptheta.store import FLOOR_PREFIX, Evidence, MeasuredLength, ThresholdStore, floor_label

__all__ = ["Quality", "Rung", "find_quality"]


class Rung(NamedTuple):
    """A floor of the ladder at one length, or an exact top-k beside it.

    Attributes:
        label: `floor:2` or `k:64`.
        equal_rows: of exact top-k, the floor's label; None of a floor.
        measured: what it cost.
    """

    label: str
    equal_rows: str | None
    measured: MeasuredLength


class Quality(BaseModel):
    """What is known of one mode."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    evidence: Evidence
    ladder: DecodeReport | None = Field(description="See `Tuned`; null where there is only a store.")
    confirmations: tuple[DecodeReport, ...]
    other_weights: bool = Field(description="Whether the evidence is of other weights than the model that was named.")

    @classmethod
    def of(cls, evidence: Evidence, tuned: Tuned | None, *, weights_sha256: str | None = None) -> Self:
        """Returns what is known.

        Args:
            evidence: of the mode.
            tuned: its record, if there is one.
            weights_sha256: of the model that the page is about, if one was named.
        """
        return cls(
            evidence=evidence,
            ladder=None if tuned is None else tuned.ladder,
            confirmations=() if tuned is None else tuned.confirmations,
            other_weights=weights_sha256 is not None and weights_sha256 != evidence.weights_sha256,
        )

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of the sequences that were measured, ascending."""
        return tuple(sorted(one.length for one in self.evidence.served.measured))

    @cached_property
    def rungs(self) -> tuple[Rung, ...]:
        """The ladder, floors ascending at each length; empty without a record."""
        if self.ladder is None:
            return ()
        return tuple(
            Rung(
                comparison.variant.target,
                comparison.equal_rows,
                measured_length(one, comparison, confidence=self.evidence.confidence),
            )
            for one in self.ladder.lengths
            for comparison in one.comparisons
        )

    @property
    def floors(self) -> tuple[float, ...]:
        """The floors of the ladder, ascending; empty without a record."""
        labels = {rung.label for rung in self.rungs if rung.equal_rows is None}
        return tuple(sorted(float(label.removeprefix(FLOOR_PREFIX)) for label in labels))

    def at_floor(self, weight_floor: float) -> tuple[MeasuredLength, ...]:
        """Returns what a floor cost on the ladder, by length.

        Args:
            weight_floor: one of `floors`.
        """
        label = floor_label(weight_floor)
        return tuple(rung.measured for rung in self.rungs if rung.equal_rows is None and rung.label == label)

    def confirmed_at(self, weight_floor: float) -> tuple[MeasuredLength, ...]:
        """Returns what a floor cost where it was to be confirmed, by length; empty if it was not tried there.

        Args:
            weight_floor: any.
        """
        label = floor_label(weight_floor)
        return tuple(
            measured_length(one, comparison, confidence=self.evidence.confidence)
            for report in self.confirmations
            for one in report.lengths
            for comparison in one.comparisons
            if comparison.variant.target == label
        )

    @property
    def served_layers(self) -> dict[int, tuple[LayerReads, ...]]:
        """What each layer reads with the floor that is served, by length, where confirmed; empty without a record."""
        label = floor_label(self.evidence.served.weight_floor or 0.0)
        # a floor that was confirmed is not measured again
        last = next((report for report in reversed(self.confirmations) if _has(report, label)), None)
        return {
            one.length: comparison.layers
            for one in (() if last is None else last.lengths)
            for comparison in one.comparisons
            if comparison.variant.target == label
        }


def _has(report: DecodeReport, label: str) -> bool:
    return any(comparison.variant.target == label for comparison in report.lengths[0].comparisons)


def find_quality(
    store: ThresholdStore | None, files: Sequence[Path], *, weights_sha256: str | None = None
) -> tuple[Quality, ...]:
    """Returns what is known of each mode, those of the store first.

    Args:
        store: with evidence or without; the records that tune left beside it are found.
        files: further records, which need no store.
        weights_sha256: of the model that the page is about, if one was named.

    Raises:
        EvaluationError: a file is no record.
        ReportError: a record is that of other evidence than the store's, or two are of one mode.
    """
    named: dict[str, Tuned] = {}
    for file in files:
        tuned = read_tuned(file)
        mode = tuned.evidence.mode
        kept = None if store is None else store.manifest.evidence(mode)
        if mode in named:
            raise ReportError(f"a second record of mode {mode}", file=file, field="--from", remedy="Name one of them")
        if kept is not None and kept != tuned.evidence:
            raise ReportError(
                f"not what the evidence in {store.folder if store else ''} comes from",
                file=file,
                field="--from",
                remedy="Leave the record out, or draw it alone, without the store",
            )
        named[mode] = tuned
    found = []
    for evidence in () if store is None else store.manifest.quality or ():
        record = named.pop(evidence.mode, None) or _beside(store, evidence)
        found.append(Quality.of(evidence, record, weights_sha256=weights_sha256))
    found += [Quality.of(tuned.evidence, tuned, weights_sha256=weights_sha256) for tuned in named.values()]
    return tuple(found)


def _beside(store: ThresholdStore | None, evidence: Evidence) -> Tuned | None:
    """The record beside a store; None where there is none, or it is of evidence that was replaced."""
    file = None if store is None else tuned_file(store.folder, evidence.mode)
    if file is None or not file.is_file():
        return None
    tuned = read_tuned(file)
    return tuned if tuned.evidence == evidence else None
