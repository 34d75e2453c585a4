import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from tests.calibration.families import HYBRIDS, family_config
from tests.calibration.tiny_model import random_tokens, save_model_dir, tiny_config, tiny_model
from tests.evaluation.tiny_store import tiny_store
from vllm_toptheta.errors import (
    CalibrationError,
    EvaluationError,
    ExpectationsMissing,
    FingerprintMismatch,
    ShadowMissing,
    TargetOutOfRange,
)
from vllm_toptheta.evaluation import (
    Comparison,
    Domain,
    PerplexityReport,
    Sample,
    Subject,
    Variant,
    evaluate_perplexity,
    expand_variants,
    perplexity_tables,
    text_domain,
)
from vllm_toptheta.evaluation.perplexity import compare_on_samples
from vllm_toptheta.reference import Phase
from vllm_toptheta.store import ThresholdStore

K8 = Variant(target="k:8")


def compare(
    model: Any, store: ThresholdStore, *variants: Variant, samples: list[Sample] | None = None, phase: Phase = "both"
) -> list[Comparison]:
    samples = samples or [Sample(random_tokens(120, seed)) for seed in range(2)]
    return compare_on_samples(model, samples, {"": store}, variants or [K8], phase=phase)


def keep_everything(store: ThresholdStore) -> ThresholdStore:
    assert store.calibrated is not None
    coefficients = np.zeros_like(store.calibrated.coefficients)
    coefficients[..., 0] = -np.inf
    return replace(store, calibrated=replace(store.calibrated, coefficients=coefficients))


def rendered(report: PerplexityReport) -> str:
    console = Console(width=220, file=io.StringIO(), record=True)
    for table in perplexity_tables(report):
        console.print(table)
    return console.export_text()


def text_domains(folder: Path, subject: Subject, *, sequences: int = 3) -> list[Domain]:
    return [
        text_domain(
            name,
            [folder / f"{name}.txt"],
            subject.tokenizer,
            num_sequences=sequences,
            length=100,
            num_prompt_tokens=0,
            seed=0,
        )
        for name in ("prose", "code")
    ]


@pytest.mark.parametrize("compensation", ["none", "sdc", "sdc+vmc", "offline+vmc", "scaled_exp_threshold+vmc"])
def test_thresholds_of_minus_infinity_change_nothing_at_all(
    model: Any, store: ThresholdStore, compensation: str
) -> None:
    variant = Variant(target="k:8", compensation=compensation)
    (comparison,) = compare(model, keep_everything(store), variant)
    assert (comparison.change_percent, comparison.change_standard_error) == (0.0, 0.0)
    assert (comparison.kl_divergence, comparison.kl_standard_error) == (0.0, 0.0)
    assert comparison.top1_agreement == 1.0
    assert comparison.mean_lost_mass == 0.0
    assert (comparison.value_rows_share, comparison.attention_elements_share) == (1.0, 1.0)
    assert comparison.mean_survivors == pytest.approx(np.arange(9, 121).mean())
    assert comparison.thresholded_share == pytest.approx(112 / 120)


def test_dense_perplexity_is_the_models_own(model: Any, store: ThresholdStore) -> None:
    tokens = random_tokens(120)
    (comparison,) = compare(model, store, samples=[Sample(tokens)])
    with torch.inference_mode():
        expected = model(input_ids=tokens[None], labels=tokens[None]).loss
    assert comparison.perplexity_dense == pytest.approx(math.exp(expected), rel=1e-3)
    assert comparison.change_standard_error is None
    assert comparison.perplexity_sparse != comparison.perplexity_dense


def test_top_k_keeps_k_keys_and_thresholds_about_k(model: Any, store: ThresholdStore) -> None:
    theta, top_k = compare(model, store, K8, Variant(method="top_k", target="k:8"))
    assert top_k.mean_survivors == top_k.p95_survivors == 8
    assert 4 < theta.mean_survivors < 16
    assert theta.p95_survivors > theta.mean_survivors
    assert theta.attention_elements_share == pytest.approx(theta.mean_survivors / np.arange(9, 121).mean(), rel=0.5)
    assert theta.attention_elements_share < theta.value_rows_share < 1


