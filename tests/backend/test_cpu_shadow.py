"""The CPU backend's layers in mode `shadow` against the reference, step by step; no engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig

from tests.backend.cpu_harness import HEAD_SIZE, NUM_HEADS, NUM_KV_HEADS, SCALE, Harness, Step, asking
from tests.shadow_store import projection_of
from vllm_toptheta import store
from vllm_toptheta.backend import cpu, plugin
from vllm_toptheta.backend.pages import more_memory
from vllm_toptheta.backend.plan import Plan
from vllm_toptheta.kernels.cpu.cache import split_cache
from vllm_toptheta.kernels.pages import codes_view
from vllm_toptheta.limits import NUM_ANCHORS, NUM_FIRST_ANCHORS, NUM_LAST_ANCHORS
from vllm_toptheta.reference import (
    Compensation,
    candidate_keys,
    causal_scores,
    dense_attention,
    encode_keys,
    gather_sequence,
    pack_codes,
    quantize_query,
    relative_threshold,
    shadow_scores,
    top_theta_attention,
)

LAYER = 2  # the harness' third layer, number 3 in the model
LAYER_INDEX = 3


class ShadowHarness:
    """The harness in mode `shadow`, and what the reference makes of its last layer."""

    def __init__(
        self,
        make_config: Callable[..., VllmConfig],
        folder: Path,
        max_lens: list[int],
        *,
        block_size: int = 16,
        dtype: str = "float32",
        **options: Any,
    ) -> None:
        options = {"mode": "shadow", "thresholds": str(folder), "dense_layers": [0], **options}
        self.harness = Harness(make_config(options, dtype=dtype, block_size=block_size), block_size, max_lens)
        self.store = store.load(folder)
        self.compensation = options.get("compensation", "sdc+vmc")
        for cache in self.harness.caches:
            codes_view(cache, 16).fill_(0xA5)

    @property
    def counters(self) -> Any:
        return self.harness.layers[LAYER].impl.layer_plan.counters.settled()

    def prefill(self, lens: list[int]) -> None:
        """Compute prompts."""
        self.harness.run(Step(lens, lens, [True] * len(lens)))

    def check(self, step: Step) -> list[int]:
        """Run a step and compare all of its decoding rows; keys of kv head 0 that the reference reads, by row."""
        query, outputs = self.harness.run(step)
        starts = torch.tensor([0, *step.query_lens]).cumsum(0).tolist()
        keys_read = []
        for row, (length, new, prefilling) in enumerate(
            zip(step.seq_lens, step.query_lens, step.is_prefilling, strict=True)
        ):
            if new != 1 or prefilling:
                continue
            at = slice(starts[row], starts[row + 1])
            expected, candidates = self.expected(query[at], row, length)
            rounding = (expected.to(query.dtype).float() - expected).abs().max()
            error = (outputs[LAYER][at].float() - expected).abs().max()
            assert error <= 2 * rounding + 2e-5, (row, float(error))
            keys_read.append(int(candidates[0].sum()))
        return keys_read

    def expected(self, query: torch.Tensor, row: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Output of one decoding token and its candidates, [num_kv_heads, length]."""
        harness, shadow = self.harness, self.store.shadow
        interleaved = torch.cat(split_cache(harness.caches[LAYER]), dim=-1)
        key, value = gather_sequence(interleaved, harness.block_table[row], length)
        is_dense = length <= NUM_ANCHORS
        scores = causal_scores(query.float(), key.float(), softmax_scale=SCALE)
        threshold = relative_threshold(scores, torch.tensor([length]), shadow.section.weight_floor)[0]
        margin = torch.tensor(shadow.margin[LAYER_INDEX])
        scale = torch.tensor(shadow.exp_threshold_scale(length)[LAYER_INDEX].copy())
        projection = projection_of(shadow, LAYER_INDEX)
        candidates = candidate_keys(
            shadow_scores(
                quantize_query(query.float(), projection, softmax_scale=SCALE), encode_keys(key.float(), projection)
            )[0],
            torch.full((NUM_HEADS,), -torch.inf) if is_dense else threshold - margin,
            num_kv_heads=NUM_KV_HEADS,
            num_sink=NUM_FIRST_ANCHORS,
            num_recent=NUM_LAST_ANCHORS,
            block_size=harness.block_size,
        )
        result = top_theta_attention(
            query.float(),
            key.float(),
            value.float(),
            threshold=-torch.inf if is_dense else threshold[None],
            target_k=0,
            softmax_scale=SCALE,
            candidates=candidates.repeat_interleave(NUM_HEADS // NUM_KV_HEADS, dim=0)[None],
            compensation=Compensation(
                "none" if self.compensation == "none" else "candidates",
                self.compensation == "sdc+vmc",
                exp_threshold_scale=scale,
            ),
        )
        return result.output, candidates

    def check_codes(self, row: int, length: int) -> None:
        """The codes of a sequence's full pages are the reference's."""
        harness, num_full = self.harness, length // self.harness.block_size
        interleaved = torch.cat(split_cache(harness.caches[LAYER]), dim=-1)
        key, _ = gather_sequence(interleaved, harness.block_table[row], num_full * harness.block_size)
        expected = pack_codes(encode_keys(key.float(), projection_of(self.store.shadow, LAYER_INDEX)))
        blocks = harness.block_table[row, :num_full].long()
        stored = codes_view(harness.caches[LAYER], 16)[blocks].transpose(1, 2).flatten(0, 1)
        assert float((stored != expected).float().mean()) < 1e-4


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin.register()
    monkeypatch.setattr(cpu, "get_tensor_model_parallel_rank", lambda: 0)


@pytest.mark.parametrize("compensation", ["sdc+vmc", "sdc", "none"])
@pytest.mark.parametrize(("dtype", "block_size"), [("float32", 16), ("bfloat16", 128), ("bfloat16", 16)])
def test_decoding_equals_the_reference(
    make_config: Callable[..., VllmConfig], shadow_folder: Path, dtype: str, block_size: int, compensation: str
) -> None:
    lens = [300, 700, 146, 100]
    shadow = ShadowHarness(
        make_config, shadow_folder, lens, block_size=block_size, dtype=dtype, compensation=compensation
    )
    shadow.prefill([length - 3 for length in lens])
    keys = rows = 0
    for step in range(2, -1, -1):
        seq_lens = [length - step for length in lens]
        keys += sum(shadow.check(Step(seq_lens, [1] * 4, [False] * 4)))
        rows += sum(seq_lens)
    counters = shadow.counters
    assert counters.totals.tolist() == [12, 3 + 1, rows, 3, 0]  # of 100 tokens, and of 144
    assert int(counters.keys_read[0]) == keys
    assert int(counters.value_rows_read[0]) < int(counters.keys_read[0]) < rows
    assert float(counters.lost_mass.min()) > 0


def test_prompts_in_chunks_beside_decoding_sequences(
    make_config: Callable[..., VllmConfig], shadow_folder: Path
) -> None:
    shadow = ShadowHarness(make_config, shadow_folder, [320, 300])
    shadow.prefill([200, 50])
    length = 50
    for index in range(1, 30):
        chunk = 7 if length + 7 <= 250 else 1
        length += chunk
        shadow.check(Step([200 + index, length], [1, chunk], [False, chunk > 1]))
    shadow.check_codes(0, 229)
    shadow.check_codes(1, length)


def test_requests_may_ask_for_dense_decoding(make_config: Callable[..., VllmConfig], shadow_folder: Path) -> None:
    shadow = ShadowHarness(make_config, shadow_folder, [160, 512, 512])
    shadow.prefill([159, 511, 511])
    asking(shadow.harness, [None, "dense", "floor:3"])
    step = Step([160, 512, 512], [1] * 3, [False] * 3)
    query, outputs = shadow.harness.run(step)
    for row, length in enumerate(step.seq_lens):
        expected, _ = shadow.expected(query[row : row + 1], row, length)
        if row == 1:
            interleaved = torch.cat(split_cache(shadow.harness.caches[LAYER]), dim=-1)
            key, value = gather_sequence(interleaved, shadow.harness.block_table[row], length)
            expected = dense_attention(query[row : row + 1], key, value, softmax_scale=SCALE).output
        torch.testing.assert_close(outputs[LAYER][row : row + 1], expected, rtol=1e-4, atol=2e-5)
    assert shadow.counters.totals.tolist() == [3, 0, 160 + 2 * 512, 1, 1]


@pytest.mark.parametrize("is_prompt", [True, False])
def test_a_page_that_another_sequence_fills_in_the_same_step(
    make_config: Callable[..., VllmConfig], shadow_folder: Path, is_prompt: bool
) -> None:
    shadow = ShadowHarness(make_config, shadow_folder, [208, 240])
    harness = shadow.harness
    new = 40 if is_prompt else 1
    shadow.prefill([208 - new])
    # the second sequence stands on the pages that the first one fills; its own tokens follow them
    harness.block_table[1, : 208 // 16] = harness.block_table[0, : 208 // 16]
    blocks = harness.block_table[1, 208 // 16 :].long()
    for cache in harness.caches:
        filled = torch.randn(len(blocks), *cache.shape[1:], generator=harness.generator).to(cache.dtype)
        cache[blocks] = filled
        shares = codes_view(cache, 16)[harness.block_table[0, (208 - new) // 16 : 208 // 16].long()]
        assert bool((shares == 0xA5).all())
    keys = shadow.check(Step([208, 210], [new, 1], [is_prompt, False]))
    assert keys[-1] < 210
    shadow.check_codes(0, 208)


def test_rejected_drafts_leave_no_trace(make_config: Callable[..., VllmConfig], shadow_folder: Path) -> None:
    shadow = ShadowHarness(make_config, shadow_folder, [240])
    shadow.prefill([205])
    # four drafts are attended to densely, over the end of a page at 208; then all of them are rejected
    shadow.harness.run(Step([210], [5], [False]))
    shadow.check_codes(0, 208)
    for length in range(207, 230):  # 208 is filled once more, with another token
        shadow.check(Step([length], [1], [False]))
    shadow.check_codes(0, 229)


def test_a_prompt_computed_again_after_a_preemption(
    make_config: Callable[..., VllmConfig], shadow_folder: Path
) -> None:
    shadow = ShadowHarness(make_config, shadow_folder, [200])
    shadow.prefill([150])
    shadow.check(Step([151], [1], [False]))
    before = [codes_view(cache, 16).clone() for cache in shadow.harness.caches]
    shadow.prefill([160])
    assert not torch.equal(codes_view(shadow.harness.caches[LAYER], 16), before[LAYER])
    assert torch.equal(codes_view(shadow.harness.caches[0], 16), before[0])  # a dense layer has no shadow keys
    shadow.check(Step([161], [1], [False]))
    shadow.check_codes(0, 161)


def test_pages_have_room_for_shadow_keys(make_config: Callable[..., VllmConfig], shadow_folder: Path) -> None:
    spec = ShadowHarness(make_config, shadow_folder, [16], dtype="bfloat16").harness.spec
    content = NUM_KV_HEADS * 16 * 2 * HEAD_SIZE * 2
    assert spec.unpadded_page_size_bytes == content
    assert spec.page_size_bytes == content + NUM_KV_HEADS * (HEAD_SIZE * 4 + 16 * 16)
    assert more_memory(spec, 16) == pytest.approx(NUM_KV_HEADS * 16 * 16 / (content + NUM_KV_HEADS * HEAD_SIZE * 4))
    assert more_memory(spec, 0) == 0


def test_at_the_start_it_is_said_what_shadow_keys_cost(
    make_config: Callable[..., VllmConfig], shadow_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = Plan.resolve(make_config({"mode": "shadow", "thresholds": str(shadow_folder), "per_request": False}))
    with caplog.at_level("INFO", logger="vllm.toptheta"):
        plan.log(more_memory=0.0588)
    assert "shadow keys of 16 bytes make the pages of the KV cache 5.9 % larger; there is no guard" in caplog.text
