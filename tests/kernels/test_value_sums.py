"""The kernel that keeps the page tails, against sums over the contiguous values."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.kernels.decode_case import DEVICE, RUNS_HERE, WHY_NOT, Case, Shape, check_closed_pages, make_case
from vllm_toptheta.kernels.contract import Layer, LayerCache, TailStep
from vllm_toptheta.kernels.gpu import value_sums
from vllm_toptheta.kernels.gpu.tails import write_tails

pytestmark = pytest.mark.skipif(not RUNS_HERE, reason=WHY_NOT)

SHAPES = {
    "block 16": Shape((1, 0, 64, 130, 401)),
    "head size 80, block 32, HND": Shape((31, 400), head_size=80, block_size=32, layout="HND"),
    "block 128": Shape((1, 128, 300), head_size=256, block_size=128),
    "block size that is no power of two": Shape((47, 48, 200), block_size=48),
    "float8": Shape((200, 16), kv_dtype=torch.float8_e4m3fn),
}


def step(case: Case, before: list[int], after: list[int]) -> None:
    """The sequences grow from `before` to `after`."""
    case.write_tails(before, after)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("chunk", [1000, 100, 7])
def test_sums_do_not_depend_on_how_the_tokens_came(name: str, chunk: int) -> None:
    case = make_case(SHAPES[name])
    case.value_sum.fill_(torch.nan)
    lens = list(case.shape.lens)
    for end in range(chunk, max(lens) + chunk, chunk):
        step(case, [min(length, end - chunk) for length in lens], [min(length, end) for length in lens])
    check_closed_pages(case)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)])
@pytest.mark.parametrize("seqs_per_step", [2, 128])
def test_a_prefix_that_others_fill_in_the_same_step(
    order: tuple[int, ...], seqs_per_step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(value_sums, "SEQS_PER_STEP", seqs_per_step)
    # vLLM shares pages as soon as they are scheduled: 1 stands on what 0 fills, 2 on that and what 1 fills
    before = torch.tensor([20, 144, 160, 0])
    case = make_case(Shape((150, 170, 400, 64)))
    case.value_sum[case.block_table[0, 1:9].long()] = torch.nan
    for row, pages in ((1, 9), (2, 10)):
        case.value_sum[case.block_table[row, :-1].long().clamp(max=len(case.value_sum) - 1)] = torch.nan
        case.block_table[row, :pages] = case.block_table[row - 1, :pages]
    rows = list(order)
    case = replace(
        case,
        shape=replace(case.shape, lens=tuple(case.shape.lens[row] for row in rows)),
        block_table=case.block_table[rows],
        seq_lens=case.seq_lens[rows],
    )
    step(case, before[rows].tolist(), list(case.shape.lens))
    check_closed_pages(case)


def test_pages_of_other_steps_are_left_alone() -> None:
    case = make_case(Shape((64, 64)))
    case.value_sum.fill_(torch.nan)
    step(case, [0, 0], [64, 0])
    table = case.block_table[:, :4].long()
    assert not case.value_sum[table[0]].isnan().any()
    assert bool(case.value_sum[table[1]].isnan().all())
    before = case.value_sum[table[0]]
    step(case, [50, 0], [64, 0])  # closing again what is closed
    torch.testing.assert_close(case.value_sum[table[0]], before, rtol=1e-6, atol=1e-5)
    assert bool(case.value_sum[0].isnan().all())


@pytest.mark.parametrize("field", ["value_sum", "block_table", "seq_lens", "query_start_loc"])
def test_wrong_arguments_are_named(field: str) -> None:
    case = make_case(Shape((64, 64)))
    arguments = {
        "value_sum": case.value_sum,
        "block_table": case.block_table,
        "seq_lens": case.seq_lens,
        "query_start_loc": torch.zeros(3, dtype=torch.int32, device=DEVICE),
    }
    arguments[field] = arguments[field].double()
    cache = LayerCache(case.kv_cache, arguments.pop("value_sum"))
    with pytest.raises(ValueError, match=f"^{field}: "):
        write_tails(TailStep(**arguments, max_query_len=64), cache, Layer(1.0))
