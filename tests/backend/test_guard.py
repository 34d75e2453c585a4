"""The guard's decisions: when thresholds are lowered, when they are raised again, and how long it waits for that."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_toptheta.backend.guard import FIRST_PATIENCE, LONGEST_PATIENCE, RELAXATION, LayerGuard

LIMIT = 0.25
shares = st.lists(st.floats(0.0, 1.0), max_size=300)


def windows(guard: LayerGuard, share: float, count: int) -> list[int]:
    """The level after each of `count` windows with that share."""
    levels = []
    for _ in range(count):
        guard.observe(share)
        levels.append(guard.level)
    return levels


def test_text_like_the_calibration_text_changes_nothing() -> None:
    guard = LayerGuard(LIMIT)
    assert set(windows(guard, 0.05, 50)) == {0}
    assert guard.relaxation == 0.0


def test_a_share_at_the_limit_is_no_reason() -> None:
    assert set(windows(LayerGuard(LIMIT), LIMIT, 50)) == {0}


def test_thresholds_are_lowered_step_by_step_down_to_dense() -> None:
    guard = LayerGuard(LIMIT)
    assert windows(guard, 0.9, 7) == [1, 2, 3, 4, 5, 5, 5]
    assert guard.relaxation == math.inf


def test_they_are_raised_after_a_calm_time() -> None:
    guard = LayerGuard(LIMIT)
    windows(guard, 0.9, 2)
    assert windows(guard, 0.01, 2 * FIRST_PATIENCE) == [2] * (FIRST_PATIENCE - 1) + [1] * FIRST_PATIENCE + [0]


def test_a_window_that_is_not_calm_starts_the_wait_anew() -> None:
    guard = LayerGuard(LIMIT)
    windows(guard, 0.9, 1)
    windows(guard, 0.01, FIRST_PATIENCE - 1)
    windows(guard, 0.8 * LIMIT, 1)
    assert windows(guard, 0.01, FIRST_PATIENCE - 1) == [1] * (FIRST_PATIENCE - 1)


def test_raising_too_early_doubles_the_wait() -> None:
    """Text that needs level 1: calm there, too much lost at level 0."""
    guard = LayerGuard(LIMIT)
    waits, waited = [], 0
    for _ in range(3000):
        share = 0.9 if guard.level == 0 else 0.01
        was = guard.level
        guard.observe(share)
        if was == 1 and guard.level == 0:
            waits.append(waited + 1)
            waited = 0
        elif guard.level == 1:
            waited = 0 if was == 0 else waited + 1
    assert waits[:4] == [4, 8, 16, 32]
    assert max(waits) == LONGEST_PATIENCE


def test_what_was_learnt_is_forgotten_in_the_end() -> None:
    guard = LayerGuard(LIMIT)
    windows(guard, 0.9, 1)
    windows(guard, 0.01, FIRST_PATIENCE)
    windows(guard, 0.9, 1)
    assert guard.patience == 2 * FIRST_PATIENCE
    windows(guard, 0.01, 4 * FIRST_PATIENCE)
    assert (guard.level, guard.patience) == (0, FIRST_PATIENCE)


@given(shares)
def test_a_level_is_left_by_one_step_and_never_beyond_the_ends(observed: list[float]) -> None:
    guard = LayerGuard(LIMIT)
    for share in observed:
        before = guard.level
        changed = guard.observe(share)
        assert abs(guard.level - before) == changed
        assert 0 <= guard.level < len(RELAXATION)
        assert not (share > LIMIT and guard.level < before)
        assert not (share <= LIMIT and guard.level > before)


@pytest.mark.parametrize("level", range(len(RELAXATION) - 1))
def test_every_level_keeps_more_than_the_one_before(level: int) -> None:
    assert RELAXATION[level] < RELAXATION[level + 1]


@pytest.mark.parametrize(("relaxes", "lowered_by"), [(True, 0.5), (False, 0.0)])
def test_only_a_guard_that_relaxes_reports_lowered_thresholds(relaxes: bool, lowered_by: float) -> None:
    from vllm_toptheta.backend.rank_report import _guard_state

    guard = LayerGuard(LIMIT)
    windows(guard, 0.01, 3)
    windows(guard, 0.9, 1)
    state = {"layer": 4, "max_lost_mass": 0.5, "share_above": 0.9, "alarms": 1, "lowered_by": lowered_by}
    assert _guard_state(4, guard, relaxes=relaxes) == state
