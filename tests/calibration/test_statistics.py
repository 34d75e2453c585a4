import numpy as np
import pytest

from vllm_toptheta.calibration.accumulate import KthScoreStatistics
from vllm_toptheta.calibration.fit import fit_curves
from vllm_toptheta.calibration.sampling import length_buckets, sample_lengths


def test_buckets_cover_the_range_and_grow() -> None:
    edges = length_buckets(33, 4096, 14)
    assert edges.dtype == np.int32
    assert (edges[0], edges[-1], len(edges)) == (33, 4097, 15)
    widths = np.diff(edges)
    assert (widths[1:] > widths[:-1]).all()
    ratios = edges[1:] / edges[:-1]
    assert ratios.max() / ratios.min() < 1.05


def test_few_lengths_get_few_buckets() -> None:
    assert length_buckets(5, 7, 14).tolist() == [5, 6, 7, 8]
    assert length_buckets(9, 9, 14).tolist() == [9, 10]


def test_a_part_of_the_rows_is_drawn_evenly_from_all_lengths() -> None:
    edges = length_buckets(9, 1000, 6)
    lengths = sample_lengths(edges, 1000, 120, (3, 1))
    assert len(lengths) == len(set(lengths.tolist())) == 120
    counts = np.histogram(lengths, edges)[0]
    sizes = np.diff(edges)
    # a bucket is exhausted, or has its share
    assert all(count == size or count >= 120 // 6 for count, size in zip(counts, sizes, strict=True))
    assert counts.max() - counts[sizes > counts].min() <= 1
    assert np.array_equal(lengths, sample_lengths(edges, 1000, 120, (3, 1)))
    assert not np.array_equal(lengths, sample_lengths(edges, 1000, 120, (3, 2)))


@pytest.mark.parametrize("num_rows", [992, 5000])
def test_all_rows_are_drawn_if_there_are_not_more(num_rows: int) -> None:
    assert sample_lengths(length_buckets(9, 1000, 6), 1000, num_rows, (0,)).tolist() == list(range(9, 1001))


def test_rows_of_a_short_sequence_are_drawn_from_its_own_lengths() -> None:
    lengths = sample_lengths(length_buckets(9, 1000, 6), 50, 20, (0,))
    assert len(lengths) == 20
    assert lengths.max() <= 50


def test_moments_are_those_of_all_rows_at_once() -> None:
    generator = np.random.default_rng(0)
    target_ks, edges = (4, 10), length_buckets(5, 60, 6)
    # far from zero, where sums of squares in float32 would cancel
    sequences = [(1000 + generator.standard_normal((3, 2, 2, length))).astype(np.float32) for length in (60, 33, 60, 4)]
    statistics = KthScoreStatistics(num_layers=4, num_heads=2, target_ks=target_ks, bucket_edges=edges)
    for scores in sequences:
        for layer_idx in range(3):
            for target in range(2):
                lengths = np.arange(1, scores.shape[-1] + 1)
                statistics.add(layer_idx, target, scores[layer_idx, target], lengths)
    moments = statistics.moments()

    assert moments.observed_layers == (0, 1, 2)
    for target, k in enumerate(target_ks):
        for bucket, (first, end) in enumerate(zip(edges, edges[1:], strict=False)):
            first = max(first, k + 1)
            rows = np.concatenate([scores[:, target, :, first - 1 : end - 1] for scores in sequences], axis=-1)
            assert moments.row_count[target, bucket] == rows.shape[-1]
            place = (slice(None, 3), slice(None), target, bucket)
            if not rows.shape[-1]:
                assert not moments.mean[place].any()
                assert not moments.std[place].any()
                continue
            np.testing.assert_allclose(moments.mean[place], rows.mean(axis=-1, dtype=np.float64), rtol=1e-12)
            np.testing.assert_allclose(moments.std[place], rows.std(axis=-1, dtype=np.float64), rtol=1e-9)
            lengths = np.concatenate([np.arange(first, min(end, scores.shape[-1] + 1)) for scores in sequences])
            np.testing.assert_allclose(moments.log_length[target, bucket], np.log(lengths).mean())
    assert not moments.mean[3].any()


def test_layers_must_see_the_same_rows() -> None:
    statistics = KthScoreStatistics(num_layers=2, num_heads=1, target_ks=(2,), bucket_edges=length_buckets(3, 9, 2))
    with pytest.raises(ValueError, match="same rows"):
        statistics.moments()
    statistics.add(0, 0, np.ones((1, 9), np.float32), np.arange(1, 10))
    statistics.add(1, 0, np.ones((1, 8), np.float32), np.arange(1, 9))
    with pytest.raises(ValueError, match="same rows"):
        statistics.moments()


def test_a_known_polynomial_is_recovered() -> None:
    generator = np.random.default_rng(0)
    expected = generator.standard_normal((3, 2, 2, 3))
    log_length = np.log(np.geomspace([40, 70], [4000, 4000], 12)).T
    scores = np.einsum("lhtp,tbp->lhtb", expected, log_length[..., None] ** np.arange(3))
    row_count = generator.integers(1, 1000, (2, 12))
    row_count[1, 0] = 0
    scores[:, :, 1, 0] = 0.0  # a bucket without rows says nothing
    coefficients = fit_curves(log_length, row_count, scores, degree=2)
    assert coefficients.dtype == np.float32
    np.testing.assert_allclose(coefficients, expected, rtol=1e-4, atol=1e-4)


def test_rows_that_were_not_drawn_are_left_out() -> None:
    edges = length_buckets(5, 60, 3)
    lengths = np.array([2, 6, 9, 30, 60, 61])
    scores = np.arange(6, dtype=np.float32)[None]
    statistics = KthScoreStatistics(num_layers=1, num_heads=1, target_ks=(6,), bucket_edges=edges)
    statistics.add(0, 0, scores, lengths)
    moments = statistics.moments()
    assert moments.row_count.sum() == 3
    assert (moments.mean * moments.row_count).sum() == 2 + 3 + 4


@pytest.mark.parametrize(("filled", "expected"), [(1, [5.0, 0, 0]), (2, [2.0, 0.5, 0])])
def test_few_filled_buckets_give_a_lower_degree(filled: int, expected: list[float]) -> None:
    log_length = np.array([[6.0, 7.0, 8.0]])
    row_count = np.array([[10] * filled + [0] * (3 - filled)])
    scores = (2.0 + 0.5 * log_length if filled > 1 else np.full_like(log_length, 5.0))[None, None]
    np.testing.assert_allclose(fit_curves(log_length, row_count, scores, degree=2)[0, 0, 0], expected, atol=1e-5)


def test_a_target_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="no rows"):
        fit_curves(np.zeros((1, 2)), np.zeros((1, 2), np.int64), np.zeros((1, 1, 1, 2)), degree=2)
