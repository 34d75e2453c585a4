"""What only a GPU can show: random shapes at full lengths, CUDA graphs, more than 2^31 elements."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.kernels import decode_case
from tests.kernels.decode_case import Case, Shape, check, cuda_loader, make_case
from tests.kernels.shadow_case import SCANNING, make_shadow_case
from tests.kernels.shadow_case import check as check_shadow
from tests.kernels.tier_case import SCANNING as TIERS_SCANNING
from tests.kernels.tier_case import check as check_tiers
from tests.kernels.tier_case import make_tier_case
from vllm_toptheta.kernels.contract import Layer, TailStep
from vllm_toptheta.kernels.gpu.scratch import Scratch
from vllm_toptheta.kernels.gpu.shadow import decode as decode_shadow
from vllm_toptheta.kernels.gpu.tails import write_tails
from vllm_toptheta.kernels.gpu.tiers import decode as decode_by_tiers
from vllm_toptheta.kernels.gpu.tuning import LaunchConfig, ShadowConfig, num_multiprocessors, tier_config
from vllm_toptheta.kernels.gpu.values import decode
from vllm_toptheta.kernels.pages import codes_view, padded_page_bytes, value_sum_view
from vllm_toptheta.limits import HEAD_SIZES, NUM_ANCHORS, TIER_HEAD_SIZES, gpus_lack

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

# what a kernel is compiled for; every value of every column occurs with most of the others
COLUMNS: dict[str, list[Any]] = {
    "head_size": list(HEAD_SIZES),
    "group": [1, 4, 8, 16, 2, 7],
    "block_size": [16, 32, 64, 128],
    "dtypes": [
        (torch.bfloat16, None, None),
        (torch.float16, None, None),
        (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e4m3fn),
        (torch.bfloat16, torch.float8_e5m2, None),
    ],
    "layout": ["NHD", "HND"],
    "soft_cap": [None, None, 20.0],
    "exact": [True, True, True, False],
    "value_mean": [True, True, True, False],
    "degree": [0, 2],
    "slope": [0.0, 1.0],
}
NUM_KINDS, CASES_PER_KIND = 20, 10
OFFSETS = (0.0, -math.inf, 0.3)  # the server's own, dense, higher thresholds
MAX_LENGTH, MAX_TOKENS = 131_072, 150_000


def random_shape(kind: int, case: int) -> Shape:
    chosen = random.Random(kind)  # noqa: S311 - test data
    columns = {name: chosen.choice(values) for name, values in COLUMNS.items()}
    for name, values in itertools.islice(COLUMNS.items(), 4):  # all values of the first columns, whatever was drawn
        columns[name] = values[kind % len(values)]
    drawn = random.Random(1000 * kind + case)  # noqa: S311 - test data
    lens: list[int] = []
    for _ in range(drawn.choice([1, 2, 5, 40])):
        length = min(int(2 ** drawn.uniform(0, 17.001)), MAX_LENGTH)
        lens.append(length if sum(lens) + length <= MAX_TOKENS else drawn.randrange(200))
    if case == 0:
        lens = [MAX_LENGTH, 1]
    shortest = NUM_ANCHORS if columns["slope"] else 0
    group, (dtype, kv_dtype, query_dtype) = columns.pop("group"), columns.pop("dtypes")
    num_kv_heads = drawn.choice([1, 2]) if kind % 2 else 2
    return Shape(
        (*lens, 0),
        num_heads=group * num_kv_heads,
        num_kv_heads=num_kv_heads,
        dtype=dtype,
        kv_dtype=kv_dtype,
        query_dtype=query_dtype,
        max_dense_len=max(shortest, drawn.choice([0, 0, 300, 5000])),
        target_k=drawn.choice([16, 128, 1000]),
        seed=1000 * kind + case,
        **columns,
    )


@pytest.fixture(params=["Triton", "CUDA"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which kernel reads keys and values."""
    if request.param == "CUDA":
        monkeypatch.setattr(decode_case, "loader_of", cuda_loader)
    return request.param


@pytest.mark.parametrize("case", range(CASES_PER_KIND))
@pytest.mark.parametrize("kind", range(NUM_KINDS))
def test_random_shapes(kind: int, case: int, kernel: str) -> None:
    shape = random_shape(kind, case)
    if kernel == "CUDA" and cuda_loader(shape) is None:
        pytest.skip("read in Triton")
    step = make_case(shape)
    check(step, *step.run())


def graph_case() -> tuple[Case, Scratch]:
    shape = Shape(
        (5000, 40_000, 777, 128, 16, 33, 1000, 2048),
        num_heads=8,
        head_size=128,
        dtype=torch.bfloat16,
        max_dense_len=500,
        degree=1,
        slope=1.0,
    )
    case = make_case(shape)
    _, _ = case.run()  # closes the pages that the last tokens fill
    return case, case.scratch()


