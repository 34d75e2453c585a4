"""The kernels of tiers against the fp32 reference, with NaN or garbage in every byte that was not written."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from tests.kernels.decode_case import DEVICE, INTERPRETED, RUNS_HERE, WHY_NOT, Shape
from tests.kernels.tier_case import GARBAGE, SCANNING, TierCase, check, check_copies, make_tier_case
from vllm_toptheta.kernels.contract import Counters, Layer, LayerCache, TailStep
from vllm_toptheta.kernels.gpu import tiers as tiers_module
from vllm_toptheta.kernels.gpu import tuning
from vllm_toptheta.kernels.gpu.cuda import tier_copy
from vllm_toptheta.kernels.gpu.tails import write_tails
from vllm_toptheta.kernels.gpu.tiers import decode
from vllm_toptheta.kernels.gpu.tuning import ShadowConfig
from vllm_toptheta.reference import dense_attention

pytestmark = pytest.mark.skipif(not RUNS_HERE, reason=WHY_NOT)
Make = Callable[..., TierCase]


@pytest.fixture(params=["Triton", "CUDA"])
def make(request: pytest.FixtureRequest) -> Make:
    """Makes cases for either kernel that reads."""
    return partial(make_tier_case, in_cuda=request.param == "CUDA")


LENS = (1, 0, 160, 333)

SHAPES = {
    "plain": Shape(LENS),
    "mha": Shape(LENS, num_heads=2),
    "group of 3": Shape((16, 100, 300, 70), num_heads=9, num_kv_heads=3),
    "group of 4": Shape(LENS, num_heads=8, num_kv_heads=2),
    "group of 5": Shape(LENS[2:], num_heads=5, num_kv_heads=1),
    "group of 8": Shape(LENS, num_heads=8, num_kv_heads=1),
    "group of 16, HND": Shape(LENS[2:], num_heads=16, num_kv_heads=1, layout="HND"),
    "head size 128, block 128": Shape(LENS, head_size=128, block_size=128),
    "head size 128, block 32": Shape(LENS, num_heads=8, head_size=128, block_size=32),
    "pages longer than the last anchors": Shape((700, 511, 512, 513, 300), num_heads=3, num_kv_heads=1, block_size=256),
    "head size 256": Shape(LENS[:3], num_kv_heads=1, num_heads=2, head_size=256),
    "block size that is no power of two": Shape(LENS, block_size=48),
    "soft cap": Shape(LENS, soft_cap=5.0),
    "short sequences kept": Shape(LENS, max_dense_len=160),
    "everything kept": Shape(LENS, max_dense_len=1000),
    "sinks": Shape(LENS, has_sinks=True),
    "sinks, group of 8, soft cap": Shape(LENS, num_heads=8, num_kv_heads=1, soft_cap=5.0, has_sinks=True),
    "no value mean": Shape(LENS, value_mean=False),
}
FLOAT8 = torch.float8_e4m3fn
# of the kernels in Triton alone
FLOAT8_SHAPES = {
    "plain": Shape(LENS, kv_dtype=FLOAT8),
    "queries too": Shape(LENS, num_heads=8, kv_dtype=FLOAT8, query_dtype=FLOAT8),
    "head size 128, block 32": Shape(LENS, num_heads=8, head_size=128, block_size=32, kv_dtype=FLOAT8),
    "head size 256, soft cap": Shape(
        LENS[:3], num_kv_heads=1, num_heads=2, head_size=256, soft_cap=5.0, kv_dtype=FLOAT8, query_dtype=FLOAT8
    ),
    "group of 16, HND": Shape(LENS[2:], num_heads=16, num_kv_heads=1, layout="HND", kv_dtype=FLOAT8),
    "short sequences kept": Shape(LENS, max_dense_len=160, kv_dtype=FLOAT8),
}
# few programs, so that sequences are split in the middle and programs cross from one to the next
FEW = replace(SCANNING, tile=64, programs_per_sm=1, min_work=1, walk_tile=32, chunk_tiles=2, list_depth=4)


@pytest.mark.parametrize("name", SHAPES)
def test_decode(make: Make, name: str) -> None:
    tiers = make(SHAPES[name])
    if not SHAPES[name].value_mean:
        # the reference gives the lost mass to the mean, which here it is not
        output, counters = tiers.run(FEW if INTERPRETED else SCANNING)
        full, expected = make(replace(SHAPES[name], value_mean=True)).run(FEW if INTERPRETED else SCANNING)
        assert torch.equal(counters.lost_mass, expected.lost_mass)
        row = len(SHAPES[name].lens) - 1
        lost = tiers.reference(row).lost_mass[0][:, None]
        mean = tiers.case.sequence(row)[1].mean(0).repeat_interleave(2, dim=0)
        torch.testing.assert_close(output[row].float(), full[row].float() - lost * mean, rtol=0, atol=3e-3)
        return
    check(tiers, *tiers.run(FEW if INTERPRETED else SCANNING))


@pytest.mark.parametrize("programs", [(1, 3), (3, 1), (2, 2)])
@pytest.mark.parametrize("max_dense_len", [0, 170])
@pytest.mark.parametrize("piece_tokens", [0, 64])
def test_kv_heads_of_different_numbers_of_programs(
    programs: tuple[int, int], max_dense_len: int, piece_tokens: int
) -> None:
    tiers = make_tier_case(Shape((400, 160, 0, 333, 1, 20, 16), max_dense_len=max_dense_len), in_cuda=True)
    head_programs = torch.tensor(programs, dtype=torch.int32, device=DEVICE)
    config = replace(FEW, programs_per_sm=2, piece_tokens=piece_tokens)
    check(tiers, *tiers.run(config, head_programs=head_programs))


@pytest.mark.parametrize(
    ("lens", "programs", "is_balanced"),
    [
        # shares of 125 pages on whole programs, or of 131 and 8 more for the mean head
        ((2000, 2000), (3, 1), True),
        ((2000, 2000), (2, 2), False),
        # of 24 pages, or of 30 and 8 more; of 10, or of 16 and 8 more
        ((384, 384), (3, 1), False),
        ((160, 160), (3, 1), False),
        # a sequence has no second piece
        ((320,), (3, 1), True),
        # no whole programs
        ((320, 320, 320, 320), (3, 1), True),
    ],
)
def test_sequences_keep_whole_programs_if_that_is_faster(
    monkeypatch: pytest.MonkeyPatch, lens: tuple[int, ...], programs: tuple[int, int], is_balanced: bool
) -> None:
    """Seen in how many pieces of each kv head are left; two programs a head, on a GPU too."""
    monkeypatch.setattr(tuning, "_num_multiprocessors", lambda index: 2)
    monkeypatch.setattr(tuning, "_INTERPRETER_SMS", 2)
    tiers = make_tier_case(Shape(lens), in_cuda=True)
    scratch = tiers.scratch(replace(FEW, programs_per_sm=2, piece_tokens=96))
    scratch.partial_stats.fill_(torch.nan)
    head_programs = torch.tensor(programs, dtype=torch.int32, device=DEVICE)
    check(tiers, *tiers.run(scratch=scratch, head_programs=head_programs))
    pieces = scratch.partial_stats.unflatten(0, (-1, 2))[:, :, 0, 0]
    first, second = (~pieces.isnan()).sum(0).tolist()
    assert (first != second) == is_balanced


def test_nothing_that_waits_is_launched_before_the_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits holds a multiprocessor; thresholds read keys at once only behind a kernel that has waited for them."""
    launched = []

    def spy(name: str) -> Callable[..., None]:
        launch = getattr(tiers_module, name)

        def record(*arguments: Any, **options: Any) -> None:
            launched.append((name, options.get("is_second", False)))
            launch(*arguments, **options)

        return record

    for name in [name for name in vars(tiers_module) if name.startswith("launch_")]:
        monkeypatch.setattr(tiers_module, name, spy(name))
    in_cuda = make_tier_case(SHAPES["plain"], in_cuda=True)
    check(in_cuda, *in_cuda.run(FEW))
    order = ["launch_tier_copy", "launch_thresholds", "launch_tier_split", "launch_queries", "launch_merge"]
    assert launched == [(name, name == "launch_thresholds") for name in order]
    launched.clear()
    in_triton = make_tier_case(SHAPES["plain"])
    check(in_triton, *in_triton.run(FEW))
    order = ["launch_thresholds", "launch_queries", "launch_split", "launch_merge"]
    assert launched == [(name, False) for name in order]


