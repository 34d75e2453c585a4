"""How the work of a decode step is shared out among the programs of a kv head."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from tests.kernels.decode_case import DEVICE, RUNS_HERE, WHY_NOT
from vllm_toptheta.kernels.contract import DecodeStep, LayerCache
from vllm_toptheta.kernels.gpu.records import Schedule, Tokens
from vllm_toptheta.kernels.gpu.schedule import schedule_of, share_of_program, units_of_share, work_of

pytestmark = pytest.mark.skipif(not RUNS_HERE, reason=WHY_NOT)

UNIT = 16


@triton.jit
def _shares_kernel(tokens, shares_ptr, pieces_ptr, covered_ptr, num_seqs, max_units, schedule: tl.constexpr):
    share, seq, work_before = share_of_program(tokens, num_seqs, 0, 0, schedule)
    while (seq < num_seqs) & (work_before < share.end):
        units = units_of_share(tokens, share, seq, work_before, num_seqs, schedule)
        if units.first < units.end:
            tl.atomic_add(shares_ptr + share.program, units.end - units.first)
            tl.atomic_add(pieces_ptr + share.program, 1)
            for unit in range(units.first, units.end):
                tl.atomic_add(covered_ptr + seq * max_units + unit, 1)
        work_before += work_of(
            units.seq_len, units.is_dense, schedule.DENSE_WORK, share.entry, share.multiple, schedule.UNIT
        )
        seq += 1


def shares(lens: tuple[int, ...], num_programs: int, schedule: Schedule) -> tuple[list[int], list[int]]:
    """Units and pieces of each program; every unit is somebody's, and nobody else's."""
    num_units = [-(-length // UNIT) for length in lens]
    most = max(num_units)
    units, pieces = (torch.zeros(num_programs, dtype=torch.int32, device=DEVICE) for _ in range(2))
    covered = torch.zeros(len(lens), most, dtype=torch.int32, device=DEVICE)
    table = torch.zeros(len(lens), most, dtype=torch.int32, device=DEVICE)
    step = DecodeStep(table, torch.tensor(lens, dtype=torch.int32, device=DEVICE), max_dense_len=0)
    tokens = Tokens.of(step, LayerCache(torch.zeros(1, 1, UNIT, 128, device=DEVICE)))
    _shares_kernel[(1, num_programs)](tokens, units, pieces, covered, len(lens), most, schedule)
    expected = torch.arange(most)[None, :] < torch.tensor(num_units)[:, None]
    assert torch.equal(covered.cpu().bool(), expected)
    assert int(covered.max()) == 1
    return units.tolist(), pieces.tolist()


def even(piece_tokens: int, num_seqs: int) -> Schedule:
    return schedule_of(UNIT, min_tokens=1, dense_work=2, num_seqs=num_seqs, piece_tokens=piece_tokens)


def test_a_program_with_two_pieces_gets_fewer_keys() -> None:
    lens, entry = (2048,) * 5, 8
    units, pieces = shares(lens, 7, even(entry * UNIT, len(lens)))
    assert max(pieces) == 2
    # what a program has beside its first piece counts as much as its keys
    work = [count + entry * (number - 1) for count, number in zip(units, pieces, strict=True)]
    assert max(work) - min(work) <= entry
    assert max(count for count, number in zip(units, pieces, strict=True) if number == 2) < max(units)
    equal, _ = shares(lens, 7, even(0, len(lens)))
    assert max(equal) - min(equal) < 7  # by rounding up


@pytest.mark.parametrize(("num_programs", "whole"), [(6, False), (5, True)])
def test_whole_shares_where_they_waste_less_than_pieces_take(num_programs: int, whole: bool) -> None:
    """Four sequences leave one of five programs idle, or two of six."""
    lens = (1600,) * 4
    units, pieces = shares(lens, num_programs, even(20 * UNIT, len(lens)))
    assert (pieces == [1] * 4 + [0] * (num_programs - 4)) == whole
    assert (max(units) == 100) == whole


@pytest.mark.parametrize("piece_tokens", [0, 48, 1024])
@pytest.mark.parametrize("lens", [(1, 0, 160, 333), (700, 16, 16, 16, 16, 16, 0, 5), (4000,), (33,) * 40])
@pytest.mark.parametrize("num_programs", [1, 3, 17])
def test_every_key_is_in_one_share(lens: tuple[int, ...], num_programs: int, piece_tokens: int) -> None:
    shares(lens, num_programs, even(piece_tokens, len(lens)))