@pytest.mark.usefixtures("kernel")
def test_a_replayed_graph_equals_the_eager_call() -> None:
    case, scratch = graph_case()
    output = torch.full_like(case.query, torch.nan)
    # as the engine captures: lengths of 1, and what they were then must not matter
    lens = case.seq_lens.clone()
    case.seq_lens.fill_(1)
    case.run(scratch=scratch, output=output)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case_run(case, scratch, output)
    for divisor in (1, 2, 3, 7):
        case.seq_lens.copy_(lens // divisor)
        case.seq_lens[-2:] = 0  # padding
        case.query.normal_()
        output.fill_(torch.nan)
        graph.replay()
        expected, _ = case.run(scratch=scratch)
        assert torch.equal(output, expected)
        assert not output[-2:].any()


@pytest.mark.usefixtures("kernel")
def test_a_replayed_graph_follows_offsets_that_move() -> None:
    case, scratch = graph_case()
    output = torch.full_like(case.query, torch.nan)
    offset = torch.zeros(10, device="cuda")
    asked: dict[str, Any] = {"scratch": scratch, "threshold_offset": offset}
    case.run(output=output, **asked)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case_run(case, scratch, output, threshold_offset=offset)
    for turn in range(4):
        rows = [OFFSETS[(row + turn) % 3] for row in range(8)]
        offset[:8] = torch.tensor(rows)
        output.fill_(torch.nan)
        graph.replay()
        expected, counters = case.run(**asked)
        assert torch.equal(output, expected)
        assert int(counters.totals[4]) == sum(wanted != 0 for wanted in rows)
        everything, _ = case.run(max_dense_len=2**31 - 1)
        for row, wanted in enumerate(rows):
            if wanted == -math.inf:
                torch.testing.assert_close(output[row], everything[row], rtol=0, atol=1e-2)


def case_run(case: Case, scratch: Scratch, output: torch.Tensor, **options: Any) -> None:
    decode(*case.records(output, **options), scratch)


def test_page_tails_are_kept_by_a_replayed_graph() -> None:
    case, _ = graph_case()
    expected = case.value_sum.clone()
    starts = torch.arange(9, dtype=torch.int32, device="cuda")
    lens = case.seq_lens.clone()
    arguments = TailStep(case.block_table, case.seq_lens, starts, 1), case.cache(), Layer(1.0)
    write_tails(*arguments)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        write_tails(*arguments)
    for length in range(1, 100):
        case.seq_lens.copy_(lens.clamp(max=length))
        blocks = case.block_table[:, (length - 1) // 16].long()[lens >= length]
        if length % 16 == 0:
            case.value_sum[blocks] = torch.nan
        graph.replay()
        torch.testing.assert_close(case.value_sum, expected, rtol=1e-5, atol=1e-4, equal_nan=True)


def test_offsets_beyond_32_bits() -> None:
    case, scratch = graph_case()
    expected, _ = case.run(scratch=scratch)
    num_blocks, num_kv_heads, block_size, content = case.kv_cache.shape
    page = padded_page_bytes(num_kv_heads * block_size * content * 2, num_kv_heads, content // 2) // 2
    many = 2**31 // page + num_blocks
    memory = torch.full((many * page,), torch.nan, dtype=torch.bfloat16, device="cuda")
    assert memory.numel() > 2**31
    cache = memory.as_strided((many, *case.kv_cache.shape[1:]), (page, *case.kv_cache.stride()[1:]))
    cache[-num_blocks:] = case.kv_cache
    value_sum = value_sum_view(cache)
    value_sum[-num_blocks:] = case.value_sum
    table = torch.where(case.block_table < num_blocks, case.block_table + (many - num_blocks), case.block_table)
    moved = replace(case, kv_cache=cache, value_sum=value_sum, block_table=table)
    output, _ = moved.run(scratch=scratch)
    assert torch.equal(output, expected)
    value_sum[-num_blocks:] = torch.nan
    moved.write_tails([0] * 8, case.seq_lens.tolist())
    torch.testing.assert_close(value_sum[-num_blocks:], case.value_sum, rtol=1e-4, atol=1e-2, equal_nan=True)


_NARROW: dict[str, Any] = {"max_registers": 168, "programs_per_sm": 3, "walk_tile": 64}
SHADOW_CONFIGS = [
    SCANNING,
    replace(SCANNING, chunk_tiles=4, list_depth=6, **_NARROW),
    replace(SCANNING, tile=128, **_NARROW),
    ShadowConfig(),
]


@pytest.mark.parametrize("case", range(len(SHADOW_CONFIGS)))
@pytest.mark.parametrize("kind", range(0, NUM_KINDS, 2))
def test_random_shapes_with_shadow_keys(kind: int, case: int) -> None:
    shape = random_shape(kind, case)
    shape = replace(shape, num_channels=[32, 64][kind // 2 % 2] if shape.head_size < 256 else 128)
    shadow = make_shadow_case(shape)
    config = SHADOW_CONFIGS[case]
    programs = config.num_programs(shape.num_kv_heads, num_multiprocessors(torch.device("cuda")))
    is_few = sum(shape.lens) < config.few_tokens * programs
    num_decoded = sum(length > 0 for length in shape.lens)
    shadow.reads_all_keys = is_few or sum(shape.lens) < config.short_length * num_decoded
    check_shadow(shadow, *shadow.run(config))


@pytest.mark.parametrize("config", [SCANNING, ShadowConfig(few_tokens=64)], ids=["always", "or not"])
def test_a_replayed_graph_with_shadow_keys_equals_the_eager_call(config: ShadowConfig) -> None:
    shape = replace(graph_case()[0].shape, num_channels=64)
    shadow = make_shadow_case(shape)
    case = shadow.case
    # the shorter lengths below end in other pages
    shadow.write_tails([0] * 8, list(shape.lens))
    scratch = shadow.scratch(config)
    output = torch.full_like(case.query, torch.nan)
    lens = case.seq_lens.clone()
    case.seq_lens.fill_(1)
    records = shadow.records(output)
    decode_shadow(*records, scratch)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode_shadow(*records, scratch)
    few_tokens = config.few_tokens * config.num_programs(2, num_multiprocessors(torch.device("cuda")))
    for divisor in (1, 2, 3, 7, 40):
        case.seq_lens.copy_(lens // divisor)
        case.seq_lens[-2:] = 0  # padding
        case.query.normal_()
        output.fill_(torch.nan)
        graph.replay()
        expected, _, keys_read = shadow.run(config, scratch=scratch)
        assert torch.equal(output, expected)
        assert not output[-2:].any()
        num_tokens = int(case.seq_lens.sum())
        is_short = num_tokens < config.short_length * int((case.seq_lens > 0).sum())
        assert (keys_read.tolist() == [num_tokens] * 2) == (num_tokens < few_tokens or is_short)


def test_a_replayed_graph_with_shadow_keys_follows_offsets_that_move() -> None:
    shadow = make_shadow_case(replace(graph_case()[0].shape, num_channels=64))
    case = shadow.case
    scratch = shadow.scratch()
    output = torch.full_like(case.query, torch.nan)
    offset = torch.zeros(10, device="cuda")
    records = shadow.records(output, threshold_offset=offset)
    decode_shadow(*records, scratch)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode_shadow(*records, scratch)
    for turn in range(4):
        rows = [OFFSETS[(row + turn) % 3] for row in range(8)]
        offset[:8] = torch.tensor(rows)
        output.fill_(torch.nan)
        graph.replay()
        expected, counters, _ = shadow.run(scratch=scratch, threshold_offset=offset)
        assert torch.equal(output, expected)
        assert int(counters.totals[4]) == sum(wanted != 0 for wanted in rows)
        everything, _, _ = shadow.run(max_dense_len=2**31 - 1)
        for row, wanted in enumerate(rows):
            if wanted == -math.inf:
                torch.testing.assert_close(output[row], everything[row], rtol=0, atol=1e-2)


def test_all_programs_of_a_row_compare_with_the_same_bits() -> None:
    # many programs a sequence, and one: the survivors are those of the same thresholds
    case, _ = graph_case()
    counted = [case.run(config)[1].value_rows_read for config in (LaunchConfig(), LaunchConfig(programs_per_sm=1))]
    assert torch.equal(*counted)


def test_shadow_keys_beyond_32_bits() -> None:
    shape = Shape((5000, 777), num_heads=8, head_size=128, dtype=torch.bfloat16, num_channels=64)
    shadow = make_shadow_case(shape)
    expected, _, keys_read = shadow.run()
    case = shadow.case
    num_blocks, num_kv_heads, block_size, content = case.kv_cache.shape
    page = case.kv_cache.stride(0)
    many = 2**31 // page + num_blocks
    memory = torch.zeros(many * page, dtype=torch.bfloat16, device="cuda")
    cache = memory.as_strided((many, *case.kv_cache.shape[1:]), (page, *case.kv_cache.stride()[1:]))
    old = torch.as_strided(case.kv_cache, (num_blocks * page,), (1,))
    memory[-num_blocks * page :] = old
    table = torch.where(case.block_table < num_blocks, case.block_table + (many - num_blocks), case.block_table)
    moved = replace(
        shadow,
        case=replace(case, kv_cache=cache, value_sum=value_sum_view(cache), block_table=table),
        codes=codes_view(cache, 32),
    )
    output, _, moved_keys = moved.run()
    assert torch.equal(output, expected)
    assert moved_keys.tolist() == keys_read.tolist()


@pytest.mark.parametrize(
    ("group", "head_size"),
    [
        (group, head_size)
        for group in (1, 3, 4, 7, 8, 16)
        for head_size in TIER_HEAD_SIZES
        if not gpus_lack(head_size, group, 1, has_copies=True)
    ],
)
@pytest.mark.parametrize("in_cuda", [False, True], ids=["Triton", "CUDA"])
def test_long_sequences_by_tiers(in_cuda: bool, group: int, head_size: int) -> None:
    shape = Shape((40_000, 3_001, 16, 0, 9_000), 2 * group, 2, head_size, dtype=torch.bfloat16)
    tiers = make_tier_case(shape, in_cuda=in_cuda)
    check_tiers(tiers, *tiers.run())


@pytest.mark.parametrize("query_dtype", [None, torch.float8_e4m3fn], ids=["16-bit queries", "float8 queries"])
@pytest.mark.parametrize(("group", "head_size"), [(4, 64), (1, 128), (4, 128), (7, 128), (16, 128), (8, 256)])
def test_long_sequences_by_tiers_in_float8(group: int, head_size: int, query_dtype: torch.dtype | None) -> None:
    shape = Shape(
        (40_000, 3_001, 16, 0, 9_000), 2 * group, 2, head_size, dtype=torch.bfloat16, kv_dtype=torch.float8_e4m3fn,
        query_dtype=query_dtype,
    )  # fmt: skip
    tiers = make_tier_case(shape)
    check_tiers(tiers, *tiers.run())


@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("in_cuda", [False, True], ids=["Triton", "CUDA"])
@pytest.mark.parametrize(
    "lens", [(100, 300, 16, 700, 1_500, 2_900), (2_000,), (900,) * 24, (40_000, 3_001, 16, 0), (8_000, 30) * 8]
)
def test_steps_as_they_are_served_by_tiers(lens: tuple[int, ...], in_cuda: bool, group: int) -> None:
    tiers = make_tier_case(Shape(lens, 3 * group, 3, 64, dtype=torch.bfloat16), in_cuda=in_cuda)
    config = replace(tier_config(tiers.loader), dense_length=0, dense_tokens=0)
    num_programs = config.num_programs(3, num_multiprocessors(torch.device("cuda", torch.cuda.current_device())))
    present = [length for length in lens if length]
    mean = sum(present) // len(present)
    reads_all_keys = sum(present) < config.few_tokens * num_programs or mean < config.short_length
    check_tiers(replace(tiers, reads_all_keys=reads_all_keys), *tiers.run(config))


def test_more_heavy_keys_than_lists_have_room_for() -> None:
    shape = Shape((40_000, 9_000), 4, 1, 128, dtype=torch.bfloat16)
    tiers = make_tier_case(shape, heavy=0.0005, in_cuda=True)
    output, counters = tiers.run(replace(TIERS_SCANNING, tile=256, programs_per_sm=1, min_work=64))
    check_tiers(tiers, output, counters)
    assert int(counters.keys_read.min()) > 10_000


def test_both_kernels_of_tiers_read_the_same_keys() -> None:
    shape = Shape((40_000, 3_001, 9_000), 16, 4, 128, dtype=torch.bfloat16)
    read = [make_tier_case(shape, in_cuda=in_cuda).run()[1] for in_cuda in (False, True)]
    # but for queries' codes that lie between two, because one sums up rotated channels in another order
    for name in ("keys_read", "copies_read", "value_rows_read"):
        ours, theirs = getattr(read[1], name), getattr(read[0], name)
        assert bool(((ours - theirs).abs() <= 2 + 0.001 * theirs).all()), name


@pytest.mark.parametrize(
    ("in_cuda", "kv_dtype"),
    [(False, None), (True, None), (False, torch.float8_e4m3fn)],
    ids=["Triton", "CUDA", "Triton, float8"],
)
def test_a_replayed_graph_by_tiers_equals_the_eager_call(in_cuda: bool, kv_dtype: torch.dtype | None) -> None:
    shape = Shape((5_000, 300, 2_000), 8, 2, 128, dtype=torch.bfloat16, kv_dtype=kv_dtype)
    tiers = make_tier_case(shape, in_cuda=in_cuda)
    scratch = tiers.scratch()
    output = torch.empty_like(tiers.case.query)
    records = tiers.records(output)
    decode_by_tiers(*records, scratch)
    eager = output.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode_by_tiers(*records, scratch)
    output.zero_()
    for _ in range(3):
        graph.replay()
    assert torch.equal(output, eager)
