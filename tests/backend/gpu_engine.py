"""One sparse layer of the GPU backend without an engine; FlashAttention, which needs a GPU, is stood in for."""

from __future__ import annotations

from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.attention.backends import flash_attn
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl, FlashAttentionMetadataBuilder
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.worker.workspace import WorkspaceManager

from tests.kernels.decode_case import DEVICE
from tests.kernels.paged import empty_cache
from vllm_toptheta.backend import gpu
from vllm_toptheta.backend.gpu import FLOAT8, GpuTopThetaImpl
from vllm_toptheta.backend.pages import with_tail_rows
from vllm_toptheta.backend.plan import Plan
from vllm_toptheta.backend.request_choices import RequestChoices
from vllm_toptheta.backend.requests import RequestOffsets
from vllm_toptheta.kernels.contract import Counters
from vllm_toptheta.limits import NUM_ANCHORS
from vllm_toptheta.reference import (
    causal_scores,
    gather_sequence,
    paged_top_theta_attention,
    relative_threshold,
)
from vllm_toptheta.selection import ServedThresholds
from vllm_toptheta.settings import Settings
from vllm_toptheta.store import Architecture, ThresholdCurve

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 4, 2, 64, 16
SCALES = {"_q_scale": 0.9, "_k_scale": 1.1, "_v_scale": 0.7}  # of a layer with a float8 cache
SCALE, THETA, TARGET_K = HEAD_SIZE**-0.5, 0.5, 8


def make_plan(weight_floor: float | None = None, *, min_context: int | None = 0, refusal: str | None = None) -> Plan:
    """Two layers in mode `values`, the second of them sparse, with k:8 unless a floor is given."""
    if weight_floor is None:
        coefficients = np.full((2, NUM_HEADS, 1), THETA, np.float32)
        curve = ThresholdCurve(TARGET_K, coefficients, TARGET_K + 1, 4096, label="k:8")
        thresholds = ServedThresholds.calibrated(curve)
    else:
        thresholds = ServedThresholds.relative(weight_floor)
    return Plan(
        settings=Settings(min_context=min_context),
        thresholds=thresholds,
        model_id="acme/tiny",
        origin="a test",
        dense_layers=frozenset({0}),
        architecture=Architecture(
            num_layers=2, num_heads=NUM_HEADS, num_kv_heads=NUM_KV_HEADS, head_size=HEAD_SIZE, rope={}
        ),
        choices=RequestChoices(thresholds, any_floor=True, refusal=refusal),
    )


def asking(**wishes: Any) -> list[SimpleNamespace]:
    """New requests by name, and what each asks for."""
    return [
        SimpleNamespace(
            req_id=name, prompt_token_ids=[1], sampling_params=SimpleNamespace(extra_args=asked and {"toptheta": asked})
        )
        for name, asked in wishes.items()
    ]