@pytest.mark.parametrize("is_all_read", [True, False])
def test_in_a_small_step_all_kv_heads_have_as_many_programs(is_all_read: bool) -> None:
    """Be it that another kernel reads all of its keys, or that all are kept."""
    tiers = make_tier_case(SHAPES["plain"], in_cuda=True)
    config = replace(FEW, programs_per_sm=2, short_length=2000 if is_all_read else 0)
    options = {} if is_all_read else {"min_step_tokens": sum(LENS) + 1}
    expected, counted = tiers.run(config, **options)
    programs = torch.tensor([3, 1], dtype=torch.int32, device=DEVICE)
    output, counters = tiers.run(config, head_programs=programs, **options)
    assert torch.equal(output, expected)
    assert torch.equal(counters.keys_read, counted.keys_read)
    assert counters.keys_read.tolist() == [sum(LENS)] * 2


@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter multiplies the bits of bfloat16 as integers")
@pytest.mark.parametrize("name", [name for name in SHAPES if SHAPES[name].value_mean])
def test_decode_bfloat16(make: Make, name: str) -> None:
    tiers = make(replace(SHAPES[name], dtype=torch.bfloat16))
    check(tiers, *tiers.run())


def test_a_sink_that_outweighs_every_key_leaves_nothing(make: Make) -> None:
    tiers = make(SHAPES["plain"])
    output = torch.full_like(tiers.case.query, torch.nan)
    counters = Counters.allocate(4, 2, DEVICE, counts_keys=True, counts_copies=True)
    step, call = tiers.records(output, counters=counters)
    layer = call.layer._replace(sinks=torch.full((4,), 200.0, device=DEVICE))
    decode(step, call._replace(layer=layer), tiers.scratch(FEW))
    assert not output.any()
    # what the sink has is not lost
    assert float(counters.lost_mass.max()) < 1e-6


