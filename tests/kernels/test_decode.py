"""The decode kernel against the fp32 reference, on permuted pages with NaN in every byte that was not written."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from tests.kernels import decode_case
from tests.kernels.decode_case import (
    DEVICE,
    INNER_EDGES,
    INTERPRETED,
    MARKS,
    Shape,
    check,
    check_closed_pages,
    cuda_loader,
    make_case,
    reference,
    scores_of,
)
from vllm_toptheta.kernels.contract import Counters
from vllm_toptheta.kernels.gpu.merge import _bucket
from vllm_toptheta.kernels.gpu.scratch import Scratch, Sizes
from vllm_toptheta.kernels.gpu.tuning import LaunchConfig, num_multiprocessors
from vllm_toptheta.kernels.gpu.values import decode
from vllm_toptheta.limits import NUM_ANCHORS
from vllm_toptheta.reference import relative_threshold, row_lse

pytestmark = MARKS


@pytest.fixture(params=["Triton", "CUDA"], autouse=True)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which kernel reads keys and values."""
    if request.param == "CUDA":
        monkeypatch.setattr(decode_case, "loader_of", cuda_loader)
    return request.param


LENS = (1, 0, 64, 130, 333)

SHAPES = {
    "plain": Shape(LENS),
    "mha": Shape(LENS, num_heads=2),
    "gqa 3, head size 80, block 32": Shape(LENS, num_heads=6, head_size=80, block_size=32),
    "gqa 8": Shape(LENS, num_heads=8, num_kv_heads=1),
    "gqa 16, head size 96, HND": Shape(LENS[1:], num_heads=16, num_kv_heads=1, head_size=96, layout="HND"),
    "head size 128, block 128": Shape(LENS, head_size=128, block_size=128),
    "head size 256": Shape(LENS[:4], num_kv_heads=1, num_heads=2, head_size=256),
    "block size that is no power of two": Shape(LENS, block_size=48),
    "soft cap": Shape(LENS, soft_cap=5.0),
    "threshold curve": Shape(LENS, degree=2),
    "relative": Shape((*LENS, 400), max_dense_len=NUM_ANCHORS, degree=1, slope=1.0),
    "relative, mha, head size 96, block 32": Shape(
        (333, 145, 250), num_heads=2, max_dense_len=NUM_ANCHORS, degree=1, slope=0.7, head_size=96, block_size=32
    ),
    "relative, soft cap, block 32": Shape(
        (333, 145, 250), max_dense_len=NUM_ANCHORS, slope=1.0, soft_cap=5.0, block_size=32
    ),
    "relative, gqa 16, head size 80, HND": Shape(
        (333, 145), num_heads=16, num_kv_heads=1, head_size=80, max_dense_len=NUM_ANCHORS, slope=0.7, layout="HND"
    ),
    "relative, float8 queries too": Shape(
        (333, 160), max_dense_len=NUM_ANCHORS, slope=1.0, kv_dtype=torch.float8_e4m3fn, query_dtype=torch.float8_e4m3fn
    ),
    "short sequences kept": Shape(LENS, max_dense_len=130),
    "everything kept": Shape(LENS, max_dense_len=1000),
    "survivors only in Z": Shape(LENS, exact=False),
    "no value mean": Shape(LENS, value_mean=False),
    "neither": Shape(LENS, exact=False, value_mean=False),
    "sinks": Shape(LENS, has_sinks=True),
    "sinks, relative, soft cap": Shape(
        (*LENS, 400), max_dense_len=NUM_ANCHORS, degree=1, slope=1.0, soft_cap=5.0, has_sinks=True
    ),
    "sinks, relative, gqa 8": Shape(
        (333, 145, 60), num_heads=8, num_kv_heads=1, max_dense_len=NUM_ANCHORS, slope=1.0, has_sinks=True
    ),
    "sinks, survivors only in Z": Shape(LENS, exact=False, has_sinks=True),
    "sinks, short sequences kept": Shape(LENS, max_dense_len=130, has_sinks=True),
    "sinks, float8": Shape(LENS, kv_dtype=torch.float8_e4m3fn, query_dtype=torch.float8_e4m3fn, has_sinks=True),
    "float8_e4m3fn": Shape(LENS, kv_dtype=torch.float8_e4m3fn),
    "float8_e4m3fn queries too": Shape(LENS, kv_dtype=torch.float8_e4m3fn, query_dtype=torch.float8_e4m3fn),
    "float8_e5m2": Shape(LENS, kv_dtype=torch.float8_e5m2, max_dense_len=100),
}
# few programs, so that sequences are split in the middle and programs cross from one to the next
FEW = LaunchConfig(programs_per_sm=1, min_work=1)


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        (kernel, name)
        for kernel in ("Triton", "CUDA")
        for name in SHAPES
        if kernel == "Triton" or cuda_loader(SHAPES[name])
    ],
    indirect=["kernel"],
)
def test_decode(name: str) -> None:
    case = make_case(SHAPES[name])
    check(case, *case.run(FEW if INTERPRETED else None))


