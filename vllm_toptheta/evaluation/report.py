"""What a comparison of predictions found: as data, as JSON, and as tables with the worst case on top."""

from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from rich.table import Table

from vllm_toptheta.evaluation.subject import Setup
from vllm_toptheta.evaluation.variants import Variant
from vllm_toptheta.reference import Phase
from vllm_toptheta.store import TextSource

__all__ = ["Comparison", "DomainReport", "PerplexityReport", "perplexity_tables"]

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Comparison(_Model):
    """One sparse attention against dense attention, over the same tokens of one domain."""

    variant: Variant
    perplexity_dense: float
    perplexity_sparse: float
    change_percent: float = Field(description="Of the perplexity, 100 * (sparse / dense - 1).")
    change_standard_error: float | None = Field(
        description="Of change_percent, from its spread between sequences; null for a single sequence."
    )
    worst_sequence: int = Field(ge=0, description="The sequence whose perplexity grows most, counted from 0.")
    worst_change_percent: float = Field(description="Of that sequence's perplexity.")
    kl_divergence: float = Field(description="KL(dense || sparse) of the next token, mean over tokens, nats.")
    kl_standard_error: float | None
    top1_agreement: Share = Field(description="Share of tokens for which both predict the same one.")
    thresholded_share: Share = Field(description="Rows of the sparse layers that were thresholded.")
    value_rows_share: Share = Field(description="Value rows read by a kv head over those cached, in thresholded rows.")
    attention_elements_share: Share = Field(description="Keys kept by a query head over those seen, likewise.")
    mean_lost_mass: float = Field(description="Mean over thresholded rows and query heads.")
    mean_survivors: float = Field(ge=0, description="Mean over thresholded rows and query heads.")
    p95_survivors: int = Field(ge=0, description="95th percentile over thresholded rows and query heads.")
    nll_changes: tuple[float, ...] = Field(description="Change of the mean loss of each sequence, nats per token.")


class DomainReport(_Model):
    """What was compared on one kind of text, the worst variant first."""

    domain: str
    text: tuple[TextSource, ...]
    not_held_out: tuple[str, ...] = Field(description="Names of texts that thresholds were calibrated on.")
    num_sequences: int = Field(ge=1)
    num_predicted_tokens: int = Field(ge=1, description="Those behind the prompts, which are compared.")
    max_length: int = Field(ge=2, description="Tokens of the longest sequence.")
    comparisons: tuple[Comparison, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        changes = [comparison.change_percent for comparison in self.comparisons]
        if changes != sorted(changes, reverse=True):
            raise ValueError("comparisons: the largest change of perplexity comes first")
        return self


class PerplexityReport(_Model):
    """An evaluation by perplexity: how it was made, and its domains, the one with the worst variant first."""

    schema_version: Literal[2] = 2
    setup: Setup
    phase: Phase = Field(description="Which rows were thresholded.")
    seed: int
    domains: tuple[DomainReport, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        worst = [domain.comparisons[0].change_percent for domain in self.domains]
        if worst != sorted(worst, reverse=True):
            raise ValueError("domains: the one with the largest change of perplexity comes first")
        return self


def perplexity_tables(report: PerplexityReport) -> Iterator[Table]:
    """Yields a table for each domain to print with rich, the worst case on top.

    Args:
        report: the report.
    """
    has_stores = len(report.setup.stores) > 1
    for domain in report.domains:
        yield _domain_table(report, domain, has_stores=has_stores)


def _domain_table(report: PerplexityReport, domain: DomainReport, *, has_stores: bool) -> Table:
    caption = (
        f"{domain.num_sequences} sequences of at most {domain.max_length} tokens, {domain.num_predicted_tokens} "
        f"predicted; phase {report.phase}; dense perplexity {domain.comparisons[0].perplexity_dense:.3f}; "
        "+- is one standard error; shares and survivors are of thresholded rows"
    )
    if domain.not_held_out:
        caption += f"\nNOT HELD OUT, thresholds were calibrated on: {', '.join(domain.not_held_out)}"
    table = Table(title=f"{report.setup.model} on {domain.domain}: sparse against dense attention", caption=caption)
    for heading in ("method", *(["thresholds"] if has_stores else []), "target", "compensation"):
        table.add_column(heading, no_wrap=True)
    for heading in ("ppl change %", "worst seq. %", "KL", "same top-1 %", "rows thresholded %"):
        table.add_column(heading, justify="right")
    for heading in ("value rows read %", "elements kept %", "lost mass", "survivors", "p95"):
        table.add_column(heading, justify="right")
    for comparison in domain.comparisons:
        variant, error = comparison.variant, comparison.change_standard_error
        table.add_row(
            variant.method.replace("_", "-"),
            *([variant.thresholds] if has_stores else []),
            variant.target if variant.cap_k is None else f"{variant.target} cap {variant.cap_k}",
            variant.compensation,
            f"{comparison.change_percent:+.2f}" + ("" if error is None else f" +- {error:.2f}"),
            f"{comparison.worst_change_percent:+.2f}",
            f"{comparison.kl_divergence:.4f}",
            f"{100 * comparison.top1_agreement:.1f}",
            f"{100 * comparison.thresholded_share:.1f}",
            f"{100 * comparison.value_rows_share:.1f}",
            f"{100 * comparison.attention_elements_share:.1f}",
            f"{comparison.mean_lost_mass:.4f}",
            f"{comparison.mean_survivors:.0f}",
            str(comparison.p95_survivors),
        )
    return table
