import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import CohereConfig, Gemma2Config

from tests.calibration.tiny_model import random_tokens, save_model_dir, tiny_config, tiny_model, write_text
from vllm_toptheta import store
from vllm_toptheta.calibration import calibrate
from vllm_toptheta.calibration.model import hidden_states, load_model
from vllm_toptheta.errors import CalibrationError, FingerprintMismatch, TargetOutOfRange
from vllm_toptheta.evaluation import QualityReport, evaluate, quality_table
from vllm_toptheta.evaluation.losses import compare_predictions, next_token_logits
from vllm_toptheta.evaluation.quality import compare_perplexities, evaluate_sequences
from vllm_toptheta.evaluation.route import ReadCounts
from vllm_toptheta.reference import Compensation, dense_attention, top_k_attention


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    save_model_dir(folder / "tiny")
    write_text(folder / "calibration.txt", 500, seed=0)
    write_text(folder / "held-out.txt", 500, seed=1)
    return folder


@pytest.fixture(scope="module")
def thresholds(folder: Path) -> store.ThresholdStore:
    written = calibrate(
        folder / "tiny",
        [folder / "calibration.txt"],
        out=folder,
        target_ks=(8, 32),
        max_length=150,
        num_sequences=2,
        progress=False,
        model_id="org/tiny-model",
    )
    return store.load(written)


def without_thresholds(thresholds: store.ThresholdStore) -> store.ThresholdStore:
    coefficients = np.zeros_like(thresholds.coefficients)
    coefficients[..., 0] = -np.inf
    return replace(thresholds, coefficients=coefficients)


def rendered(report: QualityReport) -> str:
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(quality_table(report))
    return console.export_text()


def test_thresholds_of_minus_infinity_change_nothing_at_all(folder: Path, thresholds: store.ThresholdStore) -> None:
    model = load_model(folder / "tiny")
    sequences = [random_tokens(120, seed) for seed in range(2)]
    (comparison,) = evaluate_sequences(model, sequences, without_thresholds(thresholds), target_ks=(8,))
    assert comparison.change_percent == 0.0
    assert comparison.change_standard_error == 0.0
    assert comparison.kl_divergence == 0.0
    assert comparison.top1_agreement == 1.0
    assert comparison.mean_lost_mass == 0.0
    assert comparison.value_rows_share == 1.0
    assert comparison.mean_survivors == pytest.approx(np.arange(9, 121).mean())


def test_dense_perplexity_is_the_models_own(folder: Path, thresholds: store.ThresholdStore) -> None:
    model, tokens = load_model(folder / "tiny"), random_tokens(120)
    (comparison,) = evaluate_sequences(model, [tokens], thresholds, target_ks=(8,))
    with torch.inference_mode():
        expected = model(input_ids=tokens[None], labels=tokens[None]).loss
    assert comparison.perplexity_dense == pytest.approx(math.exp(expected), rel=1e-3)
    assert comparison.change_standard_error is None
    assert comparison.perplexity_sparse != comparison.perplexity_dense


def test_a_report_is_complete_and_starts_with_the_worst(folder: Path, thresholds: store.ThresholdStore) -> None:
    report = evaluate(
        folder / "tiny",
        [folder / "held-out.txt"],
        thresholds,
        target_ks=(32, 8, 16),
        length=100,
        num_sequences=3,
        progress=False,
    )
    changes = [comparison.change_percent for comparison in report.comparisons]
    assert changes == sorted(changes, reverse=True)
    assert {comparison.target_k for comparison in report.comparisons} == {8, 16, 32}
    assert (report.model, report.thresholds, report.dense_layers) == ("tiny", "org/tiny-model", (0, 1))
    assert report.not_held_out == ()
    for comparison in report.comparisons:
        assert len(comparison.nll_changes) == 3
        assert comparison.kl_divergence > 0
        assert 0 < comparison.mean_lost_mass < 1
        assert 0 < comparison.mean_survivors <= comparison.p95_survivors * 2
        assert 0 < comparison.value_rows_share < 1
    shares = {comparison.target_k: comparison.value_rows_share for comparison in report.comparisons}
    assert shares[8] < shares[16] < shares[32]

    fields = json.loads(report.model_dump_json())
    assert fields["schema_version"] == 1
    assert QualityReport.model_validate_json(report.model_dump_json()) == report
    assert set(fields["comparisons"][0]) == set(QualityReport.model_json_schema()["$defs"]["Comparison"]["required"])

    printed = rendered(report)
    assert printed.index(f"│ {report.comparisons[0].target_k:2} ") < printed.index(
        f"│ {report.comparisons[-1].target_k:2} "
    )
    assert "3 sequences of 100 tokens" in printed
    assert "NOT HELD OUT" not in printed