@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter multiplies the bits of bfloat16 as integers")
@pytest.mark.parametrize("name", SHAPES)
def test_decode_bfloat16(name: str) -> None:
    case = make_case(replace(SHAPES[name], dtype=torch.bfloat16))
    check(case, *case.run())


@pytest.mark.parametrize("name", ["plain", "relative"])
def test_scales_of_queries_and_pages_of_16_bits(name: str) -> None:
    case = make_case(SHAPES[name])
    case.scales = torch.tensor([0.7], device=DEVICE), torch.tensor([1.3], device=DEVICE)
    case.q_scale = torch.tensor([1.2], device=DEVICE)
    check(case, *case.run(FEW if INTERPRETED else None))


@pytest.mark.parametrize("programs", [1, 3, 7, 50])
def test_dense_sequences_among_others_in_shares_of_any_size(programs: int) -> None:
    lens = (400, 130, 0, 333, 1, 20, 16)
    case = make_case(Shape(lens, max_dense_len=130))
    check(case, *case.run(LaunchConfig(programs_per_sm=programs, min_work=1)))


def test_more_sequences_than_a_warp_has_lanes() -> None:
    lens = tuple(7 * row % 50 for row in range(70))
    case = make_case(Shape(lens, num_heads=2, num_kv_heads=1, max_dense_len=20))
    for programs in (1, 40):
        check(case, *case.run(LaunchConfig(programs_per_sm=programs, min_work=1)))


@pytest.mark.parametrize("kernel", ["CUDA"], indirect=True)
@pytest.mark.parametrize("programs", [(1, 3), (3, 1), (2, 2)])
@pytest.mark.parametrize("max_dense_len", [0, 130])
def test_kv_heads_of_different_numbers_of_programs(programs: tuple[int, int], max_dense_len: int) -> None:
    case = make_case(Shape((400, 130, 0, 333, 1, 20, 16), max_dense_len=max_dense_len))
    head_programs = torch.tensor(programs, dtype=torch.int32, device=DEVICE)
    check(case, *case.run(LaunchConfig(programs_per_sm=2, min_work=1), head_programs=head_programs))


@pytest.mark.parametrize("kernel", ["CUDA"], indirect=True)
def test_in_a_small_step_all_kv_heads_have_as_many_programs() -> None:
    case = make_case(Shape(LENS))
    options = {"max_dense_len": 0, "min_step_tokens": sum(LENS) + 1}
    config = LaunchConfig(programs_per_sm=2, min_work=1)
    expected, counted = case.run(config, **options)
    programs = torch.tensor([3, 1], dtype=torch.int32, device=DEVICE)
    output, counters = case.run(config, head_programs=programs, **options)
    assert torch.equal(output, expected)
    assert torch.equal(counters.value_rows_read, counted.value_rows_read)


