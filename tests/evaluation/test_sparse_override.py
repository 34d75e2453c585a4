import pytest
import torch

from vllm_toptheta.evaluation.sparse_override import ReadCounts
from vllm_toptheta.reference import Compensation, dense_attention, top_k_attention, top_theta_attention


def test_reads_are_counted_in_thresholded_rows_only() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(20, 4, 8), torch.randn(20, 2, 8), torch.randn(20, 2, 8)
    whole, parts = ReadCounts(20), ReadCounts(20)
    result = top_k_attention(query, key, value, target_k=5, softmax_scale=1.0)
    whole.add(0, result, start=0)
    for start, stop in ((0, 3), (3, 11), (11, 20)):
        part = top_k_attention(query[start:stop], key[:stop], value[:stop], target_k=5, softmax_scale=1.0)
        parts.add(0, part, start=start)
    num_keys = sum(range(6, 21))
    for counts in (whole, parts):
        assert counts.mean_survivors == counts.p95_survivors == 5
        assert counts.thresholded_share == 15 / 20
        assert counts.value_rows_share == int(result.value_rows_read[5:].sum()) / (2 * num_keys)
        assert counts.attention_elements_share == 5 * 15 / num_keys
        assert counts.mean_lost_mass == pytest.approx(float(result.lost_mass[5:].mean()))
        assert counts.mean_true_lost_mass == counts.mean_lost_mass
        assert (counts.mean_lost_mass_error, counts.keys_share) == (0, 1)


def test_reads_of_candidates_and_errors_of_an_estimate_are_counted() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(20, 4, 8), torch.randn(20, 2, 8), torch.randn(20, 2, 8)
    candidates = torch.rand(20, 2, 20) < 0.5
    counts = ReadCounts(20)
    result = top_theta_attention(
        query,
        key,
        value,
        threshold=0.5,
        target_k=5,
        softmax_scale=1.0,
        compensation=Compensation("exp_threshold", exp_threshold_scale=0.3),
        candidates=candidates.repeat_interleave(2, dim=1),
    )
    counts.add(0, result, start=0)
    visible = torch.ones(20, 20).tril().bool()
    read = int((candidates & visible[:, None])[5:].sum())
    assert counts.keys_share == read / (2 * sum(range(6, 21)))
    assert counts.value_rows_share < counts.keys_share
    assert counts.mean_true_lost_mass == pytest.approx(float(result.true_lost_mass[5:].mean()))
    error = (result.lost_mass - result.true_lost_mass)[5:].abs().mean()
    assert counts.mean_lost_mass_error == pytest.approx(float(error))
    assert counts.mean_lost_mass_error > abs(counts.mean_lost_mass - counts.mean_true_lost_mass) > 0


def test_without_thresholded_rows_nothing_is_read_and_nothing_is_lost() -> None:
    query, key, value = torch.randn(20, 4, 8), torch.randn(20, 2, 8), torch.randn(20, 2, 8)
    counts = ReadCounts(20)
    result = top_k_attention(query, key, value, target_k=5, softmax_scale=1.0, phase="prefill")
    assert torch.equal(result.output, dense_attention(query, key, value, softmax_scale=1.0).output)
    counts.add(0, result, start=0)
    assert (counts.thresholded_share, counts.value_rows_share, counts.attention_elements_share) == (0, 0, 0)
    assert (counts.mean_lost_mass, counts.mean_survivors, counts.p95_survivors) == (0, 0, 0)
