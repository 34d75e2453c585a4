"""The GPU backend's steps with copies of keys and values, with its kernels in Triton's interpreter or on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.backend.gpu_engine import BLOCK_SIZE, HEAD_SIZE, NUM_HEADS, NUM_KV_HEADS, SCALE, SCALES, Engine
from tests.kernels.decode_case import DEVICE, RUNS_HERE, WHY_NOT
from tests.kernels.tier_case import scaled
from vllm_toptheta.backend.gpu import FLOAT8, shadow_config
from vllm_toptheta.backend.plan import Plan
from vllm_toptheta.backend.request_choices import RequestChoices
from vllm_toptheta.kernels.codec import tier_bytes
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


class TierEngine(Engine):
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
        self.keys_read = 0
        self.codes = codes_view(self.kv_cache, tier_bytes(HEAD_SIZE))
        self.codes.fill_(0x7F)

    def reference(self, query: torch.Tensor, block_table: Any, lens: Any, starts: Any, threshold: Any) -> torch.Tensor:
        output = super().reference(query, block_table, lens, starts, threshold)
        for row, (length, start, end) in enumerate(
            zip(lens.tolist(), starts.tolist()[:-1], starts.tolist()[1:], strict=True)
        ):
            if end - start == 1 and bool(threshold[start].isfinite().all()):
                tokens = gather_sequence(self.scaled_cache(), block_table[row], length)
                key, value = (part.float().cpu() for part in tokens)
                scales = (SCALES["_k_scale"], SCALES["_v_scale"]) if self.float8 else (1.0, 1.0)
                keys, values = scaled(*self.copies(block_table[row], length), *scales)
                result = tiered_attention(
                    self.scaled(query[start:end]).float().cpu(), key, value, weight_floor=WEIGHT_FLOOR, heavy=HEAVY,
                    block_size=BLOCK_SIZE, softmax_scale=SCALE, keys=keys, values=values,
                )  # fmt: skip
                self.keys_read += int(result.exact[0, 0].sum())
                output[start] = result.output[0].to(query.device)
            elif end - start == 1:
                self.keys_read += length
        return output

    def copies(self, block_row: torch.Tensor, length: int) -> tuple[KeyCopies, ValueCopies]:
        """What the reference makes of a sequence as it is stored, scales left out."""
        stored = self.kv_cache.view(FLOAT8).float() if self.float8 else self.kv_cache
        key, value = (part.float().cpu() for part in gather_sequence(stored, block_row, length))
        return copy_keys(key, key_centre(key)), copy_values(value)

    def check_copies(self, row: int, length: int) -> None:
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
    assert engine.step([0, 1, 2], [300, 370, 33], [300, 370, 33]).max() < 3e-3
    assert engine.dense_rows == [703]
    engine.check_copies(1, 370)
    assert engine.step([0, 1, 2], [301, 371, 53], [1, 1, 20]).max() < 6e-3  # decoding sequences stand in front
    assert engine.dense_rows == [20]
    for step in range(1, 5):  # across the ends of pages: 304 and 56
        lens = [301 + step, 371 + step, 53 + step]
        assert engine.step([0, 1, 2], lens, [1, 1, 1]).max() < 6e-3, lens
        assert engine.dense_rows == []
    engine.check_copies(0, 305)
    engine.check_copies(1, 375)
    counters = engine.impl.layer_plan.counters.buffers
    decoded, dense, cached, steps, asked = counters.totals.tolist()
    assert (decoded, dense, steps, asked) == (2 + 3 * 4, 4, 1 + 4, 0)
    assert abs(int(counters.keys_read[0]) - engine.keys_read) <= 4
    assert 0 < int(counters.value_rows_read[0]) <= int(counters.keys_read[0]) < cached
    assert 0 < int(counters.copies_read[0]) < cached
    assert float(counters.lost_mass.min()) > 0
    assert engine.impl.layer_plan.guard is not None  # what is lost is measured


def test_the_scratch_is_that_of_tiers_and_reserved_for_the_largest_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TierEngine(monkeypatch, [60] * 3)
    reserved = engine.reserved_bytes
    scratch = engine.impl._scratch(3, 2, torch.device(DEVICE))
    assert isinstance(scratch, TierScratch)
    loader = engine.impl.loaders.tiers
    assert scratch.config == shadow_config(engine.impl.plan, loader) == tier_config(loader).scanning
    assert engine.reserved_bytes == reserved > 0