@pytest.mark.parametrize(
    ("lens", "programs"), [((400, 130, 0, 333), 1), ((400, 130, 0, 333), 8), ((333, 170, 400, 150, 0, 200), 13)]
)
def test_any_length_keeps_every_key(lens: tuple[int, ...], programs: int) -> None:
    """A number that means all to kernels, which share out such steps in another way where programs are many."""
    case = make_case(Shape(lens, max_dense_len=2**31 - 1))
    check(case, *case.run(LaunchConfig(programs_per_sm=programs, min_work=1)))


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("programs", [1, 5])
def test_sequences_of_more_units_than_there_are_parts(programs: int, block_size: int) -> None:
    """Units that are dealt out to parts (`Spread` of schedule.cuh): fewer than parts, as many, and some more."""
    parts = 63 * block_size
    lens = (parts - 1, parts, parts + 1, 2 * parts + block_size + 3, 40)
    case = make_case(Shape(lens, num_heads=2, num_kv_heads=1, block_size=block_size, max_dense_len=parts - 1))
    check(case, *case.run(LaunchConfig(programs_per_sm=programs, min_work=1)))


@pytest.mark.parametrize("kernel", ["CUDA"], indirect=True)
def test_more_kv_heads_than_a_warp_has_lanes() -> None:
    case = make_case(Shape((130, 100), num_heads=34, num_kv_heads=34))
    head_programs = torch.tensor([1, 3] * 16 + [3, 1], dtype=torch.int32, device=DEVICE)
    check(case, *case.run(LaunchConfig(programs_per_sm=34, min_work=1), head_programs=head_programs))


@pytest.mark.parametrize("kernel", ["CUDA"], indirect=True)
@pytest.mark.parametrize("is_dense", [False, True])
def test_the_last_page_is_not_the_last_of_a_piece(is_dense: bool) -> None:
    """A warp comes to it when the places of the 32 stages behind are loaded already."""
    length = 103 * 64 - 54  # the last page is number 62 of 103
    case = make_case(Shape((length,), num_heads=2, num_kv_heads=1, block_size=64, max_dense_len=is_dense * length))
    check(case, *case.run(LaunchConfig(programs_per_sm=1, min_work=10_000)))


@pytest.mark.parametrize("group", [1, 3, 5, 7, 12])
@pytest.mark.parametrize("head_size", [64, 128])
def test_groups(head_size: int, group: int) -> None:
    case = make_case(Shape((1, 90, 333), num_heads=group, num_kv_heads=1, head_size=head_size, target_k=60))
    check(case, *case.run(FEW))


@pytest.mark.skipif(not INTERPRETED, reason="a GPU has an order of its own")
@pytest.mark.parametrize("kernel", ["CUDA"], indirect=True)
@pytest.mark.parametrize("name", ["plain", "gqa 8"])
def test_the_order_in_which_warps_run_changes_nothing(name: str) -> None:
    """Of the kernel in CUDA C++, emulated: some missing barriers show in one of two orders only."""
    case = make_case(SHAPES[name])
    scratch = case.scratch(FEW)
    assert scratch.loader is not None
    load = scratch.loader.load

    def reversed_kernel(*arguments: Any) -> Any:
        kernel = load(*arguments)
        kernel.is_reversed = True
        return kernel

    reversed_scratch = scratch._replace(loader=scratch.loader._replace(load=reversed_kernel))
    assert torch.equal(case.run(scratch=scratch)[0], case.run(scratch=reversed_scratch)[0])