def test_every_compensation_makes_a_difference_of_its_own(model: Any, store: ThresholdStore) -> None:
    variants = expand_variants({"": store}, targets=["8"], compensations=["all"])
    found = {
        comparison.variant.compensation: comparison.kl_divergence for comparison in compare(model, store, *variants)
    }
    assert len(set(found.values())) == len(found) == 9
    # what the scale was measured for: the paper's estimate of the missing mass is far too large
    assert found["scaled_exp_threshold+vmc"] < found["exp_threshold+vmc"]
    assert found["sdc+vmc"] < min(found["none"], found["sdc"])


def test_shadow_keys_read_fewer_keys_and_know_less(model: Any, store: ThresholdStore) -> None:
    variants = expand_variants(
        {"": store},
        targets=["floor:3"],
        modes=["values", "shadow"],
        compensations=["none", "sdc", "sdc+vmc", "candidates", "candidates+vmc", "shadow", "shadow+vmc"],
    )
    longer = [Sample(random_tokens(400))]  # the last 128 keys are always candidates
    found = {
        (comparison.variant.method, comparison.variant.compensation): comparison
        for comparison in compare(model, store, *variants, samples=longer)
    }
    assert len({comparison.kl_divergence for comparison in found.values()}) == len(found) == 10
    values, exact = found["top_theta", "sdc+vmc"], found["shadow", "sdc+vmc"]
    assert (values.keys_share, values.mean_lost_mass_error) == (1.0, 0.0)
    assert exact.keys_share is not None
    assert exact.value_rows_share < exact.keys_share < 0.9
    assert exact.mean_survivors < values.mean_survivors
    assert exact.mean_true_lost_mass == exact.mean_lost_mass > values.mean_lost_mass
    for name in ("candidates+vmc", "shadow+vmc"):
        estimated = found["shadow", name]
        assert estimated.mean_lost_mass_error is not None
        assert estimated.mean_true_lost_mass is not None
        assert 0 < abs(estimated.mean_lost_mass - estimated.mean_true_lost_mass) < estimated.mean_lost_mass_error < 0.25


def test_shadow_keys_that_are_all_candidates_change_nothing(model: Any, store: ThresholdStore) -> None:
    everything = replace(store.shadow, margin=np.full_like(store.shadow.margin, 1e6))
    read = replace(store, shadow_keys=everything)
    for compensation in ("none", "sdc+vmc"):
        shadow = Variant(method="shadow", target="floor:3", compensation=compensation)
        longer = [Sample(random_tokens(400))]
        plain = Variant(target="floor:3", compensation=compensation)
        values, candidates = compare(model, read, plain, shadow, samples=longer)
        assert candidates.model_copy(update={"variant": values.variant}) == values


def test_layers_are_dense_as_asked(model: Any, store: ThresholdStore) -> None:
    variants = [Variant(target="k:8", dense_layers=layers) for layers in (None, (0,), (), (0, 1, 2), (0, 1, 2, 3))]
    default, same, none, last, every = compare(model, store, *variants)
    assert default.model_copy(update={"variant": same.variant}) == same
    assert none.kl_divergence != default.kl_divergence > last.kl_divergence > every.kl_divergence == 0
    assert every.thresholded_share == 0


def test_placement_and_cap_are_followed(model: Any, store: ThresholdStore, tmp_path: Path) -> None:
    after = tiny_store(tmp_path / "after", model, placement="post_softmax")
    (pre,), (post,) = compare(model, store), compare(model, after)
    assert post.mean_survivors != pre.mean_survivors
    assert 4 < post.mean_survivors < 16
    (capped,) = compare(model, store, Variant(target="k:8", cap_k=3))
    assert capped.p95_survivors == 3


