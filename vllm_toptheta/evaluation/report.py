"""What an evaluation found: as data, as JSON, and as a table with the worst case on top."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from rich.table import Table

from vllm_toptheta.reference import Denominator, Placement
from vllm_toptheta.store import TextSource

__all__ = ["Comparison", "QualityReport", "quality_table"]

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Comparison(_Model):
    """Top-Theta attention at one target k against dense attention, over the same tokens."""

    target_k: int = Field(ge=1)
    perplexity_dense: float
    perplexity_sparse: float
    change_percent: float = Field(description="Of the perplexity, 100 * (sparse / dense - 1).")
    change_standard_error: float | None = Field(
        description="Of change_percent, from its spread between sequences; null for a single sequence."
    )
    kl_divergence: float = Field(description="KL(dense || sparse) of the next token, mean over tokens, nats.")
    top1_agreement: Share = Field(description="Share of tokens for which both predict the same one.")
    value_rows_share: Share = Field(description="Value rows read by a kv head over those cached, in thresholded rows.")
    mean_lost_mass: float = Field(description="Mean over thresholded rows and query heads.")
    mean_survivors: float = Field(ge=0, description="Mean over thresholded rows and query heads.")
    p95_survivors: int = Field(ge=0, description="95th percentile over thresholded rows and query heads.")
    nll_changes: tuple[float, ...] = Field(description="Change of the mean loss of each sequence, nats per token.")


class QualityReport(_Model):
    """An evaluation: what was compared, and the comparisons, the worst first."""

    schema_version: Literal[1] = 1
    model: str = Field(description="Name of the model's directory.")
    thresholds: str = Field(description="Model id that the thresholds were calibrated for.")
    text: tuple[TextSource, ...]
    not_held_out: tuple[str, ...] = Field(description="Names of texts that the thresholds were calibrated on.")
    num_sequences: int = Field(ge=1)
    length: int = Field(ge=2, description="Tokens of a sequence.")
    seed: int
    dtype: str
    placement: Placement
    denominator: Denominator
    value_mean: bool
    dense_layers: tuple[int, ...]
    versions: dict[str, str]
    comparisons: tuple[Comparison, ...]

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        changes = [comparison.change_percent for comparison in self.comparisons]
        if changes != sorted(changes, reverse=True):
            raise ValueError("comparisons: the largest change of perplexity comes first")
        return self


def quality_table(report: QualityReport) -> Table:
    """Returns the report as a table to print with rich, the worst case on top.

    Args:
        report: the report.
    """
    compensation = f"denominator {report.denominator}, value mean {'on' if report.value_mean else 'off'}"
    caption = f"{report.num_sequences} sequences of {report.length} tokens, {compensation}; +- is one standard error"
    if report.not_held_out:
        caption += f"\nNOT HELD OUT, the thresholds were calibrated on: {', '.join(report.not_held_out)}"
    table = Table(title=f"{report.model}: Top-Theta against dense attention", caption=caption)
    for heading in ("k", "dense ppl", "sparse ppl", "change %", "KL", "same top-1 %"):
        table.add_column(heading, justify="right")
    for heading in ("value rows read %", "lost mass", "survivors", "p95"):
        table.add_column(heading, justify="right")
    for comparison in report.comparisons:
        error = comparison.change_standard_error
        table.add_row(
            str(comparison.target_k),
            f"{comparison.perplexity_dense:.3f}",
            f"{comparison.perplexity_sparse:.3f}",
            f"{comparison.change_percent:+.2f}" + ("" if error is None else f" +- {error:.2f}"),
            f"{comparison.kl_divergence:.4f}",
            f"{100 * comparison.top1_agreement:.1f}",
            f"{100 * comparison.value_rows_share:.1f}",
            f"{comparison.mean_lost_mass:.4f}",
            f"{comparison.mean_survivors:.0f}",
            str(comparison.p95_survivors),
        )
    return table
