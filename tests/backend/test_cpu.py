"""The backend's layers against the paged reference, on the batch shapes of vLLM's own attention tests; no engine.

Thresholding is discontinuous: a score within rounding of theta may fall on either side. The inputs are fixed by a seed,
and both sides compute scores in float32 from the same rounded keys, so survivor sets agree here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig

from tests.backend.cpu_harness import HEAD_SIZE, NUM_HEADS, NUM_KV_HEADS, SCALE, TARGET_K, Harness, Step, asking
from vllm_toptheta.backend import cpu, plugin
from vllm_toptheta.backend.plan import DenseRule
from vllm_toptheta.kernels.cpu import values
from vllm_toptheta.kernels.cpu.cache import split_cache
from vllm_toptheta.limits import NUM_ANCHORS
from vllm_toptheta.reference import dense_attention, gather_sequence, paged_top_theta_attention

# (sequence lengths after the step, new tokens of each)
BATCHES = {
    "small_decode": ([32, 40], [1, 1]),
    "small_prefill": ([32, 40], [8, 8]),
    "mixed_small": ([32, 40, 48, 56], [1, 1, 5, 5]),
    "medium_decode": ([128, 256, 512, 1024, 128, 256, 512, 1024], [1] * 8),
    "medium_prefill": ([256, 512, 1024, 2048], [16] * 4),
    "mixed_medium": ([512, 1024, 2048, 512, 1024, 2048], [1, 1, 1, 7, 7, 7]),
    "large_decode": ([2048] * 8, [1] * 8),
    "large_prefill": ([4096] * 2, [32] * 2),
    "single_decode": ([1024], [1]),
    "single_prefill": ([1024], [64]),
    "prefills_among_decodes": ([300, 700, 129, 900], [7, 1, 129, 1]),
}


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin.register()
    monkeypatch.setattr(cpu, "get_tensor_model_parallel_rank", lambda: 0)


# with pages and dtypes of both kinds; large batches take long, and one combination shows most of what can be wrong
CASES = [
    pytest.param(
        *case, marks=[pytest.mark.nightly] if case[0].startswith("large") and case[1:] != (128, "bfloat16") else []
    )
    for case in itertools.product(BATCHES, [16, 128], ["float32", "bfloat16"])
]


@pytest.mark.parametrize("is_calibrated", [False, True])
@pytest.mark.parametrize(("name", "block_size", "dtype"), CASES)
def test_layers_equal_the_paged_reference(
    make_config: Callable[..., VllmConfig],
    calibrated: dict[str, Any],
    name: str,
    block_size: int,
    dtype: str,
    is_calibrated: bool,
) -> None:
    seq_lens, query_lens = BATCHES[name]
    options = calibrated if is_calibrated else {"dense_layers": [0]}
    harness = Harness(make_config(options, dtype=dtype, block_size=block_size), block_size, seq_lens)
    contexts = [length - new for length, new in zip(seq_lens, query_lens, strict=True)]
    if any(contexts):
        harness.run(Step(contexts, contexts, [True] * len(contexts)))
    step = Step(seq_lens, query_lens, [new > 1 for new in query_lens])
    query, outputs = harness.run(step)
    for layer, output in enumerate(outputs):
        expected = harness.expected(step, query, layer)
        # the reference rounded to the working precision is the best that any implementation can do
        rounding = (expected.to(output.dtype).float() - expected).abs().max()
        error = (output.float() - expected).abs().max()
        assert error <= 2 * rounding + 1e-5, f"layer {layer}"
    assert harness.layers[0].impl.layer_plan is None
    counters = harness.layers[1].impl.layer_plan.counters.settled()
    decodes = [n for n, new in zip(seq_lens, query_lens, strict=True) if new == 1]
    num_short = sum(n <= (TARGET_K if is_calibrated else NUM_ANCHORS) for n in decodes)
    assert counters.totals.tolist() == [len(decodes), num_short, sum(decodes), len(decodes) > 0, 0]
    assert counters.lost_mass_histogram.sum(dim=1).tolist() == [len(decodes) - num_short] * NUM_HEADS
    if len(decodes) > num_short:
        assert counters.value_rows_read.max() < sum(decodes)
        assert counters.lost_mass.min() > 0


@pytest.mark.parametrize("options", [{}, {"mode": "shadow", "shadow_values": True, "heavy": 0, "weight_floor": 2}])
def test_layers_with_sinks(make_config: Callable[..., VllmConfig], options: dict[str, Any]) -> None:
    # as gpt-oss has them: one parameter, in layers with a window too
    sinks = torch.nn.Parameter(torch.linspace(-4.0, 6.0, NUM_HEADS), requires_grad=False)
    seq_lens, query_lens = [300, 700, 129, 900], [7, 1, 129, 1]
    config = make_config({"dense_layers": [0]} | options, dtype="float32", block_size=16)
    harness = Harness(config, 16, seq_lens, sinks=sinks)
    harness.run(Step([293, 699, 0, 899], [293, 699, 0, 899], [True] * 4))
    step = Step(seq_lens, query_lens, [new > 1 for new in query_lens])
    query, outputs = harness.run(step)
    for layer, output in enumerate(outputs):
        torch.testing.assert_close(output, harness.expected(step, query, layer), rtol=1e-4, atol=1e-5)
    counters = harness.layers[1].impl.layer_plan.counters.settled()
    assert counters.value_rows_read.max() < 700 + 900
    # weights that are loaded anew count at once
    with torch.no_grad():
        sinks.fill_(100.0)
    _, outputs = harness.run(step)
    assert all(float(output.abs().max()) < 1e-30 for output in outputs)


def test_windows_with_sinks_are_dense(make_config: Callable[..., VllmConfig]) -> None:
    sinks, window = torch.linspace(-4.0, 6.0, NUM_HEADS), 48
    harness = Harness(make_config(block_size=16), 16, [200, 90], sinks=sinks, sliding_window=window)
    harness.run(Step([199, 80], [199, 80], [True, True]))
    query, outputs = harness.run(Step([200, 90], [1, 10], [False, True]))
    assert harness.layers[2].impl.layer_plan is None
    cache = torch.cat(split_cache(harness.caches[2]), dim=-1)
    for row, tokens, length in ((0, slice(0, 1), 200), (1, slice(10, 11), 90)):
        key, value = gather_sequence(cache, harness.block_table[row], length)
        expected = dense_attention(query[tokens], key[-window:], value[-window:], softmax_scale=SCALE, sinks=sinks)
        torch.testing.assert_close(outputs[2][tokens], expected.output, rtol=1e-4, atol=1e-5)


def test_the_last_token_of_a_prompt_is_dense(make_config: Callable[..., VllmConfig]) -> None:
    harness = Harness(make_config(block_size=16), 16, [512])
    harness.run(Step([511], [511], [True]))
    step = Step([512], [1], [True])
    query, outputs = harness.run(step)
    torch.testing.assert_close(outputs[1], harness.expected(step, query, 1), rtol=1e-4, atol=1e-5)
    counters = harness.layers[1].impl.layer_plan.counters.settled()
    assert not counters.totals.any()


def test_requests_have_floors_of_their_own(make_config: Callable[..., VllmConfig]) -> None:
    harness = Harness(make_config({"weight_floor": 2}, block_size=16), 16, [128, 400, 512, 512, 300])
    harness.run(Step([127, 399, 511, 511, 290], [127, 399, 511, 511, 290], [True] * 5))
    asking(harness, ["floor:1.0", "floor:0.5", "dense", "floor:2", "floor:8"])
    # full pages only: of an open one, all rows count as read
    step = Step([128, 400, 512, 512, 300], [1, 1, 1, 1, 10], [False] * 4 + [True])
    query, outputs = harness.run(step)
    thresholds = torch.full((14, NUM_HEADS), -torch.inf)  # too short, half of the weight, dense, the server's; a prompt
    thresholds[1] = harness.threshold(step, query, 1, 1) + math.log(0.5 / 2)
    thresholds[3] = harness.threshold(step, query, 1, 3)
    expected = paged_top_theta_attention(
        query,
        torch.cat(split_cache(harness.caches[1]), dim=-1),
        harness.block_table,
        torch.tensor(step.seq_lens),
        torch.tensor([0, *step.query_lens]).cumsum(0),
        threshold=thresholds,
        target_k=NUM_ANCHORS,
        softmax_scale=SCALE,
    )
    torch.testing.assert_close(outputs[1], expected.output, rtol=1e-4, atol=1e-5)
    counters = harness.layers[1].impl.layer_plan.counters.settled()
    assert counters.totals.tolist() == [4, 0, 128 + 400 + 512 + 512, 1, 3]
    assert counters.value_rows_read.tolist() == expected.value_rows_read[:4].sum(dim=0).tolist()
    assert counters.lost_mass_histogram.sum(dim=1).tolist() == [1] * NUM_HEADS
    torch.testing.assert_close(counters.lost_mass, expected.lost_mass[3].double(), rtol=1e-4, atol=1e-5)


def test_a_floor_of_zero_is_dense(make_config: Callable[..., VllmConfig]) -> None:
    harness = Harness(make_config({"weight_floor": 0}, block_size=16), 16, [300])
    harness.run(Step([299], [299], [True]))
    assert all(layer.impl.layer_plan is None for layer in harness.layers)
    query, outputs = harness.run(Step([300], [1], [False]))
    expected = harness.expected(Step([300], [1], [True]), query, 1)
    torch.testing.assert_close(outputs[1], expected, rtol=1e-4, atol=1e-5)


def test_decoding_token_by_token_fills_the_tails(
    make_config: Callable[..., VllmConfig], calibrated: dict[str, Any]
) -> None:
    harness = Harness(make_config(calibrated | {"target": "k:8"}, block_size=16), 16, [100])
    harness.run(Step([60], [60], [True]))
    for length in range(61, 100):
        step = Step([length], [1], [False])
        query, outputs = harness.run(step)
        threshold = torch.full((1, NUM_HEADS), 0.4 + 0.1 * float(torch.tensor(float(length)).log()))
        expected = paged_top_theta_attention(
            query,
            torch.cat(split_cache(harness.caches[2]), dim=-1),
            harness.block_table,
            torch.tensor([length]),
            torch.tensor([0, 1]),
            threshold=threshold,
            target_k=8,
            softmax_scale=SCALE,
        )
        torch.testing.assert_close(outputs[2], expected.output, rtol=1e-4, atol=1e-5)


def test_min_context_keeps_a_sequence_dense(make_config: Callable[..., VllmConfig]) -> None:
    harness = Harness(make_config(block_size=16, options={"min_context": 600}), 16, [600, 601])
    harness.run(Step([599, 600], [599, 600], [True, True]))
    harness.run(Step([600, 601], [1, 1], [False, False]))
    counters = harness.layers[1].impl.layer_plan.counters.settled()
    assert counters.totals.tolist()[:2] == [2, 1]


def test_pages_have_a_tail_that_vllm_accounts_for(make_config: Callable[..., VllmConfig]) -> None:
    harness = Harness(make_config(block_size=16), 16, [16])
    content = NUM_KV_HEADS * 16 * 2 * HEAD_SIZE * 4
    assert harness.spec.page_size_bytes == content + NUM_KV_HEADS * HEAD_SIZE * 4
    assert harness.spec.page_size_bytes > harness.spec.unpadded_page_size_bytes == content


@pytest.mark.parametrize(("dtype", "cached"), [("float32", "bfloat16"), ("bfloat16", "float16")])
@pytest.mark.parametrize("name", ["mixed_small", "prefills_among_decodes"])
def test_a_cache_of_another_dtype_than_the_model(
    make_config: Callable[..., VllmConfig], name: str, dtype: str, cached: str
) -> None:
    seq_lens, query_lens = BATCHES[name]
    config = make_config({"dense_layers": [0]}, dtype=dtype, kv_cache_dtype=cached, block_size=16)
    harness = Harness(config, 16, seq_lens)
    assert harness.caches[0].dtype == getattr(torch, cached)
    contexts = [length - new for length, new in zip(seq_lens, query_lens, strict=True)]
    harness.run(Step(contexts, contexts, [True] * len(contexts)))
    step = Step(seq_lens, query_lens, [new > 1 for new in query_lens])
    query, outputs = harness.run(step)
    for layer, output in enumerate(outputs):
        expected = harness.expected(step, query, layer)
        rounding = (expected.to(output.dtype).float() - expected).abs().max()
        assert float((output.float() - expected).abs().max()) <= 2 * rounding + 1e-5, f"layer {layer}"


def test_small_steps_are_dense(make_config: Callable[..., VllmConfig]) -> None:
    harness = Harness(make_config(block_size=16), 16, [600, 600])
    assert harness.automatic == DenseRule(0, values.min_step_tokens(NUM_KV_HEADS, HEAD_SIZE))
    assert values.min_step_tokens(8, 128) < harness.automatic.min_step_tokens < values.min_step_tokens(1, 64)
    harness.builder.plan = replace(harness.builder.plan, automatic=DenseRule(0, 1_100))
    harness.run(Step([548, 549], [548, 549], [True, True]))
    for lens, num_dense in (([549, 550], 2), ([550, 551], 0)):
        step = Step(lens, [1, 1], [False, False])
        query, outputs = harness.run(step)
        if num_dense:
            sparse = harness.expected(step, query, 1)
            assert float((outputs[1].float() - sparse).abs().max()) > 0.01
        counters = harness.layers[1].impl.layer_plan.counters.settled()
        assert counters.totals.tolist()[:3] == [2, num_dense, sum(lens)]
        assert (int(counters.value_rows_read.sum()) == sum(lens) * NUM_KV_HEADS) == bool(num_dense)
        counters.totals.zero_(), counters.value_rows_read.zero_()


def test_mode_shadow_says_that_it_is_slow_here(
    make_config: Callable[..., VllmConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(cpu.logger, "warning_once", said.append)
    Harness(make_config(block_size=16), 16, [20])
    assert not said
    Harness(make_config({"mode": "shadow"}, block_size=16), 16, [20])
    (warning,) = said
    assert "slower than mode values" in warning
