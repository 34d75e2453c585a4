"""Several new tokens of a sequence, as drafts are verified: each as if it were the last, keys and values read once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.kernels import decode_case
from tests.kernels.decode_case import (
    DEVICE,
    INTERPRETED,
    RUNS_HERE,
    WHY_NOT,
    Shape,
    check_closed_pages,
    cuda_loader,
)
from tests.kernels.verified_case import Verified
from vllm_toptheta.kernels.gpu.tuning import LaunchConfig
from vllm_toptheta.kernels.gpu.values import decode
from vllm_toptheta.limits import MAX_QUERY_LEN, NUM_ANCHORS

pytestmark = [
    pytest.mark.skipif(not RUNS_HERE, reason=WHY_NOT),
    # of a key that survives, which is selected away
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),
]


@pytest.fixture(params=["Triton", "CUDA"], autouse=True)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which kernel reads keys and values."""
    if request.param == "CUDA":
        monkeypatch.setattr(decode_case, "loader_of", cuda_loader)
    return request.param


# new tokens begin and end on pages, fill them, and stand in front of a page's end
LENS, QUERY_LENS = (18, 0, 64, 130, 333, 81, 97, 160), (4, 1, 4, 4, 3, 4, 2, 1)
STEPS = {
    "a draft": (Shape(LENS), (2, 1, 2, 2, 1, 2, 2, 1)),
    "three drafts": (Shape(LENS), QUERY_LENS),
    "seven drafts, one kv head": (Shape((40, 168, 99), num_kv_heads=1, num_heads=2), (8, 8, 3)),
    "padding with tokens": (Shape((40, 0, 0)), (4, 4, 4)),
    "gqa 8": (Shape(LENS, num_heads=8, num_kv_heads=1), tuple(min(number, 2) for number in QUERY_LENS)),
    "gqa 8, three drafts": (Shape((100, 18, 64), num_heads=8, num_kv_heads=1), (4, 2, 4)),
    "head size 80, block 32, HND": (Shape(LENS, head_size=80, block_size=32, layout="HND"), QUERY_LENS),
    "head size 96": (Shape((64, 130, 49), head_size=96, num_kv_heads=1, num_heads=2), (4, 4, 1)),
    "head size 256": (Shape((64, 130, 49), head_size=256, num_kv_heads=1, num_heads=2), (4, 4, 1)),
    "block 128": (Shape((130, 257, 384), block_size=128), (4, 2, 4)),
    "soft cap, curve": (Shape(LENS, soft_cap=5.0, degree=2), QUERY_LENS),
    "relative": (Shape((333, 151, 146, 145, 400), max_dense_len=NUM_ANCHORS, slope=1.0), (4, 4, 1, 4, 2)),
    "relative, sinks": (Shape((333, 160), max_dense_len=NUM_ANCHORS, slope=1.0, has_sinks=True), (4, 2)),
    "short sequences kept": (Shape(LENS, max_dense_len=130), QUERY_LENS),
    "everything kept": (Shape(LENS, max_dense_len=1000), QUERY_LENS),
    "survivors only in Z": (Shape(LENS, exact=False), QUERY_LENS),
    "no value mean": (Shape(LENS, value_mean=False), QUERY_LENS),
    "no value mean, kept": (Shape(LENS, value_mean=False, max_dense_len=130), QUERY_LENS),
    "float8": (Shape(LENS, kv_dtype=torch.float8_e4m3fn, query_dtype=torch.float8_e4m3fn), QUERY_LENS),
}
# few programs, so that sequences are split in the middle and programs cross from one to the next
FEW = LaunchConfig(programs_per_sm=1, min_work=1)


def _in_cuda(shape: Shape, query_lens: tuple[int, ...]) -> bool:
    return cuda_loader(replace(shape, num_heads=shape.num_heads * max(query_lens))) is not None


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        (kernel, name)
        for kernel in ("Triton", "CUDA")
        for name, step in STEPS.items()
        if kernel == "Triton" or _in_cuda(*step)
    ],
    indirect=["kernel"],
)
def test_each_new_token_is_as_if_it_were_the_last(name: str) -> None:
    verified = Verified.make(*STEPS[name])
    verified.check(*verified.run(FEW if INTERPRETED else None))


