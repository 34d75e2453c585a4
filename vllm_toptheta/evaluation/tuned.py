"""All that tune measured, as one record: a manifest has room for the promises' own figures only."""

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_toptheta.errors import EvaluationError
from vllm_toptheta.evaluation.decode_report import DecodeComparison, DecodeReport, LengthReport
from vllm_toptheta.evaluation.paired import upper_bound
from vllm_toptheta.store import Evidence, MeasuredLength

__all__ = ["Tuned", "measured_length", "read_tuned", "tuned_file"]

_MAX_BYTES = 256 << 20


class Tuned(BaseModel):
    """What was measured, and the evidence that it gave."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    evidence: Evidence = Field(description="As the manifest has it.")
    ladder: DecodeReport = Field(
        description="Every floor on the sequences that the choice was made on, and exact top-k where it was asked for."
    )
    confirmations: tuple[DecodeReport, ...] = Field(
        description="What was chosen, on sequences that the choice did not see; those that failed too, in their order."
    )

    @model_validator(mode="after")
    def _check_figures(self) -> Self:
        for report in (self.ladder, *self.confirmations):
            for one in report.lengths:
                for comparison in one.comparisons:
                    measured_length(one, comparison, confidence=self.evidence.confidence)
        return self


def measured_length(one: LengthReport, comparison: DecodeComparison, *, confidence: float) -> MeasuredLength:
    """Returns what was measured at one length as evidence has it, with bounds.

    Args:
        one: of that length.
        comparison: one of its comparisons.
        confidence: from .5 to 1, with which the bounds hold.

    Raises:
        ValueError: there are no errors, as of one sequence and in reports of older releases; or a figure is none.
    """
    change_error, kl_error, bytes_share = (
        comparison.change_standard_error,
        comparison.kl_standard_error,
        comparison.bytes_share,
    )
    if change_error is None or kl_error is None or bytes_share is None or one.num_sequences < 2:
        raise ValueError("measured without standard errors or bytes")

    def bound(mean: float, error: float) -> float:
        return upper_bound(mean, error, one.num_sequences, confidence=confidence)

    return MeasuredLength(
        length=one.length,
        num_sequences=one.num_sequences,
        num_tokens=one.num_predicted_tokens,
        perplexity_dense=one.perplexity_dense,
        change_percent=comparison.change_percent,
        change_error=change_error,
        change_bound=bound(comparison.change_percent, change_error),
        kl_divergence=comparison.kl_divergence,
        kl_error=kl_error,
        kl_bound=bound(comparison.kl_divergence, kl_error),
        top1_agreement=comparison.top1_agreement,
        value_rows_share=comparison.value_rows_share,
        bytes_share=bytes_share,
        lost_mass_p99=_lost_mass_p99(comparison),
    )


def tuned_file(store: Path, mode: str) -> Path:
    """Returns where the record of a store's evidence lies: beside it, for a store holds no other files.

    Args:
        store: the store's folder.
        mode: of the evidence.
    """
    return store.with_name(f"{store.name}.tune-{mode}.json")


def read_tuned(file: Path) -> Tuned:
    """Reads a record.

    Args:
        file: as tune has written it.

    Raises:
        EvaluationError: it cannot be read, or is no such record.
    """
    remedy = "Name a file that toptheta tune has written (--json)"
    try:
        with file.open("rb") as stream:
            content = stream.read(_MAX_BYTES + 1)
    except OSError as error:
        raise EvaluationError(f"cannot be read: {error.strerror}", file=file, remedy=remedy) from None
    if len(content) > _MAX_BYTES:
        raise EvaluationError(f"larger than {_MAX_BYTES} bytes", file=file, remedy=remedy)
    try:
        return Tuned.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        field = ".".join(map(str, first["loc"])) or None
        message = first["msg"].splitlines()[0]
        raise EvaluationError(f"not a record of tune: {message}", file=file, field=field, remedy=remedy) from None


def _lost_mass_p99(comparison: DecodeComparison) -> tuple[float | None, ...]:
    by_layer = {reads.layer: reads.lost_mass.p99 for reads in comparison.layers if reads.lost_mass is not None}
    return tuple(by_layer.get(layer) for layer in range(max(by_layer, default=-1) + 1))
