"""Among how many programs a step is split, and for how many sequences a scratch has room."""

from __future__ import annotations

import pytest
import torch

from vllm_toptheta.kernels.contract import Layer, LayerCache, LayerCall
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


@pytest.mark.parametrize("kind", [Scratch, ShadowScratch, TierScratch])
def test_a_scratch_for_fewer_sequences_is_refused(kind: type[Scratch] | type[ShadowScratch]) -> None:
    scratch = kind.allocate(SIZES, **WHERE)
    find = values_launches if isinstance(scratch, Scratch) else shadow_launches
    find(call_of(3), scratch)
    with pytest.raises(ValueError, match="scratch: made for fewer than 4 sequences"):
        find(call_of(4), scratch)


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
    assert values_launches(call_of(3, block_size=128), Scratch.allocate(SIZES, **WHERE)).schedule.UNIT == 16