class Engine:
    """One sparse layer and what vLLM does around it, step by step."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        max_lens: list[int],
        *,
        float8: bool = False,
        refusal: str | None = None,
        plan: Plan | None = None,
        sinks: torch.Tensor | None = None,
        tail_rows: str | None = None,
        num_drafts: int = 0,
    ) -> None:
        """Build it; `tail_rows` names the inner axes of pages with rows behind their tokens, outermost first."""
        monkeypatch.setattr(gpu, "max_verified", lambda vllm_config: 1 + num_drafts)
        self.float8, self.sinks = float8, sinks
        ones = SimpleNamespace(_q_scale=None, _k_scale=None, _v_scale=None)
        scales = {name: torch.tensor(value, device=DEVICE) for name, value in SCALES.items()}
        self.layer = SimpleNamespace(**scales) if float8 else ones
        self.generator = torch.Generator().manual_seed(7)
        self.dense_rows: list[int] = []
        monkeypatch.setattr(FlashAttentionMetadataBuilder, "__init__", flash_attention_builder)
        monkeypatch.setattr(FlashAttentionMetadataBuilder, "build", self.flash_attention_build)
        monkeypatch.setattr(FlashAttentionImpl, "forward", self.flash_attention_forward)
        if DEVICE == "cpu":
            monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)  # what grows there empties a GPU's
        self.manager = WorkspaceManager(torch.device(DEVICE))
        monkeypatch.setattr(gpu, "current_workspace_manager", lambda: self.manager)
        plan = plan or make_plan(refusal=refusal)
        monkeypatch.setattr(Plan, "resolve", lambda vllm_config: plan)
        monkeypatch.setattr(
            gpu, "request_offsets", lambda choices, config, rows, device: RequestOffsets(choices, rows, device)
        )
        monkeypatch.setattr(gpu, "get_tensor_model_parallel_rank", lambda: 0)
        for hook in ("warm_up", "sleep"):
            monkeypatch.setattr(gpu, hook, SimpleNamespace(install=lambda: None))
        # vLLM looks for layers of this class; its own constructor would choose the platform's backend
        attention = Attention.__new__(Attention)
        torch.nn.Module.__init__(attention)
        monkeypatch.setattr(flash_attn, "flash_attn_supports_sinks", lambda: True, raising=False)
        sizes = NUM_HEADS, HEAD_SIZE, SCALE, NUM_KV_HEADS
        attention.impl = GpuTopThetaImpl(*sizes, None, None, "auto", sinks=sinks)
        self.impl = attention.impl
        self.impl.kv_cache_dtype = "fp8" if float8 else "auto"  # whether a card has it is not what is tested
        name = "model.layers.1.self_attn.attn"
        config = SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_seqs=len(max_lens)),
            model_config=SimpleNamespace(max_model_len=max(max_lens)),
            compilation_config=SimpleNamespace(
                static_forward_context={name: attention}, max_cudagraph_capture_size=None
            ),
        )
        spec = FullAttentionSpec(
            block_size=BLOCK_SIZE,
            num_kv_heads=NUM_KV_HEADS,
            head_size=HEAD_SIZE,
            dtype=torch.uint8 if float8 else torch.float16,
        )
        spec = with_tail_rows(spec) if tail_rows else spec
        self.builder = gpu.GpuMetadataBuilder(spec, [name], config, torch.device(DEVICE))
        width = max(-(-length // BLOCK_SIZE) for length in max_lens)
        num_blocks = 1 + width * len(max_lens)
        order = torch.randperm(num_blocks - 1, generator=self.generator).int() + 1
        self.block_table = order.view(len(max_lens), width).to(DEVICE)
        dtype = FLOAT8 if float8 else torch.float16
        pages = empty_cache(num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_SIZE, dtype, DEVICE, code_bytes=plan.code_bytes)
        self.pages = self.kv_cache = pages.view(torch.uint8) if float8 else pages  # vLLM hands over bytes
        if tail_rows:
            shape = {"B": num_blocks, "H": NUM_KV_HEADS, "N": BLOCK_SIZE + 1, "C": 2 * HEAD_SIZE}
            order = f"B{tail_rows}C"
            memory = torch.full([shape[axis] for axis in order], torch.nan, dtype=torch.float16, device=DEVICE)
            self.pages = memory.permute([order.index(axis) for axis in "BHNC"])
            self.kv_cache = self.pages[:, :, :-1]

    def step(
        self,
        rows: list[int],
        seq_lens: list[int],
        query_lens: list[int],
        offsets: list[float] | None = None,
        prompts: Collection[int] = (),
        num_padded: int = 0,
    ) -> torch.Tensor:
        """Run one step over the sequences in `rows`, some of which are in their prompts.

        Args:
            rows: Sequences.
            seq_lens, query_lens: Their tokens, and how many of them are new.
            offsets: What the thresholds of each are shifted by.
            prompts: Those in their prompts.
            num_padded: Rows without tokens behind them, as in a graph of more sequences.

        Returns:
            [num_tokens], the largest error of each against the reference's.
        """
        known = torch.tensor([row in prompts for row in rows])
        rows, seq_lens, query_lens = ([*one, *[0] * num_padded] for one in (rows, seq_lens, query_lens))
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
            # the V2 model runner knows nothing of rows that are padded
            is_prefilling=known,
        )
        self.dense_rows = []
        output = torch.full_like(query, torch.nan, dtype=torch.float16)
        self.impl.forward(self.layer, query, query, query, self.pages, self.builder.build(0, common), output)
        threshold = torch.full((len(query), NUM_HEADS), -torch.inf)
        for row, (start, new, offset) in enumerate(
            zip(starts.tolist()[:-1], query_lens, offsets or [0.0] * len(rows), strict=True)
        ):
            if new <= self.builder.max_query_len and not self.builder.is_verifying and rows[row] not in prompts:
                for token in range(start, start + new):
                    length = seq_lens[row] - (start + new - 1 - token)
                    threshold[token] = self.threshold(query[token], block_table[row], length) + offset
        expected = self.reference(query, block_table, lens, starts, threshold)
        return (output.float() - expected).abs().amax(dim=(1, 2))

    def threshold(self, query: torch.Tensor, block_row: torch.Tensor, length: int) -> torch.Tensor:
        """[num_heads]: that of a sequence whose request asked for nothing."""
        weight_floor = self.builder.plan.thresholds.weight_floor
        if weight_floor is None:
            return torch.full((NUM_HEADS,), THETA)
        if length <= NUM_ANCHORS:
            return torch.full((NUM_HEADS,), -torch.inf)
        key, _ = gather_sequence(self.scaled_cache(), block_row, length)
        scores = causal_scores(self.scaled(query[None]).float(), key.float(), softmax_scale=SCALE)
        lengths = torch.tensor([length], device=DEVICE)
        return relative_threshold(scores, lengths, weight_floor, sinks=self.sinks)[0].cpu()

    def random(self, num_tokens: int, num_heads: int) -> torch.Tensor:
        values = torch.randn(num_tokens, num_heads, HEAD_SIZE, generator=self.generator)
        return values.to(FLOAT8 if self.float8 else torch.float16).to(DEVICE)

    def reference(self, query: torch.Tensor, block_table: Any, lens: Any, starts: Any, threshold: Any) -> torch.Tensor:
        return paged_top_theta_attention(
            self.scaled(query),
            self.scaled_cache(),
            block_table,
            lens,
            starts,
            threshold=threshold.to(query.device),
            target_k=0,
            softmax_scale=SCALE,
            sinks=self.sinks,
        ).output

    def scaled(self, query: torch.Tensor) -> torch.Tensor:
        """What queries stand for."""
        return query.float() * SCALES["_q_scale"] if self.float8 else query

    def scaled_cache(self) -> torch.Tensor:
        """What the cache stands for."""
        if not self.float8:
            return self.kv_cache
        scale = torch.tensor([SCALES["_k_scale"], SCALES["_v_scale"]], device=DEVICE)
        return self.kv_cache.view(FLOAT8).float() * scale.repeat_interleave(HEAD_SIZE)

    def flash_attention_build(self, prefix: int, common: CommonAttentionMetadata, fast_build: bool = False) -> Any:
        return SimpleNamespace(
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            query_start_loc=common.query_start_loc,
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
        )

    def flash_attention_forward(
        self, layer: Any, query: torch.Tensor, key: Any, value: Any, kv_cache: Any, metadata: Any, output: Any, *_: Any
    ) -> torch.Tensor:
        self.dense_rows.append(metadata.num_actual_tokens)
        assert kv_cache.shape == self.kv_cache.shape
        everything = torch.full((len(query), NUM_HEADS), -torch.inf)
        output.copy_(
            self.reference(query, metadata.block_table, metadata.seq_lens, metadata.query_start_loc, everything)
        )
        return output

    @property
    def reserved_bytes(self) -> int:
        """Of vLLM's scratch memory."""
        return sum(buffer.numel() for buffer in self.manager._current_workspaces if buffer is not None)


