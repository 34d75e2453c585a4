"""What sparse attention changes in a model's predictions: the same held-out text, dense and sparse.

Every figure is paired: both sides see the same tokens, so that what differs between texts cancels.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vllm_toptheta.calibration.model import hidden_states, overriding_attention
from vllm_toptheta.calibration.override import DenseOverride
from vllm_toptheta.calibration.plausible import check_understanding
from vllm_toptheta.calibration.progress import progress_bar
from vllm_toptheta.errors import EvaluationError
from vllm_toptheta.evaluation.domains import Domain, Sample
from vllm_toptheta.evaluation.losses import Losses, compare_predictions, head_of
from vllm_toptheta.evaluation.paired import compare_perplexities, mean_and_error
from vllm_toptheta.evaluation.perplexity_report import Comparison, DomainReport, PerplexityReport
from vllm_toptheta.evaluation.sparse import SparseAttention
from vllm_toptheta.evaluation.sparse_override import ReadCounts, SparseOverride
from vllm_toptheta.evaluation.subject import Subject
from vllm_toptheta.evaluation.variants import Variant, store_of
from vllm_toptheta.reference import Phase
from vllm_toptheta.store import ThresholdStore

__all__ = ["compare_on_samples", "evaluate_perplexity"]


def evaluate_perplexity(
    subject: Subject,
    domains: Sequence[Domain],
    variants: Sequence[Variant],
    *,
    phase: Phase = "both",
    seed: int = 0,
    progress: bool = True,
) -> PerplexityReport:
    """Compares variants of sparse attention with dense attention on texts.

    Args:
        subject: the model, and the stores that the variants name.
        domains: what to compare on.
        variants: what to compare, as `variants.expand_variants` returns them.
        phase: which rows are thresholded: those of the prompts, those behind them, or all. Predictions are compared
            behind the prompts, whatever the phase.
        seed: of the samples, to record.
        progress: show a progress bar on stderr.

    Returns:
        The report, the worst first.

    Raises:
        CalibrationError: the model is not supported.
        EvaluationError: there is nothing to compare, or the model's head is not understood.
        StoreError: a store lacks what a variant needs.
    """
    if not domains:
        raise EvaluationError(
            "no text to compare on", field="--text", remedy="Give text files that were not calibrated on"
        )
    for domain in domains:
        sequences = [sample.token_ids for sample in domain.samples]
        check_understanding(subject.model, sequences, model_dir=subject.model_dir)
    with progress_bar("passes", enabled=progress) as bar:
        task = bar.add_task("evaluating", total=sum(len(domain.samples) for domain in domains) * (1 + len(variants)))
        reports = []
        for domain in domains:
            comparisons = compare_on_samples(
                subject.model,
                domain.samples,
                subject.stores,
                variants,
                phase=phase,
                on_pass=lambda: bar.advance(task),
            )
            reports.append(_domain_report(domain, subject.stores, comparisons))
    return PerplexityReport(
        setup=subject.setup(),
        phase=phase,
        seed=seed,
        domains=tuple(sorted(reports, key=lambda report: report.comparisons[0].change_percent, reverse=True)),
    )


def compare_on_samples(
    model: Any,
    samples: Sequence[Sample],
    stores: Mapping[str, ThresholdStore],
    variants: Sequence[Variant],
    *,
    phase: Phase = "both",
    on_pass: Callable[[], object] = lambda: None,
) -> list[Comparison]:
    """Compares variants of sparse attention with dense attention on token sequences.

    One dense pass over a sample serves all variants. A thresholded row is computed as a decode step of its length
    would be: row n uses theta(n), with shadow keys its own page has no codes yet, and the dense layers of the store
    stay dense.

    Args:
        model: a transformers causal language model.
        samples: at least one, each of more tokens than its prompt.
        stores: threshold stores by their labels, calibrated for the model; those that the variants name.
        variants: what to compare, at least one.
        phase: which rows are thresholded.
        on_pass: called after each pass of the model over a sample.

    Returns:
        One comparison for each variant, in their order.

    Raises:
        CalibrationError: the model is not supported.
        EvaluationError: there is nothing to compare, or the model's head is not understood.
        StoreError: a store lacks what a variant needs.
    """
    if not variants or not samples:
        raise EvaluationError("nothing to compare: give at least one text and one target")
    for index, sample in enumerate(samples):
        if len(sample.token_ids) <= max(sample.num_prompt_tokens, 1):
            raise EvaluationError(f"sample {index}: no token comes after its prompt", field="num_prompt_tokens")
    max_length = max(len(sample.token_ids) for sample in samples)
    attentions = [
        SparseAttention(variant, store_of(variant, stores), max_length=max_length, phase=phase, device=model.device)
        for variant in variants
    ]
    longest = max(sample.num_prompt_tokens for sample in samples) if phase == "prefill" else max_length
    for attention in attentions:
        if attention.dense_length >= longest:
            raise EvaluationError(
                f"no {'prompt' if phase == 'prefill' else 'sample'} is longer than {longest} tokens, "
                f"so {attention.variant.target} keeps every key",
                remedy="Ask for longer ones or a smaller target",
            )
    counts = [ReadCounts(max_length, device=model.device) for _ in variants]
    losses: list[list[Losses]] = [[] for _ in variants]
    head = head_of(model, samples[0].token_ids)
    for sample in samples:
        prompt = sample.num_prompt_tokens
        overrides = [
            SparseOverride(attention, num_prompt_tokens=prompt, counts=count)
            for attention, count in zip(attentions, counts, strict=True)
        ]
        states = []
        for override in (DenseOverride(), *overrides):
            with overriding_attention(model, override):
                states.append(hidden_states(model, sample.token_ids))
            on_pass()
        compared = compare_predictions(head, sample.token_ids, states[0], states[1:], num_prompt_tokens=prompt)
        for of_variant, loss in zip(losses, compared, strict=True):
            of_variant.append(loss)
    return [_comparison(variant, loss, count) for variant, loss, count in zip(variants, losses, counts, strict=True)]


def _comparison(variant: Variant, losses: Sequence[Losses], counts: ReadCounts) -> Comparison:
    num_tokens = [loss.num_tokens for loss in losses]
    dense, sparse = [loss.dense for loss in losses], [loss.sparse for loss in losses]
    change, error = compare_perplexities(dense, sparse, num_tokens)
    kl_divergence, kl_error = mean_and_error([loss.kl_divergence for loss in losses], num_tokens)
    nll_changes = np.subtract(sparse, dense)
    worst = int(nll_changes.argmax())
    return Comparison(
        variant=variant,
        perplexity_dense=math.exp(mean_and_error(dense, num_tokens)[0]),
        perplexity_sparse=math.exp(mean_and_error(sparse, num_tokens)[0]),
        change_percent=change,
        change_standard_error=error,
        worst_sequence=worst,
        worst_change_percent=100 * math.expm1(nll_changes[worst]),
        kl_divergence=kl_divergence,
        kl_standard_error=kl_error,
        top1_agreement=mean_and_error([loss.top1_agreement for loss in losses], num_tokens)[0],
        thresholded_share=counts.thresholded_share,
        value_rows_share=counts.value_rows_share,
        attention_elements_share=counts.attention_elements_share,
        keys_share=counts.keys_share,
        mean_lost_mass=counts.mean_lost_mass,
        mean_true_lost_mass=counts.mean_true_lost_mass,
        mean_lost_mass_error=counts.mean_lost_mass_error,
        mean_survivors=counts.mean_survivors,
        p95_survivors=counts.p95_survivors,
        nll_changes=tuple(nll_changes.tolist()),
    )


def _domain_report(
    domain: Domain, stores: Mapping[str, ThresholdStore], comparisons: Sequence[Comparison]
) -> DomainReport:
    calibrated_on = frozenset().union(*(store.manifest.calibrated_on for store in stores.values()))
    return DomainReport(
        domain=domain.name,
        text=domain.sources,
        not_held_out=tuple(source.name for source in domain.sources if source.sha256 in calibrated_on),
        num_sequences=len(domain.samples),
        num_predicted_tokens=sum(len(sample.token_ids) - max(sample.num_prompt_tokens, 1) for sample in domain.samples),
        max_length=max(len(sample.token_ids) for sample in domain.samples),
        comparisons=tuple(sorted(comparisons, key=lambda comparison: comparison.change_percent, reverse=True)),
    )