def test_phases_threshold_their_rows_and_compare_the_same_tokens(model: Any, store: ThresholdStore) -> None:
    samples = [Sample(random_tokens(120), num_prompt_tokens=70)]
    found = {phase: compare(model, store, samples=samples, phase=phase)[0] for phase in ("prefill", "decode", "both")}
    shares = {phase: comparison.thresholded_share for phase, comparison in found.items()}
    assert shares == {
        "prefill": pytest.approx(62 / 120),
        "decode": pytest.approx(50 / 120),
        "both": pytest.approx(112 / 120),
    }
    assert len({comparison.perplexity_sparse for comparison in found.values()}) == 3
    with torch.inference_mode():
        labels = samples[0].token_ids.clone()
        labels[:70] = -100
        expected = math.exp(model(input_ids=samples[0].token_ids[None], labels=labels[None]).loss)
    for comparison in found.values():
        assert comparison.perplexity_dense == pytest.approx(expected, rel=1e-3)


def test_a_dense_prompt_predicts_the_token_behind_it_alike(model: Any, store: ThresholdStore) -> None:
    samples = [Sample(random_tokens(120), num_prompt_tokens=119)]
    (decode,) = compare(model, store, samples=samples, phase="decode")
    assert (decode.change_percent, decode.kl_divergence) == (0.0, 0.0)
    (prefill,) = compare(model, store, samples=samples, phase="prefill")
    assert prefill.kl_divergence > 0


def test_a_report_is_complete_and_starts_with_the_worst(folder: Path, store: ThresholdStore) -> None:
    subject = Subject(folder / "tiny", {"": store}, device="cpu")
    variants = expand_variants(
        {"": store},
        targets=["32", "k:8", "16"],
        compensations=["none", "sdc+vmc"],
        top_k=[8, 16, 32],
    )
    report = evaluate_perplexity(subject, text_domains(folder, subject), variants, progress=False)
    assert {domain.domain for domain in report.domains} == {"prose", "code"}
    worst = [domain.comparisons[0].change_percent for domain in report.domains]
    assert worst == sorted(worst, reverse=True)
    for domain in report.domains:
        assert (domain.num_sequences, domain.num_predicted_tokens, domain.max_length) == (3, 297, 100)
        assert {comparison.variant for comparison in domain.comparisons} == set(variants)
        assert len(variants) == 12
        changes = [comparison.change_percent for comparison in domain.comparisons]
        assert changes == sorted(changes, reverse=True)
        for comparison in domain.comparisons:
            assert len(comparison.nll_changes) == 3
            assert comparison.nll_changes[comparison.worst_sequence] == max(comparison.nll_changes)
            assert comparison.worst_change_percent >= comparison.change_percent
            assert comparison.kl_divergence > 0
    assert report.setup.stores[0].model_id == "org/tiny-model"
    assert report.setup.stores[0].dense_layers == (0,)
    assert (report.setup.model, report.setup.device, report.phase) == ("tiny", "cpu", "both")
    assert PerplexityReport.model_validate_json(report.model_dump_json()) == report
    fields = json.loads(report.model_dump_json())
    assert fields["schema_version"] == 2
    # a report of before there were shadow keys
    for comparison in (comparison for domain in fields["domains"] for comparison in domain["comparisons"]):
        for name in ("keys_share", "mean_true_lost_mass", "mean_lost_mass_error"):
            del comparison[name]
        del comparison["variant"]["dense_layers"]
    assert "sdc+vmc" in rendered(PerplexityReport.model_validate_json(json.dumps(fields)))

    printed = rendered(report)
    assert printed.index(f"on {report.domains[0].domain}:") < printed.index(f"on {report.domains[1].domain}:")
    assert "3 sequences of at most 100 tokens, 297 predicted" in printed
    assert "NOT HELD OUT" not in printed
    first = [cell.strip() for cell in next(line for line in printed.splitlines() if "k:" in line).split("│")[1:-1]]
    assert first[1:3] == [report.domains[0].comparisons[0].variant.target, "none"]


