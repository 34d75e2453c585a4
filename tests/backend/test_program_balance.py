"""Which kv heads get how many programs, by what they read before."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_toptheta.backend import program_balance
from vllm_toptheta.backend.counters import LayerCounters
from vllm_toptheta.backend.program_balance import ProgramBalance
from vllm_toptheta.kernels.gpu.balance import MOST_OF_A_HEAD, balance, largest_share

STEPS, ROWS = 8, 1000  # of a window


@pytest.fixture(autouse=True)
def _short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program_balance, "WINDOW_STEPS", STEPS)
    monkeypatch.setattr(program_balance, "MIN_ROWS", STEPS * ROWS)


class Layer:
    """A layer whose kv heads read what they are told to."""

    def __init__(self, num_kv_heads: int = 2, num_programs: int = 33) -> None:
        self.counters = LayerCounters(0, list(range(num_kv_heads)), 1)
        self.head_programs = torch.full((num_kv_heads,), num_programs, dtype=torch.int32)
        self.balance = ProgramBalance([(self.counters, self.head_programs)])

    def decode(self, *rows_read: int, rows_cached: int = ROWS, steps: int = 2 * STEPS) -> list[int]:
        """The programs after some steps."""
        for _ in range(steps):
            self.balance.step()
            self.counters.buffers.value_rows_read.add_(torch.tensor(rows_read))
            self.counters.buffers.totals[2].add_(rows_cached)
        self.balance.step()
        return self.head_programs.tolist()


@settings(suppress_health_check=[HealthCheck.too_slow])  # long lists, beside other tests
@given(
    # more than all: counters that were zeroed between two looks
    st.lists(st.integers(0, 100_000), min_size=1, max_size=128),
    st.integers(1, 300),
)
def test_every_program_is_somebody_s(rows_read: list[int], num_programs: int) -> None:
    programs = balance(rows_read, 1000, num_programs)
    assert sum(programs) == num_programs * len(rows_read)
    assert min(programs) >= 1
    assert max(programs) <= MOST_OF_A_HEAD * num_programs


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=5), st.integers(1, 8))
def test_no_other_way_has_a_smaller_largest_share(rows_read: list[int], num_programs: int) -> None:
    programs = balance(rows_read, 1000, num_programs)
    best = largest_share(rows_read, 1000, programs)
    for giver in range(len(programs)):
        for taker in range(len(programs)):
            if giver != taker and programs[giver] > 1:
                other = list(programs)
                other[giver] -= 1
                other[taker] += 1
                assert largest_share(rows_read, 1000, other) >= best * (1 - 1e-12)


def test_a_head_that_reads_more_gets_more() -> None:
    layer = Layer()
    assert layer.decode(0, 0) == [33, 33]
    many, few = layer.decode(ROWS, 0)
    assert many > 33 > few
    assert many + few == 66
    assert layer.decode(0, ROWS) == [few, many]


def test_little_is_left_alone() -> None:
    """Sums would be added in another order, for nothing."""
    assert Layer(num_programs=330).decode(8, 0) == [330, 330]
    assert balance([8, 0], ROWS, 330) == [333, 327]


def test_small_windows_wait_for_more() -> None:
    layer = Layer()
    assert layer.decode(ROWS // 4, 0, rows_cached=ROWS // 4) == [33, 33]
    assert layer.decode(ROWS // 4, 0, rows_cached=ROWS // 4, steps=6 * STEPS)[0] > 33


def test_counters_that_were_zeroed() -> None:
    layer = Layer()
    layer.decode(ROWS, 0)
    layer.counters.zero_()
    few, many = layer.decode(0, ROWS, steps=4 * STEPS)
    assert few < 33 < many
