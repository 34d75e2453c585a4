"""The GPU backend's steps with its kernels in Triton's interpreter; FlashAttention, which needs a GPU, is stood in for.

Runs where `tests/kernels/test_interpreter.py` starts it, or on a GPU.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl, FlashAttentionMetadataBuilder

from tests.kernels.decode_case import DEVICE, RUNS_HERE, WHY_NOT
from tests.kernels.paged import empty_cache
from vllm_toptheta.backend.gpu import FLOAT8, GpuMetadataBuilder, GpuTopThetaImpl
from vllm_toptheta.backend.levels import Levels
from vllm_toptheta.backend.plan import Plan
from vllm_toptheta.backend.requests import RequestLevels
from vllm_toptheta.backend.watch import Watch
from vllm_toptheta.backend.worker import forget_warm_up
from vllm_toptheta.kernels.decode import DecodeWorkspace
from vllm_toptheta.reference import paged_top_theta_attention
from vllm_toptheta.settings import Settings
from vllm_toptheta.store import Architecture, ThresholdCurve

pytestmark = pytest.mark.skipif(not RUNS_HERE, reason=WHY_NOT)

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 4, 2, 64, 16
SCALES = {"_q_scale": 0.9, "_k_scale": 1.1, "_v_scale": 0.7}  # of a layer with a float8 cache
SCALE, THETA, TARGET_K = HEAD_SIZE**-0.5, 0.5, 8


class Engine:
    """One sparse layer and what vLLM does around it, step by step."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, max_lens: list[int], *, float8: bool = False, refusal: str | None = None
    ) -> None:
        self.float8 = float8
        ones = SimpleNamespace(_q_scale=None, _k_scale=None, _v_scale=None)
        scales = {name: torch.tensor(value, device=DEVICE) for name, value in SCALES.items()}
        self.layer = SimpleNamespace(**scales) if float8 else ones
        self.generator = torch.Generator().manual_seed(7)
        self.dense_rows: list[int] = []
        monkeypatch.setattr(FlashAttentionMetadataBuilder, "build", self.flash_attention_build)
        monkeypatch.setattr(FlashAttentionImpl, "forward", self.flash_attention_forward)
        monkeypatch.setattr(GpuTopThetaImpl, "_workspace", self.workspace)
        coefficients = np.full((2, NUM_HEADS, 1), THETA, np.float32)
        curve = ThresholdCurve(TARGET_K, coefficients, TARGET_K + 1, 4096, label="k:8")
        other = [ThresholdCurve(4, coefficients + 0.5, 5, 4096, label="k:4")]
        plan = Plan(
            settings=Settings.load({"target_k": TARGET_K}),
            curve=curve,
            model_id="acme/tiny",
            origin="a test",
            dense_layers=frozenset({0}),
            architecture=Architecture(
                num_layers=2, num_heads=NUM_HEADS, num_kv_heads=NUM_KV_HEADS, head_size=HEAD_SIZE, rope={}
            ),
            levels=Levels(curve, tuple(other), refusal=refusal),
        )
        self.impl = GpuTopThetaImpl.__new__(GpuTopThetaImpl)
        self.impl.num_heads, self.impl.num_kv_heads, self.impl.head_size = NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE
        self.impl.scale, self.impl.logits_soft_cap = SCALE, 0
        self.impl.kv_cache_dtype = "fp8" if float8 else "auto"
        self.impl.plan = plan
        self.impl.layer_plan = plan.for_layer(1, num_heads=NUM_HEADS, num_kv_heads=NUM_KV_HEADS, rank=0, device=DEVICE)
        self.impl.requests = RequestLevels(plan.levels, len(max_lens), DEVICE)
        self.builder = GpuMetadataBuilder.__new__(GpuMetadataBuilder)
        self.builder.watch = Watch([self.impl.layer_plan], relaxes=True)
        width = max(-(-length // BLOCK_SIZE) for length in max_lens)
        num_blocks = 1 + width * len(max_lens)
        order = torch.randperm(num_blocks - 1, generator=self.generator).int() + 1
        self.block_table = order.view(len(max_lens), width).to(DEVICE)
        dtype = FLOAT8 if float8 else torch.float16
        pages = empty_cache(num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_SIZE, dtype, DEVICE)
        self.kv_cache = pages.view(torch.uint8) if float8 else pages  # vLLM hands over bytes

    def step(
        self, rows: list[int], seq_lens: list[int], query_lens: list[int], thetas: list[float] | None = None
    ) -> torch.Tensor:
        """Run one step over the sequences in `rows`; largest error against the reference's rows."""
        lens, news = torch.tensor(seq_lens), torch.tensor(query_lens)
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), news.cumsum(0)]).int()
        block_table = self.block_table[rows]
        query = self.random(int(starts[-1]), NUM_HEADS)
        for row, (length, new) in enumerate(zip(seq_lens, query_lens, strict=True)):
            positions = torch.arange(length - new, length, device=DEVICE)
            blocks = block_table[row, positions // BLOCK_SIZE].long()
            self.kv_cache[blocks, :, positions % BLOCK_SIZE] = torch.cat(
                [self.random(new, NUM_KV_HEADS), self.random(new, NUM_KV_HEADS)], dim=-1
            ).view(self.kv_cache.dtype)
        common = CommonAttentionMetadata(
            query_start_loc=starts.to(DEVICE),
            query_start_loc_cpu=starts,
            seq_lens=lens.int().to(DEVICE),
            num_reqs=len(rows),
            num_actual_tokens=len(query),
            max_query_len=max(query_lens),
            max_seq_len=max(seq_lens),
            block_table_tensor=block_table,
            slot_mapping=torch.zeros(len(query), dtype=torch.int64, device=DEVICE),
        )
        self.dense_rows = []
        output = torch.full_like(query, torch.nan, dtype=torch.float16)
        self.impl.forward(self.layer, query, query, query, self.kv_cache, self.builder.build(0, common), output)
        is_decode = torch.repeat_interleave(news == 1, news)
        theta = torch.repeat_interleave(torch.tensor(thetas or [THETA] * len(rows)), news)
        threshold = torch.where(is_decode, theta, -torch.inf)[:, None].expand(-1, NUM_HEADS)
        expected = self.reference(query, block_table, lens, starts, threshold)
        return (output.float() - expected).abs().amax(dim=(1, 2))

    def random(self, num_tokens: int, num_heads: int) -> torch.Tensor:
        values = torch.randn(num_tokens, num_heads, HEAD_SIZE, generator=self.generator)
        return values.to(FLOAT8 if self.float8 else torch.float16).to(DEVICE)

    def reference(self, query: torch.Tensor, block_table: Any, lens: Any, starts: Any, threshold: Any) -> torch.Tensor:
        kv_cache = self.kv_cache
        if self.float8:
            query = query.float() * SCALES["_q_scale"]
            scale = torch.tensor([SCALES["_k_scale"], SCALES["_v_scale"]], device=DEVICE)
            kv_cache = kv_cache.view(FLOAT8).float() * scale.repeat_interleave(HEAD_SIZE)
        return paged_top_theta_attention(
            query,
            kv_cache,
            block_table,
            lens,
            starts,
            threshold=threshold.to(query.device),
            target_k=TARGET_K,
            softmax_scale=SCALE,
        ).output

    def flash_attention_build(self, prefix: int, common: CommonAttentionMetadata, fast_build: bool = False) -> Any:
        return SimpleNamespace(
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            query_start_loc=common.query_start_loc,
            num_actual_tokens=common.num_actual_tokens,
        )

    def flash_attention_forward(
        self, layer: Any, query: torch.Tensor, key: Any, value: Any, kv_cache: Any, metadata: Any, output: Any, *_: Any
    ) -> torch.Tensor:
        self.dense_rows.append(metadata.num_actual_tokens)
        everything = torch.full((len(query), NUM_HEADS), -torch.inf)
        output.copy_(
            self.reference(query, metadata.block_table, metadata.seq_lens, metadata.query_start_loc, everything)
        )
        return output

    def workspace(self, num_seqs: int, element_bytes: int, device: torch.device) -> DecodeWorkspace:
        return DecodeWorkspace.allocate(
            num_seqs, NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, kv_dtype=torch.float16, device=device
        )


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
    decoded, dense, cached, steps, asked = layer_plan.counters.totals.tolist()
    assert (decoded, dense, steps, asked) == (2 + 3 * 12, 0, 1 + 12, 0)
    assert layer_plan.counters.lost_mass_histogram.sum(dim=1).tolist() == [decoded] * NUM_HEADS
    assert 0 < int(layer_plan.counters.rows_read.max()) < cached
    assert float(layer_plan.counters.lost_mass.min()) > 0


def test_requests_have_levels_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, [60, 90, 90])
    new = [
        SimpleNamespace(
            req_id=name, prompt_token_ids=[1], sampling_params=SimpleNamespace(extra_args=asked and {"toptheta": asked})
        )
        for name, asked in {"plain": None, "dense": "dense", "k": 4}.items()
    ]
    requests = engine.impl.requests
    rules = requests.rules
    requests.step(new, {"plain", "dense", "k"}, ["plain", "dense", "k"])
    engine.step([0, 1, 2], [40, 70, 60], [40, 70, 60])
    assert engine.step([0, 1, 2], [41, 71, 61], [1, 1, 1], [THETA, -torch.inf, THETA + 0.5]).max() < 2e-3
    # another order, with one of them still in its prompt
    requests.step([], {"plain", "dense", "k"}, ["k", "dense", "plain"])
    assert engine.step([2, 1, 0], [62, 72, 50], [1, 1, 9], [THETA + 0.5, -torch.inf, THETA]).max() < 2e-3
    requests.step([], {"plain"}, ["plain"])
    assert engine.step([0], [51], [1], [THETA]).max() < 2e-3
    counters = engine.impl.layer_plan.counters
    assert requests.rules is rules  # where captured graphs find it
    assert counters.totals.tolist() == [6, 0, 41 + 71 + 61 + 62 + 72 + 51, 3, 4]
    assert counters.lost_mass_histogram.sum(dim=1).tolist() == [2] * NUM_HEADS


