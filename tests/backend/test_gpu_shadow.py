"""The GPU backend's steps in mode `shadow`, with its kernels in Triton's interpreter or on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.backend.gpu_engine import (
    BLOCK_SIZE,
    HEAD_SIZE,
    NUM_HEADS,
    NUM_KV_HEADS,
    SCALE,
    ShadowModeEngine,
    asking,
)
from tests.kernels.decode_case import DEVICE, MARKS
from tests.shadow_store import make_shadow_store, projection_of
from vllm_toptheta.backend.plan import Plan
from vllm_toptheta.backend.request_choices import RequestChoices
from vllm_toptheta.kernels.gpu.scratch import ShadowScratch
from vllm_toptheta.kernels.pages import codes_view
from vllm_toptheta.limits import NUM_FIRST_ANCHORS, NUM_LAST_ANCHORS
from vllm_toptheta.reference import (
    Compensation,
    candidate_keys,
    encode_keys,
    gather_sequence,
    pack_codes,
    quantize_query,
    shadow_scores,
    top_theta_attention,
)
from vllm_toptheta.selection import ServedThresholds
from vllm_toptheta.settings import Settings
from vllm_toptheta.store import ThresholdStore

pytestmark = MARKS

LAYER, CODE_BYTES = 1, 16
WEIGHT_FLOOR = 6.0


class ShadowEngine(ShadowModeEngine):
    """The engine in mode `shadow`; what its reference expects of decoding rows has candidates."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        folder: Path,
        max_lens: list[int],
        *,
        float8: bool = False,
        **options: Any,
    ) -> None:
        self.store: ThresholdStore = make_shadow_store(
            folder / "store",
            weight_floor=WEIGHT_FLOOR,
            num_layers=2,
            num_heads=NUM_HEADS,
            num_kv_heads=NUM_KV_HEADS,
            head_size=HEAD_SIZE,
            max_length=4096,
        )
        refusal = options.pop("refusal", None)
        self.settings = Settings.load({"mode": "shadow", "always_shadow": True, **options})
        thresholds = ServedThresholds.relative(WEIGHT_FLOOR)
        plan = Plan(
            settings=self.settings,
            thresholds=thresholds,
            model_id="acme/tiny",
            origin="a test",
            dense_layers=frozenset({0}),
            architecture=self.store.manifest.architecture,
            choices=RequestChoices(thresholds, refusal=refusal),
            shadow=self.store.shadow,
        )
        super().__init__(monkeypatch, max_lens, plan=plan, float8=float8)
        codes_view(self.kv_cache, CODE_BYTES).fill_(0xA5)

    def decoded(
        self, query: torch.Tensor, block_row: torch.Tensor, length: int, threshold: torch.Tensor
    ) -> torch.Tensor:
        shadow = self.store.shadow
        key, value = (part.float().cpu() for part in gather_sequence(self.scaled_cache(), block_row, length))
        query = self.scaled(query)
        projection = projection_of(shadow, LAYER)
        scores = shadow_scores(
            quantize_query(query.float().cpu(), projection, softmax_scale=SCALE), encode_keys(key, projection)
        )
        candidates = candidate_keys(
            scores[0],
            threshold - torch.tensor(shadow.margin[LAYER]),
            num_kv_heads=NUM_KV_HEADS,
            num_sink=NUM_FIRST_ANCHORS,
            num_recent=NUM_LAST_ANCHORS,
            block_size=BLOCK_SIZE,
        )
        self.keys_read += int(candidates[0].sum())
        scale = torch.tensor(shadow.exp_threshold_scale(length)[LAYER].copy())
        compensation = self.settings.compensation
        result = top_theta_attention(
            query.float().cpu(),
            key,
            value,
            threshold=threshold[None],
            target_k=0,
            softmax_scale=SCALE,
            candidates=candidates.repeat_interleave(NUM_HEADS // NUM_KV_HEADS, dim=0)[None],
            compensation=Compensation(
                "none" if compensation == "none" else "candidates",
                compensation == "sdc+vmc",
                exp_threshold_scale=scale,
            ),
        )
        return result.output[0].to(query.device)

    def check_tails(self, row: int, length: int) -> None:
        """The codes of a sequence's full pages are the reference's, and its open page has none."""
        num_full = length // BLOCK_SIZE
        key, _ = gather_sequence(self.scaled_cache(), self.block_table[row], num_full * BLOCK_SIZE)
        expected = pack_codes(encode_keys(key.float().cpu(), projection_of(self.store.shadow, LAYER)))
        codes = codes_view(self.kv_cache, CODE_BYTES)
        stored = codes[self.block_table[row, :num_full].long()].transpose(1, 2).flatten(0, 1)
        assert float((stored.cpu() != expected).float().mean()) < 1e-3


@pytest.mark.parametrize("float8", [False, True])
def test_prefill_mixed_and_decode_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, float8: bool) -> None:
    engine = ShadowEngine(monkeypatch, tmp_path, [310, 390, 90], float8=float8)
    counters = engine.run_mixed_steps(3e-3)
    assert int(counters.keys_read[0]) == engine.keys_read
    assert int(counters.value_rows_read[0]) < engine.keys_read