@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter multiplies the bits of bfloat16 as integers")
@pytest.mark.parametrize("query_lens", [(4, 4, 3, 1), (2, 2, 2, 2), (8, 1, 5, 8)])
def test_long_sequences_in_bfloat16(query_lens: tuple[int, ...]) -> None:
    lens = (9_000, 20_001, 4_097, 33_000)
    shape = Shape(lens, 32, 8, 128, dtype=torch.bfloat16, slope=1.0, max_dense_len=NUM_ANCHORS, target_k=128)
    verified = Verified.make(shape, query_lens)
    verified.check(*verified.run())


def test_a_sequence_keeps_every_key_if_its_first_new_token_does() -> None:
    shape = Shape((50, 51), max_dense_len=47)
    verified = Verified.make(shape, (4, 4))
    _, counters = verified.run()
    assert counters.totals[:2].tolist() == [8, 4]


@pytest.mark.parametrize("lens", [(49, 50), (50, 49), (17, 18)])
def test_a_page_that_drafts_of_another_sequence_fill_in_the_same_step(lens: tuple[int, int]) -> None:
    # the first sequence stands on a page that the second fills with its first tokens, and has gone on
    verified = Verified.make(Shape(lens), (1, 4))
    case, num_pages = verified.case, lens[1] // 16
    case.block_table[0, :num_pages] = case.block_table[1, :num_pages]
    case.set_threshold(1e6)
    output, _ = verified.run()
    for token, (row, seen) in enumerate([(0, lens[0]), *((1, lens[1] - before) for before in (3, 2, 1, 0))]):
        _, value = case.sequence(row)
        mean = value[:seen].mean(dim=0).repeat_interleave(2, dim=0)
        torch.testing.assert_close(output[token].float(), mean, rtol=0, atol=2e-3)
    check_closed_pages(case)


def test_small_steps_are_dense() -> None:
    verified = Verified.make(Shape((50, 51)), (4, 4))
    for tokens, dense in ((101, 0), (102, 8)):
        _, counters = verified.run(min_step_tokens=tokens)
        assert counters.totals[1] == dense


def test_levels_are_the_sequences() -> None:
    verified = Verified.make(Shape((150, 160, 170)), (4, 2, 3))
    offset = torch.tensor([0.0, -torch.inf, 1.0], device=DEVICE)
    _, counters = verified.run(threshold_offset=offset)
    assert counters.totals.tolist() == [9, 0, 480, 1, 5]
    assert counters.lost_mass_histogram.sum(dim=1).tolist() == [4] * 4


@pytest.mark.parametrize("kernel", ["CUDA"], indirect=True)
def test_heads_may_have_other_numbers_of_programs(kernel: str) -> None:
    verified = Verified.make(Shape((333, 600, 81)), (4, 4, 2))
    config = LaunchConfig(programs_per_sm=2, min_work=1)
    output, counters = verified.run(config, head_programs=torch.tensor([3, 1], dtype=torch.int32, device=DEVICE))
    verified.check(output, counters)
    even, _ = verified.run(config, head_programs=torch.tensor([2, 2], dtype=torch.int32, device=DEVICE))
    assert not torch.equal(output, even)  # other pieces, and so other roundings


def test_one_new_token_each_is_what_it_is_without_starts(kernel: str) -> None:
    verified = Verified.make(Shape((50, 333)), (1, 1))
    output, counters = verified.run()
    plain, counted = verified.case.run()
    assert torch.equal(output, plain)
    assert counters.totals.tolist() == counted.totals.tolist()


def test_scratch_is_for_a_number_of_new_tokens() -> None:
    verified = Verified.make(Shape((50, 51)), (4, 4))
    step, call = verified.case.records(torch.empty_like(verified.case.query))
    starts = torch.tensor([0, 4, 8], dtype=torch.int32, device=DEVICE)
    step = step._replace(query_start_loc=starts, max_query_len=4)
    with pytest.raises(ValueError, match="scratch: made for another number of new tokens"):
        decode(step, call, verified.case.scratch())
    with pytest.raises(ValueError, match=f"max_query_len: {MAX_QUERY_LEN + 1}, expected 1, or with query_start_loc"):
        decode(step._replace(max_query_len=MAX_QUERY_LEN + 1), call, verified.case.scratch())
    with pytest.raises(ValueError, match="max_query_len: 4, expected 1"):
        decode(step._replace(query_start_loc=None), call, verified.case.scratch())
    with pytest.raises(ValueError, match="query: 8 tokens, expected 3 for each of 2 sequences"):
        decode(step._replace(max_query_len=3), call, verified.case.scratch())