def test_without_per_request_levels_no_rule_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, [60], refusal="switched off")
    engine.impl.requests.rules.fill_(-1)
    engine.step([0], [40], [40])
    assert engine.step([0], [41], [1]).max() < 2e-3
    assert engine.impl.layer_plan.counters.totals.tolist() == [1, 0, 41, 1, 0]


def test_float8_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, [60, 90], float8=True)
    assert engine.step([0, 1], [40, 70], [40, 70]).max() < 2e-3
    for step in range(1, 12):  # across the ends of pages: 48 and 80
        assert engine.step([0, 1], [40 + step, 70 + step], [1, 1]).max() < 2e-3
        assert engine.dense_rows == []
    assert 0 < int(engine.impl.layer_plan.counters.rows_read.max()) < int(engine.impl.layer_plan.counters.totals[2])


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


def test_what_warm_up_counted_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker.gpu_worker import Worker

    engine = Engine(monkeypatch, [60])
    engine.step([0], [40], [40])

    @functools.wraps(Worker.compile_or_warm_up_model)  # as vLLM's own is wrapped, for tracing
    def warm_up(worker: Any) -> str:
        engine.step([0], [41], [1])
        return "seconds"

    monkeypatch.setattr(Worker, "compile_or_warm_up_model", warm_up)
    forget_warm_up()
    forget_warm_up()  # once for each group of layers
    layer = SimpleNamespace(impl=engine.impl, backend=SimpleNamespace(name="TOPTHETA"))
    forward_context = {"model.layers.1.self_attn.attn": layer, "model.layers.0": SimpleNamespace()}
    worker = SimpleNamespace(
        vllm_config=SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=forward_context))
    )
    assert Worker.compile_or_warm_up_model(worker) == "seconds"
    assert engine.impl.layer_plan.counters.totals.tolist() == [0, 0, 0, 0, 0]
    engine.step([0], [42], [1])
    engine.step([0], [43], [1])
    assert engine.impl.layer_plan.counters.totals.tolist() == [2, 0, 42 + 43, 2, 0]


def test_a_dense_layer_is_flash_attentions(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, [60])
    engine.impl.layer_plan = None
    engine.step([0], [40], [40])
    engine.step([0], [41], [1])
    assert engine.dense_rows == [1]