@pytest.mark.parametrize("compensation", ["sdc", "none"])
def test_other_compensations(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compensation: str) -> None:
    engine = ShadowEngine(monkeypatch, tmp_path, [330], compensation=compensation)
    engine.step([0], [320], [320])
    for length in (321, 322):
        assert engine.step([0], [length], [1]).max() < 5e-3


def test_requests_may_ask_for_dense_decoding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engine = ShadowEngine(monkeypatch, tmp_path, [320, 320])
    engine.impl.requests.step(asking(plain=None, dense="dense"), {"plain", "dense"}, ["plain", "dense"])
    engine.step([0, 1], [300, 303], [300, 303])
    assert engine.step([0, 1], [301, 304], [1, 1], [0.0, -torch.inf]).max() < 3e-3
    engine.check_tails(1, 304)  # also a dense sequence leaves them behind, for whoever shares the page
    # another order
    engine.impl.requests.step([], {"plain", "dense"}, ["dense", "plain"])
    assert engine.step([1, 0], [305, 302], [1, 1], [-torch.inf, 0.0]).max() < 3e-3
    counters = engine.impl.layer_plan.counters.buffers
    assert counters.totals.tolist() == [4, 0, 301 + 304 + 305 + 302, 2, 2]
    assert int(counters.keys_read[0]) == engine.keys_read


def test_where_requests_cannot_choose_no_offset_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engine = ShadowEngine(monkeypatch, tmp_path, [310], refusal="switched off")
    engine.impl.requests.offsets.fill_(torch.nan)
    engine.step([0], [300], [300])
    assert engine.step([0], [301], [1]).max() < 3e-3
    assert engine.impl.layer_plan.counters.buffers.totals.tolist() == [1, 0, 301, 1, 0]


@pytest.mark.parametrize("is_prompt", [True, False])
def test_a_page_that_another_sequence_fills_in_the_same_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_prompt: bool
) -> None:
    engine = ShadowEngine(monkeypatch, tmp_path, [208, 224])
    new = 20 if is_prompt else 1
    engine.step([0], [192 - new], [192 - new])
    # the second sequence stands on the pages that the first one fills; its own tokens follow them
    engine.block_table[1, :12] = engine.block_table[0, :12]
    blocks = engine.block_table[1, 12:].long()
    engine.kv_cache[blocks] = torch.randn(len(blocks), *engine.kv_cache.shape[1:], generator=engine.generator).to(
        engine.kv_cache
    )
    filled = codes_view(engine.kv_cache, CODE_BYTES)[engine.block_table[0, 11].long()]
    assert bool((filled == 0xA5).all())
    engine.keys_read = 0
    if is_prompt:
        assert engine.step([1, 0], [195, 192], [1, new]).max() < 3e-3
    else:
        assert engine.step([0, 1], [192, 195], [1, 1]).max() < 3e-3
    assert int(engine.impl.layer_plan.counters.buffers.keys_read[0]) == engine.keys_read
    engine.check_tails(0, 192)


def test_rejected_drafts_leave_no_trace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engine = ShadowEngine(monkeypatch, tmp_path, [240])
    engine.step([0], [204], [204])
    # four drafts are attended to densely, over the end of a page at 208; then all of them are rejected
    assert engine.step([0], [209], [5]).max() < 3e-3
    assert engine.dense_rows == [5]
    engine.check_tails(0, 209)
    for length in range(206, 211):  # 208 is filled once more, with another token
        assert engine.step([0], [length], [1]).max() < 3e-3
    engine.check_tails(0, 210)


def test_warm_up_is_forgotten(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engine = ShadowEngine(monkeypatch, tmp_path, [60])
    engine.step([0], [40], [40])
    engine.step([0], [41], [1])
    counters = engine.impl.layer_plan.counters.buffers
    assert int(counters.keys_read.min()) > 0
    engine.impl.layer_plan.counters.zero_()
    assert not counters.keys_read.any()


def test_the_scratch_is_that_of_the_mode_and_reserved_for_the_largest_batch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine = ShadowEngine(monkeypatch, tmp_path, [60] * 3)
    reserved = engine.reserved_bytes
    scratch = engine.impl._scratch(3, 2, torch.device(DEVICE))
    assert isinstance(scratch, ShadowScratch)
    assert scratch.query_codes.shape == (3, NUM_HEADS, 2 * CODE_BYTES)
    assert scratch.config.scanning == scratch.config  # as the option `always_shadow` says
    assert engine.reserved_bytes == reserved > 0
    engine.impl._scratch(4, 2, torch.device(DEVICE))
    assert engine.reserved_bytes > reserved
