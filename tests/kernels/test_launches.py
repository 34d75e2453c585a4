"""Among how many programs a step is split, and for how many sequences a scratch has room."""

from __future__ import annotations

import pytest
import torch

from vllm_toptheta.kernels.contract import DecodeStep, Layer, LayerCache, LayerCall
from vllm_toptheta.kernels.gpu.balance import MOST_OF_A_HEAD
from vllm_toptheta.kernels.gpu.cuda.tier_split import TierLoader, split_sizes
from vllm_toptheta.kernels.gpu.cuda.value_split import ValueLoader, ValueSizes
from vllm_toptheta.kernels.gpu.launches import shadow_launches, values_launches
from vllm_toptheta.kernels.gpu.scratch import Scratch, ShadowScratch, Sizes, TierScratch
from vllm_toptheta.kernels.gpu.tuning import LaunchConfig, ShadowConfig

HEADS, KV_HEADS, HEAD_SIZE = 4, 2, 64
SIZES = Sizes(3, HEADS, KV_HEADS, HEAD_SIZE, code_bytes=16)
WHERE = {"kv_dtype": torch.float16, "device": "cpu"}


def call_of(num_seqs: int, block_size: int = 16) -> LayerCall:
    query = torch.empty(num_seqs, HEADS, HEAD_SIZE)
    cache = LayerCache(torch.empty(1, KV_HEADS, block_size, 2 * HEAD_SIZE))
    return LayerCall(query, torch.empty_like(query), cache, Layer(1.0))


def step_of(num_seqs: int) -> DecodeStep:
    return DecodeStep(torch.zeros(num_seqs, 1, dtype=torch.int32), torch.ones(num_seqs, dtype=torch.int32))


@pytest.mark.parametrize("kind", [Scratch, ShadowScratch, TierScratch])
def test_a_scratch_for_fewer_sequences_is_refused(kind: type[Scratch] | type[ShadowScratch]) -> None:
    scratch = kind.allocate(SIZES, **WHERE)

    def find(num_seqs: int) -> None:
        if isinstance(scratch, Scratch):
            values_launches(step_of(num_seqs), call_of(num_seqs), scratch)
        else:
            shadow_launches(call_of(num_seqs), scratch)

    find(3)
    with pytest.raises(ValueError, match="scratch: made for fewer than 4 sequences"):
        find(4)


@pytest.mark.parametrize(("num_heads", "is_taken"), [(4, True), (8, False)])
def test_programs_of_heads_are_those_of_kernels_that_have_as_many(num_heads: int, is_taken: bool) -> None:
    # 8 and 16 queries of a kv head, which leave room for as many programs as 2 do, and for fewer than 4 do
    step = step_of(3)._replace(query_start_loc=torch.arange(4, dtype=torch.int32) * 4, max_query_len=4)
    sizes = Sizes(3, num_heads, KV_HEADS, HEAD_SIZE, max_query_len=4)
    loader = ValueLoader(
        lambda *_: pytest.fail("nothing is launched"), ValueSizes.of(HEAD_SIZE, num_heads // KV_HEADS * 4)
    )
    scratch = Scratch.allocate(sizes, loader=loader, **WHERE)
    call = call_of(12)
    query = torch.empty(12, num_heads, HEAD_SIZE)
    layer = call.layer._replace(head_programs=torch.ones(KV_HEADS, dtype=torch.int32))
    launches = values_launches(step, call._replace(query=query, layer=layer), scratch)
    assert (launches.head_programs is not None) == is_taken


@pytest.mark.parametrize("has_loader", [False, True])
def test_programs_of_heads_are_those_of_copies_in_cuda(has_loader: bool) -> None:
    loader = TierLoader(lambda *_: pytest.fail("nothing is launched"), split_sizes(HEAD_SIZE, HEADS // KV_HEADS))
    scratch = TierScratch.allocate(SIZES, loader=loader if has_loader else None, **WHERE)
    call = call_of(3)
    layer = call.layer._replace(head_programs=torch.ones(KV_HEADS, dtype=torch.int32))
    launches, _ = shadow_launches(call._replace(layer=layer), scratch)
    assert (launches.head_programs is not None) == has_loader
    # room for a head that has as many as it may have
    most = (MOST_OF_A_HEAD * launches.num_programs + 3) * KV_HEADS
    assert (len(scratch.partial_stats) >= most) == has_loader


def test_a_scratch_for_fewer_programs_is_refused() -> None:
    scratch = TierScratch.allocate(SIZES, **WHERE)
    more = LaunchConfig(programs_per_sm=scratch.config.programs_per_sm + 8)
    with pytest.raises(ValueError, match="scratch: made for fewer"):
        shadow_launches(call_of(3), scratch._replace(values_config=more))


def test_either_way_through_a_step_has_programs_and_shares_of_its_own() -> None:
    config = ShadowConfig(
        tile=256, min_work=2, dense_work=8, few_tokens=100, short_length=70, piece_tokens=512, programs_per_sm=3,
        merge_warps=2,
    )  # fmt: skip
    scratch = ShadowScratch.allocate(SIZES, **WHERE, config=config)
    scratch = scratch._replace(values_config=LaunchConfig(tile=64, min_work=4, programs_per_sm=2))
    # two multiprocessors, and two kv heads
    launches, choice = shadow_launches(call_of(3, block_size=32), scratch)
    assert (launches.num_programs, choice.num_programs) == (3, 2)
    assert (choice.few_tokens, choice.short_length, launches.merge_warps) == (300, 70, 2)
    assert not launches.is_early
    # in units of a page
    assert (launches.schedule.UNIT, launches.schedule.MIN_WORK, launches.schedule.PIECE_WORK) == (32, 16, 16)
    assert (choice.schedule.UNIT, choice.schedule.MIN_WORK, choice.schedule.PIECE_WORK) == (32, 8, 0)
    assert (launches.schedule.DENSE_WORK, choice.schedule.DENSE_WORK) == (8, 2)
    # pages that fill the tiles of one of both
    assert shadow_launches(call_of(3, block_size=128), scratch)[1].schedule.UNIT == 128
    of_values = Scratch.allocate(SIZES, **WHERE)
    assert values_launches(step_of(3), call_of(3, block_size=128), of_values).schedule.UNIT == 16