@pytest.mark.parametrize("slope", [0.0, 1.0])
@pytest.mark.parametrize("config", [None, FEW], ids=["usual", "few programs"])
def test_every_sequence_adds_its_own_offset(config: LaunchConfig | None, slope: float) -> None:
    lens = (64, 333, 150, 0, 200, 333, 333, 400)
    keep_all = -torch.inf
    offsets = (0.0, keep_all, 0.5, 0.7, -0.3, 0.0, 0.25, -1e30)
    shape = Shape(lens, slope=slope, max_dense_len=NUM_ANCHORS)
    case = make_case(shape)
    garbage = [torch.nan] * 3  # of rows behind the last
    threshold_offset = torch.tensor([*offsets, *garbage], device=DEVICE)
    output, counters = case.run(config, threshold_offset=threshold_offset)
    rows_read, tokens = 0, 0
    lost_mass = torch.zeros(4, dtype=torch.float64, device=DEVICE)
    for row, (length, offset) in enumerate(zip(lens, offsets, strict=True)):
        if length == 0:
            assert not output[row].any()
            continue
        # alone, with what the offset makes of the thresholds
        alone = replace(case, seq_lens=torch.where(torch.arange(len(lens), device=DEVICE) == row, case.seq_lens, 0))
        alone.coefficients = case.coefficients.clone()
        alone.coefficients[:, 0] += max(offset, -1e9)
        expected, counted = alone.run(config, max_dense_len=10**6 if offset == keep_all else None)
        torch.testing.assert_close(output[row], expected[row], rtol=0, atol=2e-3)
        rows_read += counted.value_rows_read
        if offset == 0.0 and length > NUM_ANCHORS:
            tokens += 1
            lost_mass += counted.lost_mass
    assert counters.value_rows_read.tolist() == rows_read.tolist()
    # of what requests asked for, nothing enters the statistics of what was lost
    assert counters.totals.tolist() == [7, 1, sum(lens), 1, 5]
    assert counters.lost_mass_histogram.sum(dim=1).tolist() == [tokens] * 4 == [1] * 4
    torch.testing.assert_close(counters.lost_mass, lost_mass, rtol=1e-4, atol=1e-5)
    # offsets of zero are none
    uniform, one = case.run(config, threshold_offset=torch.zeros(len(lens), device=DEVICE))
    plain, other = case.run(config)
    assert torch.equal(uniform, plain)
    assert all(torch.equal(left, right) for left, right in zip(one, other, strict=True) if left is not None)


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("weight_floor", [0.5, 3.0, 20.0])
def test_no_key_of_the_floor_s_weight_is_skipped(weight_floor: float, has_sinks: bool) -> None:
    # scores of the size of a real model's, whose weight lies anywhere, far from the anchors too
    lens = (150, 333, 700)
    case = make_case(Shape(lens, max_dense_len=NUM_ANCHORS, slope=1.0, value_mean=False, has_sinks=has_sinks))
    case.query *= 4.0
    case.coefficients.zero_()
    case.coefficients[:, 0], case.coefficients[:, 1], case.coefficients[:, 3] = math.log(weight_floor), -1.0, 1.0
    output, counters = case.run(FEW)
    # rounding may move a key that lies this near to the threshold
    nearly, least, most, near = 1e-3, 0, 0, torch.zeros(4, dtype=torch.float64, device=DEVICE)
    lost = torch.zeros_like(near)
    for row, length in enumerate(case.shape.lens):
        scores = scores_of(case, row)
        weights = (scores - row_lse(scores, case.sinks)[:, None]).exp()
        lengths = case.seq_lens[row : row + 1]
        theta = relative_threshold(scores[None], lengths, weight_floor, sinks=case.sinks)[0][:, None]
        heavy = weights >= weight_floor / length
        least += (heavy | (scores >= theta + nearly)).view(2, 2, length).any(1).sum(1)
        most += (scores >= theta - nearly).view(2, 2, length).any(1).sum(1)
        lost += weights.where(scores < theta, 0.0).sum(dim=1)
        near += weights.where((scores - theta).abs() < nearly, 0.0).sum(dim=1)
        torch.testing.assert_close(output[row].float(), reference(case, row).output[0], rtol=0, atol=5e-3)
    read = counters.value_rows_read
    assert bool(((least <= read) & (read <= most)).all()), (least, read, most)
    assert int((most - least).max()) <= 3
    assert int(read.max()) < sum(case.shape.lens)
    assert bool(((counters.lost_mass - lost).abs() <= near + 1e-3).all())


