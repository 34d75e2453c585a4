"""Which kv heads get how many programs, by what they read before."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_toptheta.backend import program_balance
from vllm_toptheta.backend.counters import LayerCounters
from vllm_toptheta.backend.program_balance import ProgramBalance
from vllm_toptheta.kernels.gpu.balance import MOST_OF_A_HEAD, balance, largest_share, tiers_work, values_work

STEPS, ROWS = 8, 1000  # of a window


@pytest.fixture(autouse=True)
def _short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program_balance, "WINDOW_STEPS", STEPS)
    monkeypatch.setattr(program_balance, "MIN_ROWS", STEPS * ROWS)


class Layer:
    """A layer whose kv heads read what they are told to."""

    def __init__(self, num_kv_heads: int = 2, num_programs: int = 33, *, has_copies: bool = False) -> None:
        counts = {"counts_keys": has_copies, "counts_copies": has_copies}
        self.counters = LayerCounters(0, list(range(num_kv_heads)), 1, **counts)
        self.head_programs = torch.full((num_kv_heads,), num_programs, dtype=torch.int32)
        self.balance = ProgramBalance([(self.counters, self.head_programs)])

    def decode(self, *rows_read: int, rows_cached: int = ROWS, steps: int = 2 * STEPS) -> list[int]:
        """The programs after some steps."""
        return self._decode({"value_rows_read": rows_read}, rows_cached, steps)

    def decode_by_copies(self, keys_read: tuple[int, ...], copies_read: tuple[int, ...]) -> list[int]:
        """The same, where the first head has the value rows of all."""
        rows_read = (ROWS, *[0] * (len(keys_read) - 1))
        counted = {"value_rows_read": rows_read, "keys_read": keys_read, "copies_read": copies_read}
        return self._decode(counted, ROWS, 4 * STEPS)

    def _decode(self, counted: dict[str, tuple[int, ...]], rows_cached: int, steps: int) -> list[int]:
        for _ in range(steps):
            self.balance.step()
            for name, of_heads in counted.items():
                getattr(self.counters.buffers, name).add_(torch.tensor(of_heads))
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
    for work in (values_work(rows_read, 1000), tiers_work(rows_read, rows_read[::-1], 1000)):
        programs = balance(work, num_programs)
        assert sum(programs) == num_programs * len(rows_read)
        assert min(programs) >= 1
        assert max(programs) <= MOST_OF_A_HEAD * num_programs


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=5), st.integers(1, 8))
def test_no_other_way_has_a_smaller_largest_share(rows_read: list[int], num_programs: int) -> None:
    work = values_work(rows_read, 1000)
    programs = balance(work, num_programs)
    best = largest_share(work, programs)
    for giver in range(len(programs)):
        for taker in range(len(programs)):
            if giver != taker and programs[giver] > 1:
                other = list(programs)
                other[giver] -= 1
                other[taker] += 1
                assert largest_share(work, other) >= best * (1 - 1e-12)


def test_a_head_that_reads_more_gets_more() -> None:
    layer = Layer()
    assert layer.decode(0, 0) == [33, 33]
    many, few = layer.decode(ROWS, 0)
    assert many > 33 > few
    assert many + few == 66
    assert layer.decode(0, ROWS) == [few, many]


def test_copies_and_exact_keys_are_work_where_there_are_copies() -> None:
    """Value rows are not looked at: most of what is read is no row of values."""
    assert Layer(has_copies=True).decode_by_copies((0, 0), (0, 0)) == [33, 33]
    few, many = Layer(has_copies=True).decode_by_copies((0, ROWS // 10), (0, 0))
    assert few < 33 < many
    some, fewer = Layer(has_copies=True).decode_by_copies((0, 0), (ROWS // 10, 0))
    assert many > some > 33 > fewer


def test_little_is_left_alone() -> None:
    """Sums would be added in another order, for nothing."""
    assert Layer(num_programs=330).decode(8, 0) == [330, 330]
    assert balance(values_work([8, 0], ROWS), 330) == [333, 327]


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
