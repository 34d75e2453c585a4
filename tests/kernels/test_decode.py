"""The decode kernel against the fp32 reference, on permuted pages with NaN in every byte that was not written."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from tests.kernels.decode_case import (
    DEVICE,
    INNER_EDGES,
    INTERPRETED,
    RUNS_HERE,
    WHY_NOT,
    Shape,
    check,
    make_case,
    reference,
)
from vllm_toptheta.kernels.decode import DecodeCounters, DecodeWorkspace
from vllm_toptheta.kernels.merge import _bucket
from vllm_toptheta.kernels.tuning import LaunchConfig

pytestmark = [
    pytest.mark.skipif(not RUNS_HERE, reason=WHY_NOT),
    # of a key that survives, which is selected away
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),
]

LENS = (1, 0, 64, 130, 333)

SHAPES = {
    "plain": Shape(LENS),
    "mha": Shape(LENS, num_heads=2),
    "gqa 3, head size 80, block 32": Shape(LENS, num_heads=6, head_size=80, block_size=32),
    "gqa 16, head size 96, HND": Shape(LENS[1:], num_heads=16, num_kv_heads=1, head_size=96, layout="HND"),
    "head size 128, block 128": Shape(LENS, head_size=128, block_size=128),
    "head size 256": Shape(LENS[:4], num_kv_heads=1, num_heads=2, head_size=256),
    "block size that is no power of two": Shape(LENS, block_size=48),
    "soft cap": Shape(LENS, soft_cap=5.0),
    "threshold curve": Shape(LENS, degree=2),
    "short sequences kept": Shape(LENS, min_sparse_context=130),
    "everything kept": Shape(LENS, min_sparse_context=1000),
    "survivors only in Z": Shape(LENS, exact=False),
    "no value mean": Shape(LENS, value_mean=False),
    "neither": Shape(LENS, exact=False, value_mean=False),
    "float8_e4m3fn": Shape(LENS, kv_dtype=torch.float8_e4m3fn),
    "float8_e4m3fn queries too": Shape(LENS, kv_dtype=torch.float8_e4m3fn, query_dtype=torch.float8_e4m3fn),
    "float8_e5m2": Shape(LENS, kv_dtype=torch.float8_e5m2, min_sparse_context=100),
}
# few programs, so that sequences are split in the middle and programs cross from one to the next
FEW = LaunchConfig(programs_per_sm=1, min_work=1)


@pytest.mark.parametrize("name", SHAPES)
def test_decode(name: str) -> None:
    case = make_case(SHAPES[name])
    check(case, *case.run(FEW if INTERPRETED else None))


@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter multiplies the bits of bfloat16 as integers")
@pytest.mark.parametrize("name", SHAPES)
def test_decode_bfloat16(name: str) -> None:
    case = make_case(replace(SHAPES[name], dtype=torch.bfloat16))
    check(case, *case.run())


def test_lists_longer_than_their_room_are_gathered_early() -> None:
    # every key of 33 tiles survives, three times as many as a lane has room for at once
    shape = Shape((64 * 33 + 5,), num_heads=2, num_kv_heads=1, min_sparse_context=0)
    case = make_case(shape)
    case.coefficients.fill_(-50.0)
    output, counters = case.run(LaunchConfig(programs_per_sm=1, min_work=1000))
    assert counters.rows_read.tolist() == [shape.lens[0]]
    assert float(counters.lost_mass.abs().max()) == 0.0
    torch.testing.assert_close(output[0].float(), reference(case, 0).output[0], rtol=0, atol=2e-3)


@pytest.mark.parametrize("exact", [True, False])
def test_minus_infinity_is_dense_attention(exact: bool) -> None:
    case = make_case(Shape(LENS, exact=exact))
    case.coefficients.fill_(-torch.inf)
    output, counters = case.run()
    dense, _ = case.run(min_sparse_context=10**6)
    torch.testing.assert_close(output, dense, rtol=0, atol=2e-3)
    assert counters.rows_read.tolist() == [sum(LENS)] * 2
    assert not counters.lost_mass.any()


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("threshold", [40.0, 1000.0, torch.inf])
def test_without_survivors_the_output_is_the_mean_value(threshold: float, exact: bool) -> None:
    case = make_case(Shape((5, 48, 90), exact=exact))
    case.coefficients.fill_(threshold)
    output, counters = case.run()
    for row in range(3):
        mean = case.sequence(row)[1].mean(0).repeat_interleave(2, dim=0)
        torch.testing.assert_close(output[row].float(), mean, rtol=0, atol=2e-3)
    assert counters.lost_mass.tolist() == pytest.approx([3.0] * 4)
    assert counters.rows_read.tolist() == [5 + 0 + 10] * 2  # only the open page, for the mean


def test_without_survivors_and_value_mean_the_output_is_zero() -> None:
    case = make_case(Shape((5, 48, 90), value_mean=False))
    case.coefficients.fill_(torch.inf)
    output, counters = case.run()
    assert not output.any()
    assert counters.rows_read.tolist() == [0, 0]


def test_a_tie_survives() -> None:
    # one channel carries the score: 0, 1 or 2, exact in any dtype
    case = make_case(Shape((200,), head_size=64, value_mean=False))
    key = case.kv_cache[..., :64]
    key.nan_to_num_(0.0).zero_()
    position = torch.arange(200, device=DEVICE)
    blocks = case.block_table[0, position // 16].long()
    key[blocks, :, position % 16, 0] = (position % 3).to(key.dtype)[:, None]
    case.query.zero_()
    case.query[..., 0] = 8.0  # the scale is 1/8
    for threshold, survivors in ((2.0, 66), (1.0, 133), (0.0, 200)):
        case.coefficients.fill_(threshold)
        _, counters = case.run()
        assert counters.rows_read.tolist() == [survivors, survivors]


@pytest.mark.parametrize(("programs", "min_work"), [(1, 1), (2, 4), (7, 1)])
def test_the_output_hardly_depends_on_how_work_is_shared_out(programs: int, min_work: int) -> None:
    case = make_case(Shape((400, 3, 0, 65, 128, 1), min_sparse_context=65))
    expected, one = case.run(LaunchConfig(programs_per_sm=1, min_work=10_000))
    output, other = case.run(LaunchConfig(programs_per_sm=programs, min_work=min_work))
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-3)
    assert one.rows_read.tolist() == other.rows_read.tolist()


def test_a_repeated_call_gives_the_same_bits_and_counts_twice() -> None:
    case = make_case(Shape(LENS))
    workspace = DecodeWorkspace.allocate(16, 4, 2, 64, kv_dtype=torch.float16, device=DEVICE)
    counters = DecodeCounters.allocate(4, 2, DEVICE)
    first, _ = case.run(workspace=workspace, counters=counters)
    once = counters.rows_read.clone()
    again, _ = case.run(workspace=workspace, counters=counters)
    assert torch.equal(first, again)
    assert counters.rows_read.tolist() == (2 * once).tolist()
    assert counters.totals.tolist() == [8, 0, 2 * sum(LENS), 2]
    assert counters.lost_mass_histogram.sum(dim=1).tolist() == [8] * 4
    counters.zero_()
    assert not any(buffer.any() for buffer in vars(counters).values())


@triton.jit
def _store_bucket(lost_mass_ptr, bucket_ptr, NUM_BUCKETS: tl.constexpr):
    tl.store(bucket_ptr, _bucket(tl.load(lost_mass_ptr), NUM_BUCKETS))


@pytest.mark.parametrize(
    ("lost_mass", "bucket"),
    [
        *((0.0, 0), (2.0**-30, 0), (2.0**-9, 0), (2.0**-9 * 1.0001, 1), (2.0**-8, 1), (0.0123, 3)),
        *((0.5, 8), (0.50001, 9), (1.0, 9), (1.0001, 9)),
    ],
)
def test_buckets_include_their_upper_edge(lost_mass: float, bucket: int) -> None:
    found = torch.empty(1, dtype=torch.int32, device=DEVICE)
    _store_bucket[(1,)](torch.tensor([lost_mass], device=DEVICE), found, NUM_BUCKETS=10)
    assert found.item() == bucket
    edges = torch.tensor(INNER_EDGES)
    assert torch.bucketize(torch.tensor(lost_mass), edges).item() == bucket


def test_counting_is_optional() -> None:
    case = make_case(Shape(LENS))
    expected, _ = case.run()
    output, untouched = case.run(counters=None)
    assert torch.equal(output, expected)
    assert not untouched.totals.any()


def test_no_sequences_is_no_work() -> None:
    case = make_case(Shape((16,)))
    case = replace(case, query=case.query[:0], block_table=case.block_table[:0], seq_lens=case.seq_lens[:0])
    output, _ = case.run()
    assert output.shape[0] == 0


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("query", {"query": torch.zeros(1, 4, 64)}),
        ("query", {"query": torch.zeros(1, 4, 72, dtype=torch.float16)}),
        ("query", {"query": torch.zeros(1, 5, 64, dtype=torch.float16)}),
        ("query", {"query": torch.zeros(1, 34, 64, dtype=torch.float16)}),
        ("kv_cache", {"kv_cache": torch.zeros(2, 2, 16, 128)}),
        ("kv_cache", {"kv_cache": torch.zeros(2, 2, 16, 130, dtype=torch.float16)}),
        ("kv_cache", {"kv_cache": torch.zeros(2, 2, 16, 136, dtype=torch.float16, device=DEVICE)[..., :128]}),
        ("block_table", {"block_table": torch.zeros(1, 1, dtype=torch.int64)}),
        ("seq_lens", {"seq_lens": torch.zeros(2, dtype=torch.int32)}),
        ("coefficients", {"coefficients": torch.zeros(3, 1)}),
        ("value_sum", {"value_sum": torch.zeros(2, 2, 64, dtype=torch.float16)}),
    ],
)
def test_wrong_arguments_are_named(field: str, change: dict[str, torch.Tensor]) -> None:
    case = replace(make_case(Shape((16,))), **{name: tensor.to(DEVICE) for name, tensor in change.items()})
    with pytest.raises(ValueError, match=f"^{field}: "):
        case.run(workspace=DecodeWorkspace.allocate(1, 4, 2, 64, kv_dtype=torch.float16, device=DEVICE))


def test_a_workspace_for_fewer_sequences_is_refused() -> None:
    case = make_case(Shape((16, 16, 16)))
    workspace = DecodeWorkspace.allocate(1, 4, 2, 64, kv_dtype=torch.float16, device=DEVICE)
    with pytest.raises(ValueError, match="^workspace: "):
        case.run(workspace=workspace)