def test_a_text_seen_at_calibration_is_pointed_out(folder: Path, thresholds: store.ThresholdStore) -> None:
    report = evaluate(
        folder / "tiny",
        [folder / "calibration.txt"],
        thresholds,
        target_ks=[8],
        length=50,
        num_sequences=1,
        progress=False,
    )
    assert report.not_held_out == ("calibration.txt",)
    assert "NOT HELD OUT" in rendered(report)


def test_compensation_makes_a_difference(folder: Path, thresholds: store.ThresholdStore) -> None:
    model, sequences = load_model(folder / "tiny"), [random_tokens(120)]
    full, bare = (
        evaluate_sequences(model, sequences, thresholds, target_ks=(8,), compensation=compensation)[0]
        for compensation in (Compensation(), Compensation(denominator="none", value_mean=False))
    )
    assert full.kl_divergence < bare.kl_divergence


def test_options_that_cannot_work_are_refused(folder: Path, thresholds: store.ThresholdStore, tmp_path: Path) -> None:
    texts = [folder / "held-out.txt"]
    with pytest.raises(CalibrationError, match="target_ks"):
        evaluate(folder / "tiny", texts, thresholds, target_ks=(32,), length=32, progress=False)
    with pytest.raises(TargetOutOfRange):
        evaluate(folder / "tiny", texts, thresholds, target_ks=(4,), length=50, num_sequences=1, progress=False)
    other = save_model_dir(tmp_path / "other", tiny_model(tiny_config(num_hidden_layers=2)))
    with pytest.raises(FingerprintMismatch):
        evaluate(other, texts, thresholds, target_ks=(8,), length=50, progress=False)


def test_the_standard_error_is_paired() -> None:
    dense, sparse = [3.0, 1.0, 2.0], [3.02, 1.01, 2.03]  # the texts differ far more than the changes do
    change, error = compare_perplexities(dense, sparse)
    assert change == pytest.approx(100 * (math.exp(0.02) - 1))
    assert error == pytest.approx(100 * math.exp(0.02) * 0.01 / math.sqrt(3))
    assert compare_perplexities([1.0], [1.0]) == (0.0, None)


def test_losses_are_those_of_whole_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_toptheta.evaluation.losses._LOGIT_BLOCK_BYTES", 4 * 256 * 7)
    model, tokens = tiny_model(), random_tokens(50)
    dense = hidden_states(model, tokens)
    sparse = dense + 0.1 * torch.randn(dense.shape, generator=torch.Generator().manual_seed(0))
    (losses,) = compare_predictions(model, tokens, dense, [sparse])
    before, after = (next_token_logits(model, states[:-1]).log_softmax(-1) for states in (dense, sparse))
    targets = tokens[1:]
    assert losses.dense == pytest.approx(float(torch.nn.functional.nll_loss(before, targets)), rel=1e-5)
    assert losses.sparse == pytest.approx(float(torch.nn.functional.nll_loss(after, targets)), rel=1e-5)
    divergence = (before.exp() * (before - after)).sum(-1).mean()
    assert losses.kl_divergence == pytest.approx(float(divergence), rel=1e-4)
    assert losses.top1_agreement == pytest.approx(float((before.argmax(-1) == after.argmax(-1)).double().mean()))


def test_a_head_that_is_not_understood_is_refused() -> None:
    shape = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = random_tokens(20)
    capped = tiny_model(Gemma2Config(**shape, **heads, head_dim=16, final_logit_softcapping=2.0, initializer_range=0.3))
    assert len(compare_predictions(capped, tokens, hidden_states(capped, tokens), [])) == 0
    scaled = tiny_model(CohereConfig(**shape, **heads, logit_scale=0.5, initializer_range=0.3))
    with pytest.raises(CalibrationError, match="changes its logits"):
        compare_predictions(scaled, tokens, hidden_states(scaled, tokens), [])


def test_reads_are_counted_in_thresholded_rows_only() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(20, 4, 8), torch.randn(20, 2, 8), torch.randn(20, 2, 8)
    whole, parts = ReadCounts(20), ReadCounts(20)
    result = top_k_attention(query, key, value, target_k=5, softmax_scale=1.0)
    whole.add(result, start=0, target_k=5)
    for start, stop in ((0, 3), (3, 11), (11, 20)):
        part = top_k_attention(query[start:stop], key[:stop], value[:stop], target_k=5, softmax_scale=1.0)
        parts.add(part, start=start, target_k=5)
    for counts in (whole, parts):
        assert counts.mean_survivors == counts.p95_survivors == 5
        assert counts.value_rows_share == int(result.value_rows_read[5:].sum()) / (2 * sum(range(6, 21)))
        assert counts.mean_lost_mass == pytest.approx(float(result.lost_mass[5:].mean()))

    empty = ReadCounts(20)
    empty.add(dense_attention(query, key, value, softmax_scale=1.0), start=0, target_k=20)
    assert (empty.value_rows_share, empty.mean_lost_mass, empty.mean_survivors, empty.p95_survivors) == (0, 0, 0, 0)