def test_lists_longer_than_their_room_are_gathered_early() -> None:
    # every key of 33 tiles survives, three times as many as a lane has room for at once
    shape = Shape((64 * 33 + 5,), num_heads=2, num_kv_heads=1, max_dense_len=0)
    case = make_case(shape)
    case.set_threshold(-50.0)
    output, counters = case.run(LaunchConfig(programs_per_sm=1, min_work=1000))
    assert counters.value_rows_read.tolist() == [shape.lens[0]]
    assert float(counters.lost_mass.abs().max()) == 0.0
    torch.testing.assert_close(output[0].float(), reference(case, 0).output[0], rtol=0, atol=2e-3)


@pytest.mark.parametrize("exact", [True, False])
def test_minus_infinity_is_dense_attention(exact: bool) -> None:
    case = make_case(Shape(LENS, exact=exact))
    case.set_threshold(-torch.inf)
    output, counters = case.run()
    dense, _ = case.run(max_dense_len=10**6)
    torch.testing.assert_close(output, dense, rtol=0, atol=2e-3)
    assert counters.value_rows_read.tolist() == [sum(LENS)] * 2
    assert not counters.lost_mass.any()


@pytest.mark.parametrize("programs_per_sm", [20, 80])
@pytest.mark.parametrize("head_size", [64, 80])
def test_pieces_that_several_programs_join(programs_per_sm: int, head_size: int) -> None:
    config = LaunchConfig(programs_per_sm=programs_per_sm, min_work=1, tile=16, dense_tile=16)
    pages = num_multiprocessors(torch.device(DEVICE)) * 2
    case = make_case(Shape((16 * pages * 16,), head_size=head_size, slope=1.0, max_dense_len=NUM_ANCHORS))
    check(case, *case.run(config))


def test_a_step_of_few_tokens_is_dense() -> None:
    case = make_case(Shape(LENS, slope=1.0, max_dense_len=NUM_ANCHORS), threshold=1.0)
    dense, expected = case.run(max_dense_len=10**6)
    output, counters = case.run(min_step_tokens=sum(LENS) + 1)
    torch.testing.assert_close(output, dense, rtol=0, atol=2e-3)
    assert torch.equal(counters.totals, expected.totals)
    assert torch.equal(counters.value_rows_read, expected.value_rows_read)
    assert not counters.lost_mass_histogram.any()
    sparse, counted = case.run(min_step_tokens=sum(LENS))
    assert torch.equal(sparse, case.run()[0])
    assert counted.value_rows_read.sum() < expected.value_rows_read.sum()