def test_several_stores_are_compared_in_one_run(folder: Path, store: ThresholdStore) -> None:
    stores = {"calibrated": store, "everything": keep_everything(store)}
    subject = Subject(folder / "tiny", stores, device="cpu")
    variants = expand_variants(stores, targets=["8"])
    report = evaluate_perplexity(subject, text_domains(folder, subject)[:1], variants, progress=False)
    changes = {comparison.variant.thresholds: comparison.kl_divergence for comparison in report.domains[0].comparisons}
    assert changes["everything"] == 0 < changes["calibrated"]
    assert "everything" in rendered(report)


def test_a_text_seen_at_calibration_is_pointed_out(folder: Path, store: ThresholdStore) -> None:
    subject = Subject(folder / "tiny", {"": store}, device="cpu")
    domain = text_domains(folder, subject)[0]
    seen = replace(domain, sources=store.manifest.calibration.text)
    report = evaluate_perplexity(subject, [seen], [K8], progress=False)
    assert report.domains[0].not_held_out == ("stories.txt",)
    assert "NOT HELD OUT" in rendered(report)


def test_bfloat16_follows_float32(folder: Path, store: ThresholdStore) -> None:
    perplexities = []
    for dtype in ("float32", "bfloat16"):
        subject = Subject(folder / "tiny", {"": store}, device="cpu", dtype=dtype)
        report = evaluate_perplexity(subject, text_domains(folder, subject)[:1], [K8], progress=False)
        assert report.setup.dtype == dtype
        perplexities.append(report.domains[0].comparisons[0].perplexity_dense)
    assert perplexities[1] == pytest.approx(perplexities[0], rel=0.05)
    assert perplexities[1] != perplexities[0]


def test_what_cannot_work_is_refused(model: Any, folder: Path, store: ThresholdStore, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no sample is longer than 32 tokens, so k:32 keeps every key"):
        compare(model, store, Variant(target="k:32"), samples=[Sample(random_tokens(32))])
    with pytest.raises(EvaluationError, match="no prompt is longer than 8 tokens, so k:8 keeps every key"):
        compare(model, store, samples=[Sample(random_tokens(32), 8)], phase="prefill")
    with pytest.raises(EvaluationError, match="sample 0: no token comes after its prompt"):
        compare(model, store, samples=[Sample(random_tokens(32), 32)])
    with pytest.raises(EvaluationError, match="nothing to compare"):
        compare_on_samples(model, [Sample(random_tokens(32))], {"": store}, [])
    with pytest.raises(EvaluationError, match="--text: no text to compare on"):
        evaluate_perplexity(Subject(folder / "tiny", {"": store}), [], [K8], progress=False)
    with pytest.raises(TargetOutOfRange):
        compare(model, store, Variant(target="k:4"))
    bare = tiny_store(tmp_path / "bare", model, measured=False, shadow=False)
    with pytest.raises(ShadowMissing, match="--mode shadow"):
        compare(model, bare, Variant(method="shadow", target="floor:3"))
    with pytest.raises(ExpectationsMissing, match="offline_sum"):
        compare(model, bare, Variant(target="k:8", compensation="offline"))
    other = save_model_dir(tmp_path / "other", tiny_model(tiny_config(num_hidden_layers=2)))
    with pytest.raises(FingerprintMismatch):
        Subject(other, {"": store})
    with pytest.raises(EvaluationError, match="dtype: unknown dtype 'int8'"):
        Subject(folder / "tiny", {"": store}, dtype="int8")
    with pytest.raises(CalibrationError, match="device: no device 'nowhere'"):
        Subject(folder / "tiny", {"": store}, device="nowhere")


@pytest.mark.parametrize("family", ["gemma3n", "gemma4", *HYBRIDS])
def test_layers_that_share_keys_or_keep_states(family: str) -> None:
    samples, variants = [Sample(random_tokens(200))], [Variant(target="floor:1e-6"), Variant(target="floor:5")]
    everything, some = compare_on_samples(tiny_model(family_config(family)), samples, {}, variants)
    assert everything.change_percent == pytest.approx(0, abs=1e-3)
    assert some.change_percent != pytest.approx(0, abs=1e-3)