@pytest.mark.parametrize("name", FLOAT8_SHAPES)
def test_float8_pages(name: str) -> None:
    tiers = make_tier_case(FLOAT8_SHAPES[name])
    check(tiers, *tiers.run(FEW if INTERPRETED else SCANNING))


@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter multiplies the bits of bfloat16 as integers")
@pytest.mark.parametrize("name", FLOAT8_SHAPES)
def test_float8_pages_and_bfloat16(name: str) -> None:
    tiers = make_tier_case(replace(FLOAT8_SHAPES[name], dtype=torch.bfloat16))
    check(tiers, *tiers.run())


@pytest.mark.parametrize("is_short", [True, False])
def test_a_step_of_short_sequences_in_float8_pages(is_short: bool) -> None:
    tiers = replace(make_tier_case(FLOAT8_SHAPES["queries too"]), reads_all_keys=is_short)
    mean = sum(LENS) // sum(length > 0 for length in LENS)
    check(tiers, *tiers.run(replace(FEW, short_length=mean + is_short)))


def test_scales_of_pages_of_16_bits(make: Make) -> None:
    tiers = make(SHAPES["plain"])
    tiers.case.scales = torch.tensor([0.7], device=DEVICE), torch.tensor([1.3], device=DEVICE)
    check(tiers, *tiers.run(FEW if INTERPRETED else SCANNING))


@pytest.mark.parametrize(
    "config",
    [
        replace(FEW, chunk_tiles=1, list_depth=1),
        replace(FEW, tile=128, chunk_tiles=4, list_depth=9, scan_stages=1, walk_tile=64),
    ],
    ids=["a walk after every tile", "other sizes"],
)
def test_variants(make: Make, config: ShadowConfig) -> None:
    tiers = make(SHAPES["plain"])
    check(tiers, *tiers.run(config))


@pytest.mark.parametrize("block_size", [16, 64])
def test_sequences_of_more_units_than_there_are_parts(make: Make, block_size: int) -> None:
    """Units that are dealt out to parts (`Spread` of schedule.cuh): fewer than parts, as many, and some more."""
    parts = 63 * block_size
    tiers = make(
        Shape((parts - 1, parts + 2 * block_size + 3, 200), num_heads=2, num_kv_heads=1, block_size=block_size)
    )
    check(tiers, *tiers.run(FEW if INTERPRETED else SCANNING))