@pytest.mark.parametrize("lens", [(64, 64), (333, 0, 1, 16, 130), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("programs", [8, 40])
def test_in_a_small_step_no_program_has_two_pieces(lens: tuple[int, ...], programs: int) -> None:
    num_kv_heads, num_sms = 2, num_multiprocessors(torch.device(DEVICE))
    config = LaunchConfig(programs_per_sm=-(-programs * num_kv_heads // num_sms), min_work=1, tile=16, dense_tile=16)
    case = make_case(Shape(lens, slope=1.0, max_dense_len=NUM_ANCHORS), threshold=1.0)
    scratch = case.scratch(config)
    scratch.partial_stats.fill_(torch.nan)
    output, counters = case.run(scratch=scratch, min_step_tokens=sum(lens) + 1)
    torch.testing.assert_close(output, case.run(max_dense_len=10**6)[0], rtol=0, atol=2e-3)
    assert counters.value_rows_read.tolist() == [sum(lens)] * num_kv_heads
    num_pieces = int((~scratch.partial_stats[:, 0, 0].isnan()).sum())
    assert num_pieces <= config.num_programs(num_kv_heads, num_sms) * num_kv_heads


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("threshold", [40.0, 1000.0, torch.inf])
def test_without_survivors_the_output_is_the_mean_value(threshold: float, exact: bool) -> None:
    case = make_case(Shape((5, 48, 90), exact=exact))
    case.set_threshold(threshold)
    output, counters = case.run()
    for row in range(3):
        mean = case.sequence(row)[1].mean(0).repeat_interleave(2, dim=0)
        torch.testing.assert_close(output[row].float(), mean, rtol=0, atol=2e-3)
    assert counters.lost_mass.tolist() == pytest.approx([3.0] * 4)
    assert counters.value_rows_read.tolist() == [5 + 0 + 10] * 2  # only the open page, for the mean


@pytest.mark.parametrize("lens", [(64, 65), (65, 64), (16, 17), (80, 32, 33, 16)])
def test_a_page_that_another_sequence_fills_in_the_same_step(lens: tuple[int, ...]) -> None:
    # a prompt of which one token is left may stand on a page as soon as the token that fills it is scheduled
    case = make_case(Shape(lens), threshold=1e6)
    filling = next(row for row, length in enumerate(lens) if length + 1 in lens)
    standing = lens.index(lens[filling] + 1)
    num_pages = lens[filling] // case.shape.block_size
    case.block_table[standing, :num_pages] = case.block_table[filling, :num_pages]
    case.value_sum[case.block_table[filling, num_pages - 1].long()] = torch.nan  # or of whoever had the page before
    output, _ = case.run()
    for row in range(len(lens)):
        _, value = case.sequence(row)
        mean = value.mean(dim=0).repeat_interleave(case.shape.num_heads // case.shape.num_kv_heads, dim=0)
        torch.testing.assert_close(output[row].float(), mean, rtol=0, atol=2e-3)
    check_closed_pages(case)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("value_mean", [True, False])
def test_a_sink_that_outweighs_every_key_leaves_nothing(value_mean: bool, exact: bool) -> None:
    shape = Shape((5, 48, 400), exact=exact, value_mean=value_mean, slope=1.0, max_dense_len=NUM_ANCHORS)
    case = make_case(shape)
    step, call = case.records(torch.full_like(case.query, torch.nan), counters=Counters.allocate(4, 2, DEVICE))
    call = call._replace(layer=call.layer._replace(sinks=torch.full((4,), 200.0, device=DEVICE)))
    decode(step, call, case.scratch(FEW))
    assert not call.output.any()
    # what the sink has is not lost
    assert call.layer.counters.lost_mass.abs().max() < 1e-6


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(3, device=DEVICE),
        lambda: torch.zeros(4, 1, device=DEVICE),
        lambda: torch.zeros(4, dtype=torch.int32, device=DEVICE),
        lambda: torch.zeros(8, device=DEVICE)[::2],
    ],
    ids=["too few", "too many axes", "another dtype", "not contiguous"],
)
def test_wrong_sinks_are_named(make: Callable[[], torch.Tensor]) -> None:
    case = make_case(Shape((16, 16)))
    step, call = case.records(torch.empty_like(case.query))
    with pytest.raises(ValueError, match="^sinks: "):
        decode(step, call._replace(layer=call.layer._replace(sinks=make())), case.scratch())


def test_without_survivors_and_value_mean_the_output_is_zero() -> None:
    case = make_case(Shape((5, 48, 90), value_mean=False))
    case.set_threshold(torch.inf)
    output, counters = case.run()
    assert not output.any()
    assert counters.value_rows_read.tolist() == [0, 0]


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
        case.set_threshold(threshold)
        _, counters = case.run()
        assert counters.value_rows_read.tolist() == [survivors, survivors]


@pytest.mark.parametrize(("programs", "min_work"), [(1, 1), (2, 4), (7, 1)])
def test_the_output_hardly_depends_on_how_work_is_shared_out(programs: int, min_work: int) -> None:
    case = make_case(Shape((400, 3, 0, 65, 128, 1), max_dense_len=65))
    expected, one = case.run(LaunchConfig(programs_per_sm=1, min_work=10_000))
    output, other = case.run(LaunchConfig(programs_per_sm=programs, min_work=min_work))
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-3)
    assert one.value_rows_read.tolist() == other.value_rows_read.tolist()


def test_a_repeated_call_gives_the_same_bits_and_counts_twice() -> None:
    case = make_case(Shape(LENS))
    scratch = Scratch.allocate(Sizes(16, 4, 2, 64), kv_dtype=torch.float16, device=DEVICE)
    counters = Counters.allocate(4, 2, DEVICE)
    first, _ = case.run(scratch=scratch, counters=counters)
    once = counters.value_rows_read.clone()
    again, _ = case.run(scratch=scratch, counters=counters)
    assert torch.equal(first, again)
    assert counters.value_rows_read.tolist() == (2 * once).tolist()
    assert counters.totals.tolist() == [8, 0, 2 * sum(LENS), 2, 0]
    assert counters.lost_mass_histogram.sum(dim=1).tolist() == [8] * 4
    counters.zero_()
    assert not any(buffer.any() for buffer in counters if buffer is not None)


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
        ("coefficients", {"coefficients": torch.zeros(3, 4)}),
        ("coefficients", {"coefficients": torch.zeros(4, 3)}),
        ("coefficients", {"coefficients": torch.zeros(4, 8, device=DEVICE)[:, ::2]}),
        ("value_sum", {"value_sum": torch.zeros(2, 2, 64, dtype=torch.float16)}),
    ],
)
def test_wrong_arguments_are_named(field: str, change: dict[str, torch.Tensor]) -> None:
    case = replace(make_case(Shape((16,))), **{name: tensor.to(DEVICE) for name, tensor in change.items()})
    with pytest.raises(ValueError, match=f"^{field}: "):
        case.run(scratch=Scratch.allocate(Sizes(1, 4, 2, 64), kv_dtype=torch.float16, device=DEVICE))


