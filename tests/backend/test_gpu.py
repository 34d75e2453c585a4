"""The GPU backend's steps with its kernels in Triton's interpreter; FlashAttention, which needs a GPU, is stood in for.

Runs in the interpreter where `make test` starts it (`tests/interpreter.py`), or on a GPU.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

from tests.backend.gpu_engine import HEAD_SIZE, NUM_HEADS, NUM_KV_HEADS, TARGET_K, Engine, asking, make_plan
from tests.kernels.decode_case import DEVICE, RUNS_HERE, WHY_NOT, Shape, cuda_loader
from vllm_toptheta.backend import gpu, kernel_choice, program_balance
from vllm_toptheta.backend.gpu import GpuTopThetaBackend
from vllm_toptheta.backend.hooks import warm_up
from vllm_toptheta.backend.kernel_choice import max_verified
from vllm_toptheta.backend.pages import with_tail_rows
from vllm_toptheta.backend.support_checks import check_split
from vllm_toptheta.errors import UnsupportedError
from vllm_toptheta.kernels.gpu.cuda import value_split
from vllm_toptheta.kernels.gpu.tuning import launch_config, num_multiprocessors
from vllm_toptheta.limits import MAX_QUERY_LEN
from vllm_toptheta.selection import ServedThresholds
from vllm_toptheta.store import ThresholdCurve

pytestmark = pytest.mark.skipif(not RUNS_HERE, reason=WHY_NOT)


def test_prefill_mixed_and_decode_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, [60, 90, 90])
    assert engine.step([0, 1, 2], [40, 70, 33], [40, 70, 33]).max() < 2e-3
    assert engine.dense_rows == [143]
    assert engine.step([0, 1, 2], [41, 71, 53], [1, 1, 20]).max() < 2e-3  # decoding sequences stand in front
    assert engine.dense_rows == [20]
    for step in range(1, 13):  # across the ends of pages: 48, 80 and 64
        lens = [41 + step, 71 + step, 53 + step]
        assert engine.step([0, 1, 2], lens, [1, 1, 1]).max() < 2e-3, lens
        assert engine.dense_rows == []
    layer_plan = engine.impl.layer_plan
    assert layer_plan is not None
    decoded, dense, cached, steps, asked = layer_plan.counters.buffers.totals.tolist()
    assert (decoded, dense, steps, asked) == (2 + 3 * 12, 0, 1 + 12, 0)
    assert layer_plan.counters.buffers.lost_mass_histogram.sum(dim=1).tolist() == [decoded] * NUM_HEADS
    assert 0 < int(layer_plan.counters.buffers.value_rows_read.max()) < cached
    assert float(layer_plan.counters.buffers.lost_mass.min()) > 0


@pytest.mark.parametrize("lens", [[60, 90], [2048, 2300]])
def test_what_is_no_faster_otherwise_is_dense(monkeypatch: pytest.MonkeyPatch, lens: list[int]) -> None:
    engine = Engine(monkeypatch, lens, plan=make_plan(2.0, min_context=None))
    rule = engine.builder.plan.dense_rule
    config = launch_config(HEAD_SIZE, 2, DEVICE).for_loader(engine.impl.loaders.values)
    num_sms = num_multiprocessors(torch.device(DEVICE))
    assert rule == (config.dense_length, config.min_step_tokens(NUM_KV_HEADS, num_sms))
    prompts = [length - 1 for length in lens]
    engine.step([0, 1], prompts, prompts)
    engine.step([0, 1], lens, [1, 1])
    dense = [length for length in lens if length <= rule.max_len or sum(lens) < rule.min_step_tokens]
    assert engine.impl.layer_plan.counters.buffers.totals.tolist()[:2] == [2, len(dense)]


def test_a_server_with_few_kv_heads_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only the kernel in Triton is at hand."""
    monkeypatch.setattr(value_split, "find_loader", lambda *arguments: None)
    for most, is_said in ((NUM_KV_HEADS * HEAD_SIZE, True), (NUM_KV_HEADS * HEAD_SIZE - 1, False)):
        warnings: list[str] = []
        monkeypatch.setattr(gpu.logger, "warning_once", lambda message, *_, said=warnings: said.append(message))
        monkeypatch.setattr(gpu, "FEW_CHANNELS", most)
        Engine(monkeypatch, [60])
        assert any("longer than with FlashAttention-3" in warning for warning in warnings) is is_said