class ShadowModeEngine(Engine):
    """The engine in mode `shadow`; what is expected of decoding rows, and of full pages, its subclasses say."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, max_lens: list[int], *, plan: Plan, float8: bool) -> None:
        super().__init__(monkeypatch, max_lens, plan=plan, float8=float8)
        self.keys_read = 0

    def reference(self, query: torch.Tensor, block_table: Any, lens: Any, starts: Any, threshold: Any) -> torch.Tensor:
        output = super().reference(query, block_table, lens, starts, threshold)
        for row, (length, start, end) in enumerate(
            zip(lens.tolist(), starts.tolist()[:-1], starts.tolist()[1:], strict=True)
        ):
            if end - start == 1 and bool(threshold[start].isfinite().all()):
                output[start] = self.decoded(query[start:end], block_table[row], length, threshold[start].cpu())
            elif end - start == 1:
                self.keys_read += length
        return output

    def decoded(
        self, query: torch.Tensor, block_row: torch.Tensor, length: int, threshold: torch.Tensor
    ) -> torch.Tensor:
        """[num_heads, head_size]: what a sequence's new token should get; its keys are added to `keys_read`."""
        raise NotImplementedError

    def check_tails(self, row: int, length: int) -> None:
        """What the tails of a sequence's full pages hold is the reference's."""
        raise NotImplementedError

    def run_mixed_steps(self, tolerance: float) -> Counters:
        """Prefill sequences of up to 310, 390 and 90 tokens, decode two beside the rest of the third, then all."""
        assert self.step([0, 1, 2], [300, 370, 33], [300, 370, 33]).max() < 3e-3
        assert self.dense_rows == [703]
        self.check_tails(1, 370)
        # decoding sequences stand in front
        assert self.step([0, 1, 2], [301, 371, 53], [1, 1, 20]).max() < tolerance
        assert self.dense_rows == [20]
        for step in range(1, 5):  # across the ends of pages: 304 and 56
            lens = [301 + step, 371 + step, 53 + step]
            assert self.step([0, 1, 2], lens, [1, 1, 1]).max() < tolerance, lens
            assert self.dense_rows == []
        self.check_tails(0, 305)
        self.check_tails(1, 375)
        counters = self.impl.layer_plan.counters.buffers
        decoded, dense, cached, steps, asked = counters.totals.tolist()
        assert (decoded, dense, steps, asked) == (2 + 3 * 4, 4, 1 + 4, 0)
        assert 0 < int(counters.value_rows_read[0]) <= int(counters.keys_read[0]) < cached
        assert float(counters.lost_mass.min()) > 0
        return counters


def flash_attention_builder(
    builder: Any, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
) -> None:
    """What our builder needs of its parent's constructor, which asks for a GPU's FlashAttention."""
    AttentionMetadataBuilder.__init__(builder, kv_cache_spec, layer_names, vllm_config, device)
    builder._init_reorder_batch_threshold = lambda threshold: setattr(builder, "reorder_batch_threshold", threshold)