@pytest.mark.parametrize(
    "threshold_offset",
    [torch.zeros(2), torch.zeros(3, 1), torch.zeros(3, dtype=torch.float64), torch.zeros(6, device=DEVICE)[::2]],
    ids=["fewer rows than sequences", "too many axes", "another dtype", "not contiguous"],
)
def test_wrong_offsets_are_named(threshold_offset: torch.Tensor) -> None:
    case = make_case(Shape((16, 16, 16)))
    with pytest.raises(ValueError, match="^threshold_offset: "):
        case.run(threshold_offset=threshold_offset.to(DEVICE))


def test_relative_thresholds_need_room_for_the_anchors() -> None:
    case = make_case(Shape((200,), slope=1.0, max_dense_len=NUM_ANCHORS))
    with pytest.raises(ValueError, match="^max_dense_len: "):
        case.run(max_dense_len=NUM_ANCHORS - 1)


def test_a_scratch_for_fewer_sequences_is_refused() -> None:
    case = make_case(Shape((16, 16, 16)))
    scratch = Scratch.allocate(Sizes(1, 4, 2, 64), kv_dtype=torch.float16, device=DEVICE)
    with pytest.raises(ValueError, match="^scratch: "):
        case.run(scratch=scratch)


@pytest.mark.parametrize("kernel", ["CUDA"], indirect=True)
@pytest.mark.parametrize(("field", "name"), [("kv_dtype", "kv_cache"), ("query_dtype", "query")])
def test_in_cuda_what_is_of_another_type_than_the_output_is_refused(field: str, name: str) -> None:
    case = make_case(Shape((16,)))
    scratch = case.scratch()
    other = make_case(replace(case.shape, **{field: torch.float8_e4m3fn}))
    with pytest.raises(ValueError, match=f"{name}: dtype is torch.float8_e4m3fn, expected torch.float16"):
        other.run(scratch=scratch, output=torch.empty_like(case.query, device=DEVICE))
