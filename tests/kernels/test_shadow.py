"""The kernels of shadow keys against the fp32 reference, with NaN or garbage in every byte that was not written."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.kernels.decode_case import DEVICE, INTERPRETED, MARKS, Shape
from tests.kernels.shadow_case import (
    GARBAGE,
    SCANNING,
    ShadowCase,
    check,
    check_codes,
    make_shadow_case,
)
from vllm_toptheta.kernels.codec import ShadowCodec
from vllm_toptheta.kernels.contract import Counters, Layer, LayerCache, TailStep
from vllm_toptheta.kernels.gpu.scratch import ShadowScratch, Sizes
from vllm_toptheta.kernels.gpu.shadow import decode
from vllm_toptheta.kernels.gpu.tails import write_tails
from vllm_toptheta.kernels.gpu.tuning import ShadowConfig, num_multiprocessors
from vllm_toptheta.limits import NUM_ANCHORS

pytestmark = MARKS

LENS = (1, 0, 64, 160, 333)

SHAPES = {
    "plain": Shape(LENS, num_channels=32),
    "all channels": Shape(LENS, num_channels=64),
    "mha": Shape(LENS, num_heads=2, num_channels=32),
    "group of 8": Shape(LENS, num_heads=8, num_kv_heads=1, num_channels=32),
    "gqa 3, head size 80, block 32": Shape(LENS, num_heads=6, head_size=80, block_size=32, num_channels=64),
    "gqa 16, head size 96, HND": Shape(
        LENS[1:], num_heads=16, num_kv_heads=1, head_size=96, layout="HND", num_channels=32
    ),
    "head size 128, block 128": Shape(LENS, head_size=128, block_size=128, num_channels=64),
    "head size 128, two tokens a row": Shape(LENS, num_heads=8, head_size=128, num_channels=32),
    "head size 256": Shape(LENS[:4], num_kv_heads=1, num_heads=2, head_size=256, num_channels=128),
    "block size that is no power of two": Shape(LENS, block_size=48, num_channels=32),
    "soft cap": Shape(LENS, soft_cap=5.0, num_channels=32),
    "threshold curve": Shape(LENS, degree=2, num_channels=32),
    "relative": Shape((145, 333, 0, 420), max_dense_len=NUM_ANCHORS, degree=1, slope=1.0, num_channels=32),
    "relative, gqa 16, soft cap": Shape(
        (333,), num_heads=16, num_kv_heads=1, max_dense_len=NUM_ANCHORS, slope=1.0, soft_cap=5.0, num_channels=32
    ),
    "sinks": Shape(LENS, num_channels=32, has_sinks=True),
    "sinks, relative": Shape(
        (145, 333, 0, 420), max_dense_len=NUM_ANCHORS, degree=1, slope=1.0, num_channels=32, has_sinks=True
    ),
    "sinks, survivors only in Z": Shape(LENS, exact=False, num_channels=32, has_sinks=True),
    "short sequences kept": Shape(LENS, max_dense_len=160, num_channels=32),
    "everything kept": Shape(LENS, max_dense_len=1000, num_channels=32),
    "survivors only in Z": Shape(LENS, exact=False, num_channels=32),
    "no value mean": Shape(LENS, value_mean=False, num_channels=32),
    "float8_e4m3fn": Shape(LENS, kv_dtype=torch.float8_e4m3fn, num_channels=32),
    "float8_e4m3fn queries too": Shape(
        LENS, kv_dtype=torch.float8_e4m3fn, query_dtype=torch.float8_e4m3fn, num_channels=64
    ),
}
# few programs, so that sequences are split in the middle and programs cross from one to the next
FEW = replace(SCANNING, tile=64, programs_per_sm=1, min_work=1, walk_tile=32, chunk_tiles=4, list_depth=8)


@pytest.mark.parametrize("name", SHAPES)
def test_decode(name: str) -> None:
    shadow = make_shadow_case(SHAPES[name])
    check(shadow, *shadow.run(FEW if INTERPRETED else SCANNING))


@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter multiplies the bits of bfloat16 as integers")
@pytest.mark.parametrize("name", SHAPES)
def test_decode_bfloat16(name: str) -> None:
    shadow = make_shadow_case(replace(SHAPES[name], dtype=torch.bfloat16))
    check(shadow, *shadow.run())


@pytest.mark.parametrize(
    "config",
    [
        replace(FEW, tile=128, chunk_tiles=1, list_depth=1),
        replace(FEW, tile=256, chunk_tiles=4, list_depth=9, scan_stages=1, walk_tile=64),
    ],
    ids=["a walk after every tile", "other sizes"],
)
@pytest.mark.parametrize("name", ["plain", "head size 128, two tokens a row"])
def test_variants(name: str, config: ShadowConfig) -> None:
    shadow = make_shadow_case(SHAPES[name])
    check(shadow, *shadow.run(config))


@pytest.mark.parametrize("name", ["plain", "group of 8", "short sequences kept", "everything kept", "soft cap"])
@pytest.mark.parametrize("is_short", [True, False])
def test_all_keys_are_read_in_a_step_of_short_sequences(name: str, is_short: bool) -> None:
    shape = SHAPES[name]
    # 0 is padding, not a sequence
    mean = sum(shape.lens) // sum(length > 0 for length in shape.lens)
    shadow = replace(make_shadow_case(shape), reads_all_keys=is_short)
    check(shadow, *shadow.run(replace(FEW, short_length=mean + is_short)))


@pytest.mark.parametrize("name", ["plain", "survivors only in Z"])
@pytest.mark.parametrize("is_little", [True, False])
def test_all_keys_are_read_in_a_step_of_few_tokens(name: str, is_little: bool) -> None:
    shape = SHAPES[name]
    programs = FEW.num_programs(shape.num_kv_heads, num_multiprocessors(torch.device(DEVICE)))
    shadow = replace(make_shadow_case(shape), reads_all_keys=is_little)
    check(shadow, *shadow.run(replace(FEW, few_tokens=sum(shape.lens) // programs + is_little)))


def test_lists_longer_than_their_room_are_walked_early() -> None:
    # every key of 33 tiles is a candidate, and survives
    shape = Shape((64 * 33 + 5,), num_heads=2, num_kv_heads=1, num_channels=32)
    shadow = make_shadow_case(shape, threshold=-50.0)
    output, counters, keys_read = shadow.run(replace(FEW, min_work=1000, list_depth=8, chunk_tiles=2))
    assert keys_read.tolist() == counters.value_rows_read.tolist() == [shape.lens[0]]
    assert float(counters.lost_mass.abs().max()) == 0.0
    torch.testing.assert_close(output[0].float(), shadow.reference(0).output[0], rtol=0, atol=2e-3)


def test_minus_infinity_is_dense_attention() -> None:
    shadow = make_shadow_case(SHAPES["plain"], threshold=-1.0)
    shadow.case.set_threshold(-torch.inf)
    output, counters, keys_read = shadow.run(FEW)
    dense, _, _ = shadow.run(FEW, max_dense_len=10**6)
    torch.testing.assert_close(output, dense, rtol=0, atol=2e-3)
    assert keys_read.tolist() == counters.value_rows_read.tolist() == [sum(LENS)] * 2
    assert not counters.lost_mass.any()


@pytest.mark.parametrize("config", [FEW, ShadowConfig()], ids=["scans", "reads all keys"])
def test_a_step_of_few_tokens_is_dense(config: ShadowConfig) -> None:
    shadow = make_shadow_case(SHAPES["plain"], threshold=1.0)
    dense, expected, _ = shadow.run(config, max_dense_len=10**6)
    output, counters, keys_read = shadow.run(config, min_step_tokens=sum(LENS) + 1)
    torch.testing.assert_close(output, dense, rtol=0, atol=2e-3)
    assert torch.equal(counters.totals, expected.totals)
    assert keys_read.tolist() == counters.value_rows_read.tolist() == [sum(LENS)] * 2
    assert torch.equal(shadow.run(config, min_step_tokens=sum(LENS))[0], shadow.run(config)[0])


@pytest.mark.parametrize("threshold", [40.0, torch.inf])
def test_without_survivors_the_output_is_the_mean_value(threshold: float) -> None:
    shadow = make_shadow_case(Shape((5, 200, 250), num_channels=32), threshold=1.0)
    shadow.case.set_threshold(threshold)
    output, counters, keys_read = shadow.run(FEW)
    for row in range(3):
        mean = shadow.case.sequence(row)[1].mean(0).repeat_interleave(2, dim=0)
        torch.testing.assert_close(output[row].float(), mean, rtol=0, atol=2e-3)
    assert counters.lost_mass.tolist() == pytest.approx([3.0] * 4)
    assert counters.value_rows_read.tolist() == [5 + 8 + 10] * 2  # only the open page, for the mean
    # anchors, among which is the page of the new token
    assert keys_read.tolist() == [5 + 2 * (16 + 128)] * 2


def test_a_soft_cap_below_the_threshold_leaves_no_candidates() -> None:
    shadow = make_shadow_case(Shape((190,), soft_cap=5.0, num_channels=32), threshold=4.0)
    shadow.case.set_threshold(6.0)
    assert shadow.run(FEW)[2].tolist() == [16 + 128] * 2
    shadow.case.set_threshold(-6.0)
    assert shadow.run(FEW)[2].tolist() == [190] * 2


@pytest.mark.parametrize(("programs", "min_work"), [(1, 1), (2, 4), (7, 1)])
def test_the_output_hardly_depends_on_how_work_is_shared_out(programs: int, min_work: int) -> None:
    shadow = make_shadow_case(Shape((400, 3, 0, 65, 128, 1), max_dense_len=65, num_channels=32))
    expected, one, keys = shadow.run(replace(FEW, min_work=10_000))
    output, other, other_keys = shadow.run(replace(FEW, programs_per_sm=programs, min_work=min_work))
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-3)
    assert one.value_rows_read.tolist() == other.value_rows_read.tolist()
    assert keys.tolist() == other_keys.tolist()


def test_every_sequence_adds_its_own_offset() -> None:
    keep_all = -torch.inf
    shape = Shape((333, 180, 250, 0, 333, 64), num_channels=32, slope=1.0, max_dense_len=NUM_ANCHORS)
    offsets = (0.0, keep_all, -0.4, 0.3, 0.2, keep_all)
    shadow = make_shadow_case(shape)
    case = shadow.case
    threshold_offset = torch.tensor([*offsets, torch.nan], device=DEVICE)
    output, counters, keys_read = shadow.run(FEW, threshold_offset=threshold_offset)
    total = 0
    for row, offset in enumerate(offsets):
        alone = replace(case, seq_lens=torch.where(torch.arange(6, device=DEVICE) == row, case.seq_lens, 0))
        alone.coefficients = case.coefficients.clone()
        alone.coefficients[:, 0] += max(offset, -1e9)
        dense = {"max_dense_len": 10**6} if offset == keep_all else {}
        expected, _, keys = replace(shadow, case=alone).run(FEW, **dense)
        torch.testing.assert_close(output[row], expected[row], rtol=0, atol=1e-3)
        total += keys
    assert keys_read.tolist() == total.tolist()
    assert int(keys_read[0]) < sum(shape.lens)
    assert not output[3].any()
    # of what requests asked for, nothing enters the statistics of what was lost
    assert counters.totals.tolist() == [5, 0, sum(shape.lens), 1, 4]
    assert counters.lost_mass_histogram.sum(dim=1).tolist() == [1] * shape.num_heads


def test_a_page_that_another_sequence_fills_in_the_same_step_is_scanned() -> None:
    # the second sequence shares the first one's pages, the last of which the first one's new token fills
    shadow = make_shadow_case(Shape((192, 196), num_channels=32))
    case = shadow.case
    shared = case.block_table.clone()
    shared[1, :12] = shared[0, :12]
    case.block_table = shared
    filled = shared[0, 11].long()
    assert bool((shadow.codes[filled] == GARBAGE).all())
    check_both = replace(shadow, case=replace(case, block_table=shared))
    output, _, keys_read = check_both.run(FEW)
    for row in range(2):
        torch.testing.assert_close(output[row].float(), check_both.reference(row).output[0], rtol=0, atol=3e-3)
    assert keys_read.tolist() == (check_both.candidates(0).sum(1) + check_both.candidates(1).sum(1)).tolist()
    assert not bool((shadow.codes[filled] == GARBAGE).all())


def test_a_repeated_call_gives_the_same_bits_and_counts_twice() -> None:
    shadow = make_shadow_case(SHAPES["plain"])
    sizes = Sizes(16, 4, 2, 64, code_bytes=16)
    scratch = ShadowScratch.allocate(sizes, kv_dtype=torch.float16, device=DEVICE, config=FEW)
    counters = Counters.allocate(4, 2, DEVICE, counts_keys=True)
    first, _, _ = shadow.run(FEW, scratch, counters=counters)
    keys_read = counters.keys_read
    once = keys_read.clone()
    again, _, _ = shadow.run(FEW, scratch, counters=counters)
    assert torch.equal(first, again)
    assert keys_read.tolist() == (2 * once).tolist()


def test_counting_is_optional() -> None:
    shadow = make_shadow_case(SHAPES["plain"])
    expected, _, _ = shadow.run(FEW)
    output, untouched, _ = shadow.run(FEW, counters=None)
    assert torch.equal(output, expected)
    assert not untouched.totals.any()
    with pytest.raises(ValueError, match="^keys_read: "):
        shadow.run(FEW, counters=Counters.allocate(4, 2, DEVICE))


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("codes", {"codes": torch.zeros(2, 2, 16, 8, dtype=torch.uint8)}),
        ("codes", {"codes": torch.zeros(2, 2, 16, 16, dtype=torch.uint8).mT}),
        ("margin", {"margin": torch.zeros(3)}),
        ("log_unread_ratio", {"log_scale": torch.zeros(4, 2, dtype=torch.float64)}),
        ("log_unread_ratio", {"log_scale": torch.zeros(4)}),
        ("log_unread_ratio", {"log_scale": torch.zeros(2, 4).mT}),
    ],
)
def test_wrong_arguments_are_named(field: str, change: dict[str, torch.Tensor]) -> None:
    shadow = make_shadow_case(Shape((16,), num_channels=32))
    with pytest.raises(ValueError, match=f"^{field}: "):
        replace(shadow, **{name: tensor.to(DEVICE) for name, tensor in change.items()}).run(FEW)


def test_other_scratches_and_codecs_are_refused() -> None:
    shadow = make_shadow_case(Shape((16, 16, 16), num_channels=32))
    small = ShadowScratch.allocate(Sizes(1, 4, 2, 64, code_bytes=16), kv_dtype=torch.float16, device=DEVICE, config=FEW)
    with pytest.raises(ValueError, match="^scratch: "):
        shadow.run(FEW, small)
    step, call = shadow.records(torch.empty_like(shadow.case.query))
    one_head = ShadowCodec(*(tensor[:1] for tensor in shadow.layer.codec))
    other = call._replace(layer=call.layer._replace(shadow=shadow.layer._replace(codec=one_head)))
    with pytest.raises(ValueError, match="^codec: "):
        decode(step, other, shadow.scratch(FEW))
    with pytest.raises(ValueError, match="^shadow: None"):
        decode(step, call._replace(layer=call.layer._replace(shadow=None)), shadow.scratch(FEW))
    with pytest.raises(ValueError, match="^encoder: projects to 48 channels, expected one of 32, 64$"):
        ShadowCodec.build(torch.zeros(2, 64, 48), torch.zeros(2, 48, 64), torch.zeros(2, 64))
    with pytest.raises(ValueError, match="^decoder: "):
        ShadowCodec.build(torch.zeros(2, 64, 32), torch.zeros(2, 64, 32), torch.zeros(2, 64))


CODE_SHAPES = {
    "block 16": Shape((1, 0, 64, 130, 401), num_channels=32),
    "head size 80, block 32, HND": Shape((31, 400), head_size=80, block_size=32, layout="HND", num_channels=64),
    "block 128": Shape((1, 128, 300), head_size=256, block_size=128, num_channels=128),
    "block size that is no power of two": Shape((47, 48, 200), block_size=48, num_channels=32),
    "float8": Shape((200, 16), kv_dtype=torch.float8_e4m3fn, num_channels=64),
}


def step(shadow: ShadowCase, before: list[int], after: list[int]) -> None:
    """The sequences grow from `before` to `after`."""
    shadow.write_tails(before, after)


@pytest.mark.parametrize("name", CODE_SHAPES)
@pytest.mark.parametrize("chunk", [1000, 100, 7])
def test_codes_do_not_depend_on_how_the_tokens_came(name: str, chunk: int) -> None:
    shadow = make_shadow_case(CODE_SHAPES[name])
    shadow.codes.fill_(GARBAGE)
    lens = list(shadow.case.shape.lens)
    for end in range(chunk, max(lens) + chunk, chunk):
        step(shadow, [min(length, end - chunk) for length in lens], [min(length, end) for length in lens])
    check_codes(shadow)
    written = shadow.codes.clone()
    step(shadow, [0] * len(lens), lens)
    assert torch.equal(shadow.codes, written)


def test_codes_of_other_steps_and_open_pages_are_left_alone() -> None:
    shadow = make_shadow_case(Shape((70, 64), num_channels=32))
    shadow.codes.fill_(GARBAGE)
    step(shadow, [0, 0], [70, 0])
    table = shadow.case.block_table.long()
    assert not bool((shadow.codes[table[0, :4]] == GARBAGE).all())
    assert bool((shadow.codes[table[0, 4]] == GARBAGE).all())
    assert bool((shadow.codes[table[1, :4]] == GARBAGE).all())
    assert bool((shadow.codes[0] == GARBAGE).all())


@pytest.mark.parametrize("field", ["codes", "block_table", "seq_lens", "query_start_loc"])
def test_wrong_arguments_of_the_writer_are_named(field: str) -> None:
    shadow = make_shadow_case(Shape((64, 64), num_channels=32))
    arguments = {
        "codes": shadow.codes,
        "block_table": shadow.case.block_table,
        "seq_lens": shadow.case.seq_lens,
        "query_start_loc": torch.zeros(3, dtype=torch.int32, device=DEVICE),
    }
    arguments[field] = arguments[field].double()
    cache = LayerCache(shadow.case.kv_cache, codes=arguments.pop("codes"))
    with pytest.raises(ValueError, match=f"^{field}: "):
        write_tails(TailStep(**arguments, max_query_len=64), cache, Layer(1.0, shadow=shadow.layer))
