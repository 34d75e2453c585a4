"""Three layers of the CPU backend without an engine, on thresholds as served."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata

from tests.kernels.paged import empty_cache
from vllm_toptheta.backend import cpu
from vllm_toptheta.backend.plan import ALWAYS_SPARSE
from vllm_toptheta.kernels.cpu.cache import split_cache
from vllm_toptheta.reference import (
    causal_scores,
    gather_sequence,
    paged_top_theta_attention,
    relative_threshold,
)

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE = 9, 3, 64
SCALE = HEAD_SIZE**-0.5
TARGET_K = 128  # of calibrated thresholds
UNWRITTEN = 1e4


class Step(NamedTuple):
    """One engine step over all sequences."""

    seq_lens: list[int]
    query_lens: list[int]
    is_prefilling: list[bool]


class Harness:
    """Three layers of a model on pages in random order, with NaN in every tail that nobody has written.

    Keys and values that nobody has written are large: vLLM's own attention gives them a weight of 0, but multiplies.
    """

    def __init__(
        self,
        config: VllmConfig,
        block_size: int,
        max_lens: list[int],
        seed: int = 42,
        *,
        sinks: torch.Tensor | None = None,
        sliding_window: int | None = None,
    ) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.block_size = block_size
        self.dtype = config.model_config.dtype
        self.sinks, self.sliding_window = sinks, sliding_window
        with set_current_vllm_config(config):
            self.layers = [
                Attention(
                    NUM_HEADS,
                    HEAD_SIZE,
                    SCALE,
                    NUM_KV_HEADS,
                    cache_config=config.cache_config,
                    per_layer_sliding_window=sliding_window if index == 3 else None,
                    sinks=sinks,
                    prefix=f"model.layers.{index}.self_attn.attn",
                )
                for index in (0, 1, 3)
            ]
        names = [layer.layer_name for layer in self.layers]
        self.spec = self.layers[0].get_kv_cache_spec(config)
        self.builder = cpu.CpuMetadataBuilder(self.spec, names, config, torch.device("cpu"))
        self.automatic = self.builder.plan.automatic
        self.builder.plan = replace(self.builder.plan, automatic=ALWAYS_SPARSE)  # else all steps here would be dense
        width = max(-(-length // block_size) for length in max_lens)
        num_blocks = width * len(max_lens) + 1
        self.block_table = (torch.randperm(num_blocks - 1, generator=self.generator).int() + 1).view(-1, width)
        sizes = num_blocks, NUM_KV_HEADS, block_size, HEAD_SIZE
        code_bytes = self.builder.plan.code_bytes
        self.caches = [
            empty_cache(*sizes, self.spec.dtype, code_bytes=code_bytes).fill_(UNWRITTEN) for _ in self.layers
        ]

    def run(self, step: Step) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Random tokens through every layer: the query [num_tokens, heads, head_size] and each layer's output."""
        seq_lens, query_lens = torch.tensor(step.seq_lens), torch.tensor(step.query_lens)
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), query_lens.cumsum(0)])
        positions = torch.cat([torch.arange(n - q, n) for n, q in zip(step.seq_lens, step.query_lens, strict=True)])
        rows = torch.repeat_interleave(torch.arange(len(seq_lens)), query_lens)
        blocks = self.block_table[rows, positions // self.block_size].long()
        common = CommonAttentionMetadata(
            query_start_loc=starts.int(),
            query_start_loc_cpu=starts.int(),
            seq_lens=seq_lens.int(),
            num_reqs=len(seq_lens),
            num_actual_tokens=len(positions),
            max_query_len=max(step.query_lens),
            max_seq_len=max(step.seq_lens),
            block_table_tensor=self.block_table[: len(seq_lens)],
            slot_mapping=blocks * self.block_size + positions % self.block_size,
            is_prefilling=torch.tensor(step.is_prefilling),
        )
        metadata = self.builder.build(0, common)
        query = torch.randn(len(positions), NUM_HEADS, HEAD_SIZE, generator=self.generator).to(self.dtype)
        outputs = []
        for layer, cache in zip(self.layers, self.caches, strict=True):
            key, value = torch.randn(2, len(positions), NUM_KV_HEADS, HEAD_SIZE, generator=self.generator).to(
                self.dtype
            )
            layer.impl.do_kv_cache_update(layer, key, value, cache, common.slot_mapping)
            output = torch.full_like(query, torch.nan)
            outputs.append(layer.impl.forward(layer, query, key, value, cache, metadata, output))
        return query, outputs

    def counted(self) -> list[torch.Tensor]:
        """What the sparse layers counted."""
        found = []
        for layer in self.layers:
            if layer.impl.layer_plan is not None:
                found += layer.impl.layer_plan.counters.settled()
        return [buffer for buffer in found if buffer is not None]

    def expected(self, step: Step, query: torch.Tensor, layer: int) -> torch.Tensor:
        """The reference's output of one layer in float32: thresholds for decoding rows, dense otherwise."""
        starts = torch.tensor([0, *step.query_lens]).cumsum(0)
        threshold = torch.full((len(query), NUM_HEADS), -torch.inf)
        if layer > 0:
            for row, (new, prefilling) in enumerate(zip(step.query_lens, step.is_prefilling, strict=True)):
                if new <= self.builder.most_tokens and not prefilling:
                    for token in range(new):
                        threshold[starts[row] + token] = self.threshold(step, query, layer, row, token)
        return self.reference(step, query, layer, threshold).output

    def reference(self, step: Step, query: torch.Tensor, layer: int, threshold: torch.Tensor) -> Any:
        """What the reference makes of a layer's pages.

        Args:
            step: The last one.
            query: [num_tokens, num_heads, head_size].
            layer: Index of the layer.
            threshold: [num_tokens, num_heads].
        """
        return paged_top_theta_attention(
            query,
            torch.cat(split_cache(self.caches[layer]), dim=-1),
            self.block_table,
            torch.tensor(step.seq_lens),
            torch.tensor([0, *step.query_lens]).cumsum(0),
            threshold=threshold,
            target_k=self.builder.plan.dense_rule.max_len,
            softmax_scale=SCALE,
            sinks=self.sinks,
        )

    def threshold(self, step: Step, query: torch.Tensor, layer: int, row: int, token: int = 0) -> torch.Tensor:
        """[num_heads]: the reference's threshold of one of a decoding sequence's new tokens."""
        length = step.seq_lens[row] - step.query_lens[row] + 1 + token
        floor = self.builder.plan.thresholds.weight_floor
        if floor is None:  # those of `conftest.STORED`
            return torch.full((NUM_HEADS,), 0.4 + 0.1 * math.log(max(length, 129)))
        cache = torch.cat(split_cache(self.caches[layer]), dim=-1)
        key, _ = gather_sequence(cache, self.block_table[row], length)
        asked = query[sum(step.query_lens[:row]) + token][None]
        scores = causal_scores(asked.float(), key.float(), softmax_scale=SCALE)
        return relative_threshold(scores, torch.tensor([length]), floor, sinks=self.sinks)[0]


def asking(harness: Harness, wishes: list[Any]) -> None:
    """Let the rows of the next step ask for something."""
    new = [
        SimpleNamespace(
            req_id=str(row), prompt_token_ids=[1], sampling_params=SimpleNamespace(extra_args={"toptheta": wish})
        )
        for row, wish in enumerate(wishes)
    ]
    ids = [request.req_id for request in new]
    harness.builder.requests.step(new, set(ids), ids)
