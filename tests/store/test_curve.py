"""theta(n; k)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.store_factory import make_draft, make_tensors
from vllm_toptheta.errors import TargetOutOfRange
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
        assert (curve.target_k, curve.min_length, curve.max_length) == (k, k + 1, 1024)
        np.testing.assert_array_equal(curve.coefficients, store.coefficients[:, :, index])


def test_k_between_is_linear_in_log_k(make_store: MakeStore) -> None:
    store = make_store(target_ks=(8, 32))
    between = store.curve(16)  # half-way in log k
    np.testing.assert_allclose(
        between.threshold(100), (store.curve(8).threshold(100) + store.curve(32).threshold(100)) / 2, rtol=1e-4
    )
    assert (between.target_k, between.min_length, between.max_length) == (16, 33, 1024)
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