@pytest.mark.parametrize("name", ["plain", "group of 8"])
@pytest.mark.parametrize("is_short", [True, False])
def test_all_keys_are_read_in_a_step_of_short_sequences(make: Make, name: str, is_short: bool) -> None:
    shape = SHAPES[name]
    # 0 is padding, not a sequence
    mean = sum(shape.lens) // sum(length > 0 for length in shape.lens)
    tiers = replace(make(shape), reads_all_keys=is_short)
    # pieces that are worth whole programs, in one of the two ways of sharing only
    output, counters = tiers.run(replace(FEW, short_length=mean + is_short, piece_tokens=4096))
    check(tiers, output, counters)
    if is_short:
        assert counters.keys_read.tolist() == [sum(shape.lens)] * shape.num_kv_heads
        assert not counters.copies_read.any()


def test_a_step_of_few_tokens_is_dense(make: Make) -> None:
    tiers = make(SHAPES["plain"])
    output, counters = tiers.run(FEW, min_step_tokens=sum(LENS) + 1)
    dense, _ = tiers.run(FEW, max_dense_len=10**6)
    torch.testing.assert_close(output, dense, rtol=0, atol=2e-3)
    assert counters.keys_read.tolist() == counters.value_rows_read.tolist() == [sum(LENS)] * 2
    assert not counters.copies_read.any()


def test_every_key_heavy_is_dense_attention(make: Make) -> None:
    tiers = make(SHAPES["plain"], weight_floor=1e-9, heavy=0.0)
    output, counters = tiers.run(FEW)
    for row, length in enumerate(LENS):
        if length:
            expected = dense_attention(
                tiers.case.new_query(row), *tiers.case.sequence(row), softmax_scale=tiers.case.softmax_scale
            )
            torch.testing.assert_close(output[row].float(), expected.output[0], rtol=0, atol=4e-3)
    assert counters.keys_read.tolist() == [sum(LENS)] * 2
    assert not counters.copies_read.any()


def test_every_key_light(make: Make) -> None:
    tiers = make(SHAPES["plain"], weight_floor=1e-6, heavy=1.0)
    output, counters = tiers.run(FEW)
    check(tiers, output, counters)
    # both ends are exact, and nothing is lost
    assert int(counters.copies_read.min()) > 0.6 * (333 - 144)
    assert float(counters.lost_mass.max()) < 1e-4


def test_more_heavy_keys_than_a_list_has_room_for(make: Make) -> None:
    lens = (2700, 400)
    tiers = make(Shape(lens, num_heads=3, num_kv_heads=1), weight_floor=1e-9, heavy=0.0)
    output, counters = tiers.run(replace(FEW, programs_per_sm=0))  # one program, whose lists hold 256 keys a warp
    for row in range(len(lens)):
        expected = dense_attention(
            tiers.case.new_query(row), *tiers.case.sequence(row), softmax_scale=tiers.case.softmax_scale
        )
        torch.testing.assert_close(output[row].float(), expected.output[0], rtol=0, atol=4e-3)
    assert counters.keys_read.tolist() == [sum(lens)]


@pytest.mark.parametrize(("programs_per_sm", "piece_tokens"), [(3, 256), (8, 256), (3, 16), (3, 64), (8, 64)])
def test_shares_where_a_piece_takes_long_beside_its_keys(make: Make, programs_per_sm: int, piece_tokens: int) -> None:
    """Who reads and who joins share out a step alike, by whole sequences and by equal shares, as in a server."""
    tiers = make(Shape((333, 170, 400, 150, 0, 200), num_heads=3, num_kv_heads=1))
    check(tiers, *tiers.run(replace(FEW, programs_per_sm=programs_per_sm, piece_tokens=piece_tokens)))


@pytest.mark.parametrize("heavy", [0.0078, 0.0080, 0.0082, 0.0084])
def test_lists_that_are_full_anywhere(make: Make, heavy: float) -> None:
    """Nearly half of the keys are heavy: a scan that goes on does so in the middle of the places loaded at once."""
    tiers = make(Shape((7000,), num_heads=3, num_kv_heads=1), weight_floor=1e-9, heavy=heavy)
    check(tiers, *tiers.run(replace(FEW, programs_per_sm=0)))


@pytest.mark.skipif(not INTERPRETED, reason="a GPU has an order of its own")
@pytest.mark.parametrize("name", ["plain", "group of 8"])
def test_the_order_in_which_warps_run_changes_nothing(name: str) -> None:
    """Of the kernels in CUDA C++, emulated: some missing barriers show in one of two orders only."""
    tiers = make_tier_case(SHAPES[name], in_cuda=True)
    loader = tiers.loader
    assert loader is not None

    def reversed_kernel(*arguments: Any) -> Any:
        kernel = loader.load(*arguments)
        kernel.is_reversed = True
        return kernel

    outputs = [replace(tiers, loader=loader._replace(load=load)).run(FEW)[0] for load in (loader.load, reversed_kernel)]
    assert torch.equal(*outputs)