def test_heads_that_keep_more_keys_get_more_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernel in CUDA C++, whose outputs are right before and after."""
    loader = cuda_loader(Shape((1,), NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE))
    monkeypatch.setattr(value_split, "find_loader", lambda *_: loader)
    monkeypatch.setattr(program_balance, "WINDOW_STEPS", 4)
    monkeypatch.setattr(program_balance, "MIN_ROWS", 1)
    plan = make_plan()
    theta = np.array([-10.0] * (NUM_HEADS // 2) + [2.0] * (NUM_HEADS // 2), np.float32)
    curve = ThresholdCurve(TARGET_K, np.stack([theta, theta])[..., None], TARGET_K + 1, 4096, label="k:8")
    engine = Engine(monkeypatch, [400], plan=replace(plan, thresholds=ServedThresholds.calibrated(curve)))
    monkeypatch.setattr(engine, "threshold", lambda *_: torch.from_numpy(theta))
    engine.step([0], [380], [380])
    programs = engine.impl.layer.head_programs
    first, second = programs.tolist()
    assert first == second
    for length in range(381, 393):
        assert engine.step([0], [length], [1]).max() < 2e-3
    many, few = programs.tolist()
    assert many > first > few
    assert many + few == first + second


def test_requests_have_floors_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, [180, 190, 190], plan=make_plan(4.0))
    new = asking(plain=None, dense="dense", one="floor:1")
    requests, lower = engine.impl.requests, -math.log(4.0)
    offsets = requests.offsets
    requests.step(new, {"plain", "dense", "one"}, ["plain", "dense", "one"])
    engine.step([0, 1, 2], [160, 171, 180], [160, 171, 180])
    assert engine.step([0, 1, 2], [161, 172, 181], [1, 1, 1], [0.0, -torch.inf, lower]).max() < 2e-3
    # another order, with one of them still in its prompt
    requests.step([], {"plain", "dense", "one"}, ["one", "dense", "plain"])
    assert engine.step([2, 1, 0], [182, 173, 170], [1, 1, 9], [lower, -torch.inf, 0.0]).max() < 2e-3
    requests.step([], {"plain"}, ["plain"])
    assert engine.step([0], [171], [1]).max() < 2e-3
    counters = engine.impl.layer_plan.counters.buffers
    assert requests.offsets is offsets  # where captured graphs find it
    assert counters.totals.tolist() == [6, 0, 161 + 172 + 181 + 182 + 173 + 171, 3, 4]
    assert counters.lost_mass_histogram.sum(dim=1).tolist() == [2] * NUM_HEADS
    assert float(counters.lost_mass.min()) > 0


def test_relative_thresholds_from_the_anchors_on(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, [180], plan=make_plan(3.0))
    engine.step([0], [140], [140])
    for length in range(141, 165):  # dense up to 144, and across the ends of pages
        assert engine.step([0], [length], [1]).max() < 2e-3, length
    counters = engine.impl.layer_plan.counters.buffers
    assert counters.totals.tolist() == [24, 4, sum(range(141, 165)), 24, 0]


def test_attention_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    sinks = torch.nn.Parameter(torch.linspace(-3.0, 5.0, NUM_HEADS, device=DEVICE).half(), requires_grad=False)
    engine = Engine(monkeypatch, [180, 190], plan=make_plan(3.0), sinks=sinks)
    assert engine.impl.layer.sinks is engine.impl.sinks is sinks
    engine.step([0, 1], [140, 170], [140, 170])
    for step in range(1, 7):  # from the anchors on, and across the end of a page
        assert engine.step([0, 1], [140 + step, 170 + step], [1, 1]).max() < 2e-3
        assert engine.dense_rows == []
    assert float(engine.impl.layer_plan.counters.buffers.lost_mass.min()) > 0


@pytest.mark.parametrize("layout", ["NH", "HN"])
def test_pages_split_from_longer_ones(monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    engine = Engine(monkeypatch, [180, 190], plan=make_plan(3.0), tail_rows=layout)
    assert engine.step([0, 1], [140, 170], [140, 170]).max() < 2e-3
    assert engine.step([0, 1], [141, 175], [1, 5]).max() < 2e-3
    for step in range(2, 10):  # from the anchors on, and across the ends of pages: 144 and 176
        assert engine.step([0, 1], [140 + step, 174 + step], [1, 1]).max() < 2e-3
        assert engine.dense_rows == []
    assert float(engine.impl.layer_plan.counters.buffers.lost_mass.min()) > 0


def test_pages_left_long_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, [60], tail_rows="NH")
    spec = with_tail_rows(replace(engine.builder.kv_cache_spec, block_size=528, tokens_per_state=1))
    assert spec.page_size_bytes == 528 // 16 * 17 * NUM_KV_HEADS * 4 * HEAD_SIZE  # dense
    assert GpuTopThetaBackend.get_supported_kernel_block_sizes(spec) == [16]
    with pytest.raises(UnsupportedError, match="VLLM_KV_CACHE_LAYOUT: layouts with several layers in a block"):
        check_split(spec)
    check_split(spec.copy_with_new_block_size(16))


def test_keys_and_values_are_written_in_front_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, written = Engine(monkeypatch, [60], tail_rows="NH"), []
    monkeypatch.setattr(
        FlashAttentionImpl, "do_kv_cache_update", lambda impl, layer, key, value, cache, slots: written.append(cache)
    )
    engine.impl.do_kv_cache_update(engine.layer, None, None, engine.pages, None)
    assert written[0].shape == engine.kv_cache.shape
    assert written[0].stride() == engine.pages.stride()


def test_where_requests_cannot_choose_no_offset_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, [60], refusal="switched off")
    engine.impl.requests.offsets.fill_(torch.nan)
    engine.step([0], [40], [40])
    assert engine.step([0], [41], [1]).max() < 2e-3
    assert engine.impl.layer_plan.counters.buffers.totals.tolist() == [1, 0, 41, 1, 0]


def test_float8_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, [60, 90], float8=True)
    assert engine.step([0, 1], [40, 70], [40, 70]).max() < 2e-3
    for step in range(1, 12):  # across the ends of pages: 48 and 80
        assert engine.step([0, 1], [40 + step, 70 + step], [1, 1]).max() < 2e-3
        assert engine.dense_rows == []
    assert (
        0
        < int(engine.impl.layer_plan.counters.buffers.value_rows_read.max())
        < int(engine.impl.layer_plan.counters.buffers.totals[2])
    )


@pytest.mark.parametrize("in_cuda", [False, True])
def test_drafts_are_verified_by_thresholds(monkeypatch: pytest.MonkeyPatch, in_cuda: bool) -> None:
    if in_cuda:
        group = NUM_HEADS // NUM_KV_HEADS
        monkeypatch.setattr(
            value_split,
            "find_loader",
            lambda device, size, queries, bytes_: cuda_loader(
                Shape((1,), queries // group * NUM_HEADS, NUM_KV_HEADS, size)
            ),
        )
    engine = Engine(monkeypatch, [190, 160, 16], plan=make_plan(3.0), num_drafts=4)
    assert engine.builder.reorder_batch_threshold == 5
    reserved = engine.reserved_bytes
    assert engine.step([0, 1], [158, 146], [158, 146]).max() < 2e-3
    # over the end of a page at 160, in a graph of three sequences
    assert engine.step([0, 1], [163, 151], [5, 5], num_padded=1).max() < 2e-3
    assert engine.dense_rows == []
    # all drafts are rejected of one, so that 160 is filled once more, and two of the other's
    assert engine.step([0, 1], [164, 150], [5, 1]).max() < 2e-3
    assert engine.step([1, 0], [153, 165], [3, 5]).max() < 2e-3
    assert engine.step([0, 1], [164, 154], [1, 1]).max() < 2e-3
    # behind them, a prompt, the last tokens of which are as few as drafts are
    assert engine.step([0, 1], [167, 160], [3, 6]).max() < 2e-3
    assert engine.dense_rows == [6]
    assert engine.step([0, 1], [169, 158], [2, 4], prompts=[1]).max() < 2e-3
    assert engine.dense_rows == [4]
    counters = engine.impl.layer_plan.counters.buffers
    decoded = 10 + 6 + 8 + 2 + 3 + 2
    assert counters.totals[[0, 3]].tolist() == [decoded, 6]
    assert counters.lost_mass_histogram.sum(dim=1).tolist() == [decoded - int(counters.totals[1])] * NUM_HEADS
    assert engine.reserved_bytes == reserved  # nothing grows while steps run


def test_levels_of_requests_with_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, [180, 190], plan=make_plan(4.0), num_drafts=3)
    requests, lower = engine.impl.requests, -math.log(4.0)
    requests.step(asking(dense="dense", one="floor:1"), {"dense", "one"}, ["dense", "one"])
    engine.step([0, 1], [160, 170], [160, 170])
    assert engine.step([0, 1], [164, 172], [4, 2], [-torch.inf, lower]).max() < 2e-3
    requests.step([], {"dense", "one"}, ["one", "dense"])
    assert engine.step([1, 0], [176, 165], [4, 1], [lower, -torch.inf]).max() < 2e-3
    assert engine.impl.layer_plan.counters.buffers.totals.tolist()[4] == 4 + 2 + 4 + 1


@pytest.mark.parametrize(
    ("num_drafts", "changes", "heads", "expected"),
    [
        (None, {}, 8, 1),
        (1, {}, 8, 2),
        (MAX_QUERY_LEN - 1, {}, 2, MAX_QUERY_LEN),
        (MAX_QUERY_LEN - 1, {}, 4, 1),
        (3, {}, 4, 4),
        (3, {}, 5, 1),
        (MAX_QUERY_LEN, {}, 1, 1),
        (3, {"mode": "shadow"}, 1, 1),
        (3, {"lossless": True}, 1, 1),
    ],
)
def test_where_drafts_are_verified_by_thresholds(
    monkeypatch: pytest.MonkeyPatch, num_drafts: int | None, changes: dict[str, Any], heads: int, expected: int
) -> None:
    speculative = None if num_drafts is None else SimpleNamespace(num_speculative_tokens=num_drafts)
    heads_of = {"get_num_attention_heads": lambda _: heads, "get_num_kv_heads": lambda _: 1}
    model = SimpleNamespace(**heads_of, get_head_size=lambda: 128)
    config = SimpleNamespace(
        speculative_config=speculative,
        additional_config={"toptheta": changes},
        model_config=model,
        cache_config=SimpleNamespace(cache_dtype="auto"),
        parallel_config=None,
    )
    assert max_verified(config) == expected
    is_uniform = expected > 1 or "lossless" in changes
    single = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    support = AttentionCGSupport.UNIFORM_BATCH if is_uniform else single
    assert gpu.GpuMetadataBuilder.get_cudagraph_support(config, None) == support
    most = gpu.GpuMetadataBuilder.get_varlen_cudagraph_max_query_len(config, None)
    assert most == (expected if expected > 1 else None)
    monkeypatch.setattr(kernel_choice, "splits_pages", lambda: False)
    assert max_verified(config) == 1  # it has not run them
    monkeypatch.undo()
    for cache_dtype, head_size in (("fp8", 128), ("auto", 80)):  # of which there are kernels in Triton alone
        config.cache_config.cache_dtype, model.get_head_size = cache_dtype, lambda size=head_size: size
        assert max_verified(config) == 1


def test_rejected_drafts_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, [90, 60])
    engine.step([0, 1], [44, 30], [44, 30])
    # four drafts are attended to densely, over the end of a page at 48; then all of them are rejected
    assert engine.step([0, 1], [49, 35], [5, 5]).max() < 2e-3
    assert engine.dense_rows == [10]
    assert engine.step([1, 0], [32, 50], [1, 5]).max() < 2e-3  # one sequence without a draft in front
    assert engine.dense_rows == [5]
    for length in range(46, 60):  # 48 is filled once more, with another token
        assert engine.step([0], [length], [1]).max() < 2e-3


def test_what_verifies_is_dense_and_what_drafts_is_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, [90, 60])
    totals = engine.impl.layer_plan.counters.buffers.totals
    engine.builder.is_verifying = True
    engine.step([0, 1], [44, 30], [44, 30])
    assert engine.step([0, 1], [45, 31], [1, 1]).max() < 2e-3
    assert engine.dense_rows == [2]
    for confirmed in (
        46,
        49,
        52,
    ):  # over the end of the page at 48, which is closed by drafts, rejected, and written again
        engine.builder.is_verifying = False
        for step in range(4):
            assert engine.step([0, 1], [confirmed + step, confirmed - 14 + step], [1, 1]).max() < 2e-3
            assert engine.dense_rows == []
        engine.builder.is_verifying = True
        assert engine.step([0, 1], [confirmed + 4, confirmed - 10], [5, 5]).max() < 2e-3
        assert engine.dense_rows == [10]
    # what is counted are drafts
    assert totals[0] == 3 * 4 * 2


def test_what_warm_up_counted_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker.gpu_worker import Worker

    engine = Engine(monkeypatch, [60])
    engine.step([0], [40], [40])

    @functools.wraps(Worker.compile_or_warm_up_model)  # as vLLM's own is wrapped, for tracing
    def warms_up(worker: Any) -> str:
        engine.step([0], [41], [1])
        return "seconds"

    monkeypatch.setattr(Worker, "compile_or_warm_up_model", warms_up)
    warm_up.install()
    warm_up.install()  # once for each group of layers
    layer = SimpleNamespace(impl=engine.impl, backend=SimpleNamespace(name="TOPTHETA"))
    forward_context = {"model.layers.1.self_attn.attn": layer, "model.layers.0": SimpleNamespace()}
    worker = SimpleNamespace(
        vllm_config=SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=forward_context))
    )
    assert Worker.compile_or_warm_up_model(worker) == "seconds"
    assert engine.impl.layer_plan.counters.buffers.totals.tolist() == [0, 0, 0, 0, 0]
    engine.step([0], [42], [1])
    engine.step([0], [43], [1])
    assert engine.impl.layer_plan.counters.buffers.totals.tolist() == [2, 0, 42 + 43, 2, 0]


def test_a_dense_layer_is_flash_attentions(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, [60])
    engine.impl.layer_plan = engine.impl.layer = None
    engine.step([0], [40], [40])
    engine.step([0], [41], [1])
    assert engine.dense_rows == [1]
