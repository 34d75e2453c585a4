"""The GPU backend's steps with copies of keys and values, with its kernels in Triton's interpreter or on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.backend.gpu_engine import BLOCK_SIZE, HEAD_SIZE, NUM_HEADS, NUM_KV_HEADS, SCALE, SCALES, ShadowModeEngine
from tests.kernels.decode_case import DEVICE, RUNS_HERE, WHY_NOT, Shape
from tests.kernels.tier_case import cuda_loader, scaled
from vllm_toptheta.backend import program_balance
from vllm_toptheta.backend.gpu import FLOAT8
from vllm_toptheta.backend.kernel_choice import shadow_config
from vllm_toptheta.backend.plan import Plan
from vllm_toptheta.backend.request_choices import RequestChoices
from vllm_toptheta.kernels.codec import tier_bytes
from vllm_toptheta.kernels.gpu import balance
from vllm_toptheta.kernels.gpu.cuda import tier_split
from vllm_toptheta.kernels.gpu.scratch import TierScratch
from vllm_toptheta.kernels.gpu.tuning import tier_config
from vllm_toptheta.kernels.pages import CopyViews, codes_view
from vllm_toptheta.reference import (
    KeyCopies,
    ValueCopies,
    copy_keys,
    copy_values,
    gather_sequence,
    key_centre,
    tiered_attention,
)
from vllm_toptheta.selection import ServedThresholds
from vllm_toptheta.settings import Settings
from vllm_toptheta.store import Architecture

pytestmark = pytest.mark.skipif(not RUNS_HERE, reason=WHY_NOT)

WEIGHT_FLOOR, HEAVY = 2.0, 0.02


class TierEngine(ShadowModeEngine):
    """The engine in mode `shadow` without a store; its reference decodes rows by tiers."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, max_lens: list[int], *, float8: bool = False, **options: Any
    ) -> None:
        named = {"mode": "shadow", "shadow_values": True, "heavy": HEAVY, "always_shadow": True}
        settings = Settings.load({**named, **options})
        thresholds = ServedThresholds.relative(WEIGHT_FLOOR)
        plan = Plan(
            settings=settings,
            thresholds=thresholds,
            model_id=None,
            origin="a test",
            dense_layers=frozenset({0}),
            architecture=Architecture(
                num_layers=2, num_heads=NUM_HEADS, num_kv_heads=NUM_KV_HEADS, head_size=HEAD_SIZE, rope={}
            ),
            choices=RequestChoices(thresholds, refusal=None),
            heavy=HEAVY,
        )
        super().__init__(monkeypatch, max_lens, plan=plan, float8=float8)
        self.codes = codes_view(self.kv_cache, tier_bytes(HEAD_SIZE))
        self.codes.fill_(0x7F)

    def decoded(
        self, query: torch.Tensor, block_row: torch.Tensor, length: int, threshold: torch.Tensor
    ) -> torch.Tensor:
        key, value = (part.float().cpu() for part in gather_sequence(self.scaled_cache(), block_row, length))
        scales = (SCALES["_k_scale"], SCALES["_v_scale"]) if self.float8 else (1.0, 1.0)
        keys, values = scaled(*self.copies(block_row, length), *scales)
        result = tiered_attention(
            self.scaled(query).float().cpu(), key, value, weight_floor=WEIGHT_FLOOR, heavy=HEAVY,
            block_size=BLOCK_SIZE, softmax_scale=SCALE, keys=keys, values=values,
        )  # fmt: skip
        self.keys_read += int(result.exact[0, 0].sum())
        return result.output[0].to(query.device)

    def copies(self, block_row: torch.Tensor, length: int) -> tuple[KeyCopies, ValueCopies]:
        """What the reference makes of a sequence as it is stored, scales left out."""
        stored = self.kv_cache.view(FLOAT8).float() if self.float8 else self.kv_cache
        key, value = (part.float().cpu() for part in gather_sequence(stored, block_row, length))
        return copy_keys(key, key_centre(key)), copy_values(value)

    def check_tails(self, row: int, length: int) -> None:
        """The copies of a sequence's full pages are the reference's."""
        num_full = length // BLOCK_SIZE
        views = CopyViews.of(self.codes, HEAD_SIZE)
        blocks = self.block_table[row, :num_full].long()
        keys, values = self.copies(self.block_table[row], num_full * BLOCK_SIZE)
        for view, expected in ((views.key_step, keys.step), (views.value_step, values.step)):
            stored = view[blocks].transpose(1, 2).flatten(0, 1).cpu()
            torch.testing.assert_close(stored, expected, rtol=2e-3, atol=0)
        lower, upper = keys.codes.chunk(2, dim=-1)
        stored = views.key_codes[blocks].transpose(1, 2).flatten(0, 1).cpu()
        assert float((stored != lower | upper << 4).float().mean()) < 2e-3


@pytest.mark.parametrize("float8", [False, True])
def test_prefill_mixed_and_decode_steps(monkeypatch: pytest.MonkeyPatch, float8: bool) -> None:
    engine = TierEngine(monkeypatch, [310, 390, 90], float8=float8)
    # float8 is read by the kernels in Triton, and on CPUs there are no others
    assert engine.impl.loaders.tiers is None or not float8
    counters = engine.run_mixed_steps(6e-3)
    assert abs(int(counters.keys_read[0]) - engine.keys_read) <= 4
    assert counters.copies_read is not None
    assert 0 < int(counters.copies_read[0]) < int(counters.totals[2])
    assert engine.impl.layer_plan.guard is not None  # what is lost is measured


def test_heads_that_read_more_get_more_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernel in CUDA C++, whose outputs are right before and after."""
    loader = cuda_loader(Shape((1,), NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE))
    monkeypatch.setattr(tier_split, "find_loader", lambda *_: loader)
    monkeypatch.setattr(program_balance, "WINDOW_STEPS", 2)
    monkeypatch.setattr(program_balance, "MIN_ROWS", 1)
    # anchors are most of so short a sequence, and read exactly for every head
    monkeypatch.setattr(balance, "HEAVY_WORK", 0.0)
    engine = TierEngine(monkeypatch, [400])
    engine.step([0], [380], [380])
    programs = engine.impl.layer.head_programs
    first, second = programs.tolist()
    assert first == second
    counters = engine.impl.layer_plan.counters.buffers
    for length in range(381, 389):
        assert engine.step([0], [length], [1]).max() < 6e-3
        counters.copies_read[0] += 4 * length  # more than both heads really have in common
    many, few = programs.tolist()
    assert many > first > few
    assert many + few == first + second


def test_the_scratch_is_that_of_tiers_and_reserved_for_the_largest_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TierEngine(monkeypatch, [60] * 3)
    reserved = engine.reserved_bytes
    scratch = engine.impl._scratch(3, 2, torch.device(DEVICE))
    assert isinstance(scratch, TierScratch)
    loader = engine.impl.loaders.tiers
    assert scratch.config == shadow_config(engine.impl.plan, loader) == tier_config(loader).scanning
    assert engine.reserved_bytes == reserved > 0