def test_a_request_moves_what_is_light_and_not_what_is_heavy(make: Make) -> None:
    tiers = make(SHAPES["plain"])
    offset = torch.zeros(len(LENS), device=DEVICE)
    offset[3] = math.log(0.05)
    output, counters = tiers.run(FEW, threshold_offset=offset)
    _, plain = tiers.run(FEW)
    assert torch.equal(counters.keys_read, plain.keys_read)
    assert bool((counters.copies_read > plain.copies_read).all())
    lower = replace(tiers, weight_floor=0.05 * tiers.weight_floor).reference(3)
    torch.testing.assert_close(output[3].float(), lower.output[0], rtol=0, atol=6e-3)
    offset[3] = -torch.inf
    dense = dense_attention(
        tiers.case.new_query(3), *tiers.case.sequence(3), softmax_scale=tiers.case.softmax_scale
    ).output[0]
    output, _ = tiers.run(FEW, threshold_offset=offset)
    torch.testing.assert_close(output[3].float(), dense, rtol=0, atol=4e-3)


def test_what_scratch_held_does_not_matter(make: Make) -> None:
    tiers = make(SHAPES["plain"])
    scratch = tiers.scratch(FEW)
    results = []
    for byte in (0x00, 0x7F, 0xFF):
        for buffer in scratch[3:]:
            buffer.view(torch.uint8).fill_(byte)
        results.append(tiers.run(scratch=scratch)[0])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("kv_dtype", [None, FLOAT8])
@pytest.mark.parametrize(("name", "before"), [("plain", (0, 0, 100, 31)), ("head size 128, block 32", (0, 0, 0, 320))])
def test_copies_of_steps_that_fill_any_number_of_pages(
    make: Make, name: str, before: tuple[int, ...], kv_dtype: torch.dtype | None
) -> None:
    tiers = make(replace(SHAPES[name], kv_dtype=kv_dtype))
    if kv_dtype is not None:
        tiers.loader = None  # those of float8 are made by the kernel in Triton
    tiers.codes.fill_(GARBAGE)
    tiers.write_tails([0] * len(LENS), list(before))
    tiers.write_tails(list(before), list(LENS))
    check_copies(tiers)
    written = tiers.codes.clone()
    tiers.write_tails([0] * len(LENS), list(LENS))
    assert torch.equal(tiers.codes, written)
    open_page = int(tiers.case.block_table[3, LENS[3] // SHAPES[name].block_size])
    assert bool((tiers.codes[open_page] == GARBAGE).all())


def test_copies_of_more_pages_than_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tier_copy, "_MOST_PROGRAMS", 1)
    tiers = make_tier_case(SHAPES["plain"], in_cuda=True)
    tiers.codes.fill_(GARBAGE)
    tiers.write_tails([0] * len(LENS), list(LENS))
    check_copies(tiers)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"head_size": 80}, "query: there are no GPU kernels for copies of heads of 80, only of 64, 128, 256"),
        ({"head_size": 256, "num_heads": 16, "num_kv_heads": 1}, "16 query heads per kv head, only for up to 8"),
    ],
)
def test_what_has_no_kernels(make: Make, change: dict[str, object], words: str) -> None:
    tiers = make(replace(Shape((200,)), **change))
    with pytest.raises(ValueError, match=words):
        tiers.run(FEW)


def test_the_kernels_in_cuda_have_none_for_float8() -> None:
    tiers = make_tier_case(Shape((200,), kv_dtype=FLOAT8), in_cuda=True)
    with pytest.raises(ValueError, match="kv_cache: dtype is torch.float8_e4m3fn, expected torch.float16 for kernels"):
        tiers.run(FEW)


def test_tails_without_codes_are_refused(make: Make) -> None:
    tiers = make(Shape((200,)))
    step = TailStep(tiers.case.block_table, tiers.case.seq_lens, torch.zeros(2, dtype=torch.int32, device=DEVICE), 1)
    with pytest.raises(ValueError, match="codes: None"):
        write_tails(step, LayerCache(tiers.case.kv_cache), Layer(1.0, tiers=tiers.layer))
