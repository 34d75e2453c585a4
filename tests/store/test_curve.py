"""theta(n; k)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.store_factory import make_draft, make_tensors
from vllm_toptheta.errors import ExpectationsMissing, SettingsError, TargetOutOfRange
from vllm_toptheta.store import ThresholdCurve, ThresholdStore

MakeStore = Callable[..., ThresholdStore]


def random_curve(target_k: int = 8) -> ThresholdCurve:
    coefficients = make_tensors(make_draft())["coefficients"][:, :, 0]
    return ThresholdCurve(target_k, coefficients, min_length=target_k + 1, max_length=1024)


@given(seq_len=st.integers(1, 1 << 30))
@settings(derandomize=True, max_examples=50)
def test_threshold_is_the_polynomial_at_the_clamped_length(seq_len: int) -> None:
    curve = random_curve()
    x = np.log(np.float64(min(max(seq_len, 9), 1024)))
    c = curve.coefficients.astype(np.float64)
    np.testing.assert_allclose(curve.threshold(seq_len), c[..., 0] + c[..., 1] * x + c[..., 2] * x**2, rtol=1e-5)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,)])
def test_threshold_keeps_the_shape_of_the_lengths(shape: tuple[int, ...]) -> None:
    curve = random_curve()
    lengths = np.full(shape, 100, np.int32)
    thresholds = curve.threshold(lengths)
    assert thresholds.shape == (*shape, 3, 4)
    assert thresholds.dtype == np.float32
    for index in np.ndindex(shape):
        np.testing.assert_array_equal(thresholds[index], curve.threshold(100))


def test_calibrated_k_is_exact(make_store: MakeStore) -> None:
    store = make_store(target_ks=(8, 32, 128))
    for index, k in enumerate((8, 32, 128)):
        curve = store.curve(k)
        assert (curve.dense_length, curve.min_length, curve.max_length) == (k, k + 1, 1024)
        np.testing.assert_array_equal(curve.coefficients, store.calibrated.coefficients[:, :, index])


def test_k_between_is_linear_in_log_k(make_store: MakeStore) -> None:
    store = make_store(target_ks=(8, 32))
    between = store.curve(16)  # half-way in log k
    np.testing.assert_allclose(
        between.threshold(100), (store.curve(8).threshold(100) + store.curve(32).threshold(100)) / 2, rtol=1e-4
    )
    assert (between.dense_length, between.min_length, between.max_length) == (16, 33, 1024)
    assert not between.coefficients.flags.writeable


def test_interpolation_stays_between_its_neighbours(make_store: MakeStore) -> None:
    store = make_store(target_ks=(8, 32), coefficients=np.array([[1.0], [2.0]], np.float32), degree=0)
    thetas = [float(store.curve(k).threshold(100)[0, 0]) for k in range(8, 33)]
    assert thetas == sorted(thetas)
    assert (thetas[0], thetas[-1]) == (1.0, 2.0)


@pytest.mark.parametrize("k", [-1, 0, 7, 33, 1 << 40])
def test_k_outside_is_refused(make_store: MakeStore, k: int) -> None:
    with pytest.raises(TargetOutOfRange, match=r"calibrated are 8, 32\. Choose a k from 8 to 32"):
        make_store().curve(k)


def test_a_label_finds_its_curve(make_store: MakeStore) -> None:
    store = make_store()
    for index, label in enumerate(("k:8", "k:32")):
        curve = store.curve_of(label)
        assert curve.label == label
        np.testing.assert_array_equal(curve.coefficients, store.calibrated.coefficients[:, :, index])
    assert store.curve_of("16").label == store.curve(16).label == "k:16"
    with pytest.raises(SettingsError, match=r"unknown target 'many'"):
        store.curve_of("many")


def test_thresholds_after_the_softmax_are_probabilities(make_store: MakeStore) -> None:
    curve = make_store(placement="post_softmax", coefficients=[-2.0, 0.0, 0.0]).curve(8)
    np.testing.assert_allclose(curve.threshold(100), np.exp(-2.0), rtol=1e-6)
    above = make_store(placement="post_softmax", coefficients=[2.0, 0.0, 0.0]).curve(8)
    np.testing.assert_array_equal(above.threshold(100), 1.0)


def test_expectations_are_those_of_the_bucket(make_store: MakeStore) -> None:
    store = make_store(measured=True)
    curve, edges = store.curve(8), store.calibrated.bucket_edges
    assert store.expectations is not None
    for bucket in range(len(edges) - 1):
        expected = store.expectations.offline_sum[:, :, 0, bucket]
        np.testing.assert_array_equal(curve.expected("offline_sum", edges[bucket]), expected)
        np.testing.assert_array_equal(curve.expected("offline_sum", [[edges[bucket + 1] - 1]])[0, 0], expected)
    last = store.expectations.offline_sum[:, :, 0, -1]
    np.testing.assert_array_equal(curve.expected("offline_sum", 1 << 20), last)


def test_lengths_that_were_not_measured_take_the_nearest_bucket(make_store: MakeStore) -> None:
    store = make_store(measured=True)
    assert store.expectations is not None
    first = int(np.flatnonzero(store.expectations.measured_rows[1])[0])
    assert first > 0
    np.testing.assert_array_equal(
        store.curve(32).expected("offline_sum", 3), store.expectations.offline_sum[:, :, 1, first]
    )


def test_expectations_between_two_ks_lie_between_theirs(make_store: MakeStore) -> None:
    store = make_store(measured=True)
    lower, between, upper = (store.curve(k).expected("exp_threshold_scale", 1000) for k in (8, 16, 32))
    np.testing.assert_allclose(between, (lower + upper) / 2, rtol=1e-5)
    # k 32 has no rows in the first bucket, k 8 has
    np.testing.assert_array_equal(
        store.curve(16).expected("exp_threshold_scale", 9), store.curve(8).expected("exp_threshold_scale", 9)
    )


def test_a_store_that_was_not_measured_expects_nothing(make_store: MakeStore) -> None:
    with pytest.raises(ExpectationsMissing, match="offline_sum"):
        make_store().curve(16).expected("offline_sum", 100)
