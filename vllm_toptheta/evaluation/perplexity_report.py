"""What a comparison of predictions found: as data, as JSON, and as tables with the worst case on top."""

from collections.abc import Callable, Iterator, Sequence
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
    keys_share: Share | None = Field(
        default=None, description="Keys read exactly by a kv head over those cached, in thresholded rows."
    )
    mean_lost_mass: float = Field(
        description="As the softmax denominator has it; mean over thresholded rows and query heads."
    )
    mean_true_lost_mass: float | None = Field(
        default=None, description="Share of the dense softmax that does not survive, likewise."
    )
    mean_lost_mass_error: float | None = Field(
        default=None, description="Mean distance between the two, over thresholded rows and query heads."
    )
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
    columns = _columns(domain.comparisons, has_stores=has_stores)
    for heading in columns:
        is_text = heading in _TEXT_COLUMNS
        table.add_column(heading, no_wrap=is_text, justify="left" if is_text else "right")
    for comparison in domain.comparisons:
        table.add_row(*(cell(comparison) for cell in columns.values()))
    return table


_TEXT_COLUMNS = ("method", "thresholds", "target", "compensation")


def _columns(comparisons: Sequence[Comparison], *, has_stores: bool) -> dict[str, Callable[[Comparison], str]]:
    """Headings, and what is below them; those that say the same of every variant are left out."""
    columns: dict[str, Callable[[Comparison], str]] = {"method": lambda one: one.variant.method.replace("_", "-")}
    if has_stores:
        columns["thresholds"] = lambda one: one.variant.thresholds
    columns |= {
        "target": lambda one: f"{one.variant.target} {one.variant.restrictions}".rstrip(),
        "compensation": lambda one: one.variant.compensation,
        "ppl change %": lambda one: f"{one.change_percent:+.2f}" + _error(one.change_standard_error),
        "worst seq. %": lambda one: f"{one.worst_change_percent:+.2f}",
        "KL": lambda one: f"{one.kl_divergence:.4f}",
        "same top-1 %": lambda one: f"{100 * one.top1_agreement:.1f}",
        "rows thresholded %": lambda one: f"{100 * one.thresholded_share:.1f}",
    }
    if any(one.keys_share is not None and one.keys_share < 1 for one in comparisons):
        columns["keys read %"] = lambda one: "" if one.keys_share is None else f"{100 * one.keys_share:.1f}"
    columns |= {
        "value rows read %": lambda one: f"{100 * one.value_rows_share:.1f}",
        "elements kept %": lambda one: f"{100 * one.attention_elements_share:.1f}",
        "lost mass": lambda one: f"{one.mean_lost_mass:.4f}",
    }
    if any(one.mean_lost_mass_error for one in comparisons):
        columns["truly lost"] = lambda one: _mass(one.mean_true_lost_mass)
        columns["error"] = lambda one: _mass(one.mean_lost_mass_error)
    columns |= {
        "survivors": lambda one: f"{one.mean_survivors:.0f}",
        "p95": lambda one: str(one.p95_survivors),
    }
    return columns


def _error(standard_error: float | None) -> str:
    return "" if standard_error is None else f" +- {standard_error:.2f}"


def _mass(mass: float | None) -> str:
    return "" if mass is None else f"{mass:.4f}"
