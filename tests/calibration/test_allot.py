"""Keys of each head from what a grid of thresholds keeps and loses."""

import numpy as np
import pytest
from numpy.typing import NDArray

from vllm_toptheta.calibration.allot import Grid, between, grid_ks
from vllm_toptheta.store import TargetSpec

KS = 2.0 ** np.arange(1, 8)


def grid(decay: NDArray[np.float64], *, sparse_layers: tuple[int, ...] = (0, 1)) -> Grid:
    """Heads that lose k ** -decay with k keys; `decay` is `[num_layers, num_heads]`, buckets are alike."""
    lost = KS ** -decay[..., None]
    shape = (*lost.shape, 3)
    available = np.ones((len(KS), 3), np.bool_)
    available[5:, 0] = False  # the first bucket is too short for 64 keys
    return Grid(
        available=available,
        lost_mass=np.broadcast_to(lost[..., None], shape) * available,
        survivors=np.broadcast_to(KS[:, None], shape) * available,
        sparse_layers=sparse_layers,
    )


LOG_LENGTH = np.log([40.0, 500.0, 4000.0])
DECAY = np.array([[0.5, 1.0, 2.0], [0.7, 1.5, 3.0]])


def keys_of(positions: NDArray[np.float64]) -> NDArray[np.float64]:
    return 2 * 2**positions


def test_the_grid_doubles_up_to_half_the_length() -> None:
    assert grid_ks(2048) == [2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
    assert grid_ks(2047)[-1] == 512
    assert grid_ks(66) == [2, 4, 8, 16, 32]
    assert grid_ks(3) == []


def test_a_share_of_the_mass_takes_as_many_keys_as_it_needs() -> None:
    keys = keys_of(grid(DECAY).allot(TargetSpec(mass=0.9), LOG_LENGTH))
    needed = 0.1 ** (-1 / DECAY)
    step = 2 ** (1 / 16)  # the resolution of the search
    for bucket, most in enumerate([32, 128, 128]):
        expected = np.clip(needed, 2, most)
        assert (keys[..., bucket] >= expected * 0.999).all()
        assert (keys[..., bucket] <= np.minimum(expected * step, most) * 1.001).all()


def test_survivors_are_those_wanted_in_every_head() -> None:
    keys = keys_of(grid(DECAY).allot(TargetSpec(survivors=40), LOG_LENGTH))
    np.testing.assert_allclose(keys[..., 0], 32)
    assert (keys[..., 1:] >= 40 * 0.999).all()
    assert (keys[..., 1:] <= 40 * 2 ** (1 / 16)).all()


def test_rows_go_where_they_save_most() -> None:
    spec = TargetSpec(rows=40)
    positions = grid(DECAY).allot(spec, LOG_LENGTH)
    keys = keys_of(positions)
    assert keys[..., 1].mean() == pytest.approx(40, rel=0.05)
    # flat heads, which lose more with the same keys, get more of them
    assert (np.diff(keys[..., 1], axis=1) < 0).all()

    def lost(keys: NDArray[np.float64]) -> float:
        return float((keys**-DECAY).sum())

    assert lost(keys[..., 1]) < lost(np.full_like(DECAY, keys[..., 1].mean()))
    # no exchange of a few rows between two heads is any better
    for receiver in np.ndindex(DECAY.shape):
        for giver in np.ndindex(DECAY.shape):
            moved = keys[..., 1].copy()
            if receiver != giver and moved[giver] > 6 and moved[receiver] < 120:
                moved[receiver] += 3
                moved[giver] -= 3
                assert lost(moved) > lost(keys[..., 1]) - 1e-3


def test_dense_layers_take_no_part_in_sharing_rows() -> None:
    keys = keys_of(grid(DECAY, sparse_layers=(1,)).allot(TargetSpec(rows=40), LOG_LENGTH))
    np.testing.assert_allclose(keys[0, :, 1], 40)
    assert keys[1, :, 1].mean() == pytest.approx(40, rel=0.05)


def test_a_growing_number_of_keys_is_the_same_in_every_head() -> None:
    keys = keys_of(grid(DECAY).allot(TargetSpec.parse("k:20@500^0.5"), LOG_LENGTH))
    np.testing.assert_allclose(keys, np.broadcast_to(20 * np.sqrt(np.array([0.08, 1, 8])), keys.shape))


def test_no_bucket_gets_more_keys_than_it_has_rows_for() -> None:
    keys = keys_of(grid(DECAY).allot(TargetSpec.parse("k:100@101^1"), np.log([90.0, 100.0, 100.0])))
    assert keys[0, 0].tolist() == pytest.approx([32, 99.0, 99.0], rel=0.02)


def test_between_is_linear() -> None:
    values = np.array([[0.0, 10.0, 40.0], [5.0, 5.0, 5.0]])
    np.testing.assert_allclose(between(values, np.array([0.0, 0.5, 1.5, 2.0])), [[0, 5, 25, 40], [5] * 4])
    np.testing.assert_allclose(between(np.array([[3.0]]), np.array([0.0])), [[3.0]])
