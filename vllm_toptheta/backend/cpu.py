"""The backend on vLLM's CPU platform.

Every generated token goes through the thresholds, by the kernels of `vllm_toptheta.kernels.cpu`; prompts, and steps in
which a layer is dense, are left to vLLM's own attention (`cpu_native`), or to torch where that does not serve them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionLayer,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_toptheta.backend.capabilities import BackendCapabilities, BuilderCapabilities, ImplCapabilities
from vllm_toptheta.backend.cpu_native import NativeAttention, NativeStep
from vllm_toptheta.backend.guard_monitor import GuardMonitor
from vllm_toptheta.backend.hooks import nixl_pages
from vllm_toptheta.backend.layers import choose_tail_writers
from vllm_toptheta.backend.pages import more_memory
from vllm_toptheta.backend.plan import ALWAYS_SPARSE, DenseRule, Plan
from vllm_toptheta.backend.requests import request_offsets
from vllm_toptheta.backend.sparse_layer import SparseLayer
from vllm_toptheta.backend.support_checks import check_no_chunks, check_sharing, connector_of
from vllm_toptheta.errors import UnsupportedError
from vllm_toptheta.kernels.contract import DecodeStep, LayerCache, LayerCall, TailStep
from vllm_toptheta.kernels.cpu import values
from vllm_toptheta.kernels.cpu.batch import prepare_decode, prepare_tails
from vllm_toptheta.kernels.cpu.cache import write_kv
from vllm_toptheta.kernels.cpu.decode_step import decode
from vllm_toptheta.kernels.cpu.prefill import prefill
from vllm_toptheta.kernels.cpu.scratch import CpuScratch
from vllm_toptheta.kernels.cpu.tails import write_tails
from vllm_toptheta.limits import BLOCK_MULTIPLE, MAX_QUERY_LEN
from vllm_toptheta.settings import Settings

if TYPE_CHECKING:
    from vllm.v1.kv_cache_layout import KVCacheLayout

logger = init_logger("vllm.toptheta")


@dataclass(frozen=True)
class PrefillChunk:
    """Tokens of one sequence that are not decoded: part of a prompt, or computed again after a preemption.

    Attributes:
        tokens: Where they stand in the step's flat token axis.
        block_table: [max_blocks] int32.
        seq_len: Cached tokens, these included.
    """

    tokens: slice
    block_table: torch.Tensor
    seq_len: int


@dataclass(frozen=True)
class StepMetadata(AttentionMetadata):
    """One step, prepared once for all layers.

    Attributes:
        decode: The sequences that decode, or None.
        decode_tokens: Where their tokens stand in the flat token axis: [num_decodes] int64, or a slice. Drafts that
            are not verified densely are a sequence each.
        prefills: Everything that is not decoding, where vLLM's own attention does not serve the layers.
        rest: The same for vLLM's own attention; None if there is nothing.
        whole: All sequences, for layers that are dense in this step; None as `rest`.
        tails: All sequences.
    """

    decode: DecodeStep | None
    decode_tokens: torch.Tensor | slice
    prefills: list[PrefillChunk]
    rest: NativeStep | None
    whole: NativeStep | None
    tails: TailStep


class CpuMetadataBuilder(BuilderCapabilities, AttentionMetadataBuilder[StepMetadata]):
    """Prepares each step, and tells the layers of its KV cache group who they are."""

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        check_no_chunks(layers)
        check_sharing(layers, vllm_config)
        dtype = vllm_config.model_config.dtype
        self.native = NativeAttention.of(kv_cache_spec, layers, dtype)
        connector = connector_of(vllm_config)
        self.has_connector = connector is not None
        if connector is not None and connector.is_nixl:
            nixl_pages.install()
        plan = Plan.resolve(vllm_config)
        self.plan = replace(plan, automatic=self._best_dense(plan, kv_cache_spec))
        rank = get_tensor_model_parallel_rank()
        if rank == 0:
            self.plan.log(more_memory=more_memory(kv_cache_spec, self.plan.code_bytes))
            if self.plan.code_bytes:
                logger.warning_once("toptheta: mode shadow is for trying on CPUs, where it is slower than mode values")
        self.most_tokens = _verified_tokens(plan.settings, vllm_config)
        self.requests = request_offsets(self.plan.choices, vllm_config, vllm_config.scheduler_config.max_num_seqs)
        layer_plans = []
        for name, layer in layers.items():
            impl = layer.impl
            if isinstance(impl, CpuTopThetaImpl):
                impl.native = self.native
                layer_idx = extract_layer_index(name)
                impl.bind(self.plan, layer_idx, self.requests, rank=rank, sliding_window=impl.sliding_window)
                layer_plans += [impl.layer_plan] if impl.layer_plan else []
        choose_tail_writers(layers)
        spec = kv_cache_spec
        if (compiled := values.compiled_for(spec.dtype, spec.head_size, spec.block_size)) is not None:
            logger.info_once("toptheta: compiling for this CPU, which takes some seconds where it was not kept on disk")
            compiled.warm_up(spec.dtype)
        self.guard_monitor = GuardMonitor(layer_plans, relaxes=self.plan.settings.guard == "relax")

    def _best_dense(self, plan: Plan, spec: AttentionSpec) -> DenseRule:
        """Which steps thresholds would make no faster; none in mode `shadow`, which nobody serves on CPUs for speed."""
        if self.native is None or plan.code_bytes:
            return ALWAYS_SPARSE
        return DenseRule(0, values.min_step_tokens(spec.num_kv_heads, spec.head_size))

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> StepMetadata:
        common = common_attn_metadata
        starts = common.query_start_loc_cpu[: common.num_reqs + 1]
        query_lens = starts.diff()
        seq_lens = common.seq_lens[: common.num_reqs]
        block_table = common.block_table_tensor[: common.num_reqs]
        is_decode = query_lens > 0
        if self.plan.settings.lossless:
            # what is answered is dense, except where a request does without; drafts are asked for below
            is_lossy = torch.zeros_like(is_decode)
            is_lossy[self.requests.lossy_rows] = True
            is_decode &= is_lossy
        else:
            self.guard_monitor.step()
        is_decode &= query_lens <= (1 if common.is_prefilling is None else self.most_tokens)
        if common.is_prefilling is not None:
            # the last token of a prompt is dense too, also when it is the only one left to compute
            is_decode &= ~common.is_prefilling[: common.num_reqs]
        # of a sequence's tokens, each is decoded as if it were the last
        row_of = torch.arange(len(query_lens)).repeat_interleave(query_lens)
        tokens = torch.nonzero(is_decode[row_of]).flatten()
        rows = row_of[tokens]
        lengths = seq_lens[rows] - (starts[1:][rows] - 1 - tokens).to(seq_lens.dtype)
        others = torch.nonzero(~is_decode & (query_lens > 0)).flatten()
        whole = rest = None
        prefills = []
        if self.native is None:
            prefills = [
                PrefillChunk(slice(int(starts[row]), int(starts[row + 1])), block_table[row], int(seq_lens[row]))
                for row in others.tolist()
            ]
        else:
            whole = NativeStep(
                self.native,
                slice(0, int(starts[-1])),
                query_start_loc=starts,
                seq_lens=seq_lens,
                block_table=block_table,
            )
            if len(others) == len(query_lens):
                rest = whole
            elif len(others):
                rest = NativeStep.of_rows(self.native, others, starts, seq_lens, block_table)
        return StepMetadata(
            decode=self._decode_step(block_table[rows], lengths, rows),
            decode_tokens=tokens if len(others) else slice(0, len(tokens)),
            prefills=prefills,
            rest=rest,
            whole=whole,
            tails=prepare_tails(
                TailStep(block_table, seq_lens, starts, max_query_len=common.max_query_len),
                self.kv_cache_spec.block_size,
                # connectors bring keys and values, and no tails
                self.requests.arrived_rows if self.has_connector else (),
            ),
        )

    def build_for_drafting(self, common_attn_metadata: CommonAttentionMetadata, draft_index: int) -> StepMetadata:
        """A step of what drafts, one token per sequence; nobody looks at that of a sequence of length 0."""
        self.guard_monitor.step()
        common = common_attn_metadata
        rows = torch.nonzero(common.seq_lens[: common.num_reqs] > 0).flatten()
        block_table, seq_lens = common.block_table_tensor[rows], common.seq_lens[rows]
        starts = torch.arange(len(rows) + 1, dtype=torch.int32)
        return StepMetadata(
            decode=self._decode_step(block_table, seq_lens, rows),
            decode_tokens=rows,
            prefills=[],
            rest=None,
            whole=None,
            tails=prepare_tails(
                TailStep(block_table, seq_lens, starts, max_query_len=1), self.kv_cache_spec.block_size
            ),
        )

    def _decode_step(self, block_table: torch.Tensor, seq_lens: torch.Tensor, rows: torch.Tensor) -> DecodeStep | None:
        """What decodes; None if nothing does.

        Args:
            block_table: [num_decodes, max_blocks] int32.
            seq_lens: [num_decodes] int32.
            rows: [num_decodes] int64, where the sequences stand in the batch.
        """
        if not len(rows):
            return None
        rule = self.plan.dense_rule
        per_row = 1 if self.plan.settings.lossless else len(rows) / len(rows.unique())
        step = DecodeStep(
            block_table,
            seq_lens,
            max_dense_len=rule.max_len,
            # vLLM's own attention reads a sequence's keys for all of its tokens at once
            min_step_tokens=round(rule.min_step_tokens * per_row**2),
            length_range=self.plan.length_range,
            threshold_offset=self.requests.offsets[rows],
        )
        return prepare_decode(step, self.kv_cache_spec.block_size)


def _verified_tokens(settings: Settings, vllm_config: Any) -> int:
    """Tokens of a sequence, drafts included, that are decoded in one step, each as if it were the last.

    Args:
        settings: The options in force.
        vllm_config: The engine's.
    """
    if settings.lossless:
        return 1 + settings.most_draft_tokens
    speculative = vllm_config.speculative_config
    # with more drafts, a sequence is verified densely
    return MAX_QUERY_LEN if speculative is not None else 1


class CpuTopThetaBackend(BackendCapabilities, AttentionBackend):
    """Heads of any size, 16-bit and 32-bit; vLLM's CPU platform asks through `support_checks.check_layer`."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]

    @staticmethod
    def get_impl_cls() -> type[CpuTopThetaImpl]:
        return CpuTopThetaImpl

    @staticmethod
    def get_builder_cls() -> type[CpuMetadataBuilder]:
        return CpuMetadataBuilder

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: AttentionSpec | None = None) -> list[int | MultipleOf]:
        return [MultipleOf(BLOCK_MULTIPLE)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        from vllm.v1.kv_cache_layout import KVCacheLayout

        return (KVCacheLayout.LBHNC,)


class CpuTopThetaImpl(SparseLayer, ImplCapabilities, AttentionImpl[StepMetadata]):
    """One layer's attention on one rank.

    Attributes:
        native: vLLM's own attention for the layer's group; None where it does not serve them.
    """

    supports_quant_query_input = False
    native: NativeAttention | None = None
    _cache: LayerCache | None = None

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **unsupported: Any,
    ) -> None:
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.sliding_window = sliding_window
        self.logits_soft_cap = logits_soft_cap
        self.sinks = sinks
        self._uncounted = CpuScratch()  # of a dense layer
        self.prepare(
            {
                "ALiBi": alibi_slopes is not None,
                **{f"layer option {name}": value is not None for name, value in unsupported.items()},
            }
        )

    def do_kv_cache_update(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        tokens = len(slot_mapping)
        write = write_kv if self.native is None else self.native.write
        write(key[:tokens], value[:tokens], kv_cache, slot_mapping)

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: StepMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend, reading keys and values from the cache only.

        Args:
            layer: Unused.
            query: [num_tokens, num_heads, head_size].
            key, value: Unused; `do_kv_cache_update` has written them.
            kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size].
            attn_metadata: The step; None while vLLM profiles.
            output: [num_tokens, num_heads, head_size], written in place.
            output_scale, output_block_scale: Fused output quantisation, not supported.
        """
        if output_scale is not None or output_block_scale is not None:
            raise UnsupportedError("attention backend toptheta does not quantise its output")
        if attn_metadata is None or self.layer is None:
            return output.zero_()
        step = attn_metadata
        if self._cache is None or self._cache.kv_cache is not kv_cache:
            self._cache = LayerCache.of(kv_cache, self.layer)
        if self.writes_tails:
            write_tails(step.tails, self._cache, self.layer)
        scratch = self._uncounted if self.layer_plan is None else self.layer_plan.counters.scratch
        if step.decode is not None and step.whole is not None and values.is_dense(step.decode, self.layer):
            step.whole.attend(self.layer, query, kv_cache, output)
            values.count_dense(step.decode, self.layer, self.num_heads, self.num_kv_heads, scratch)
            return output
        if step.decode is not None:
            tokens, decoded = step.decode_tokens, query[step.decode_tokens]
            target = output[tokens] if isinstance(tokens, slice) else torch.empty_like(decoded, dtype=output.dtype)
            decode(step.decode, LayerCall(decoded, target, self._cache, self.layer), scratch)
            if not isinstance(tokens, slice):
                output[tokens] = target
        if step.rest is not None:
            step.rest.attend(self.layer, query, kv_cache, output)
        for chunk in step.prefills:
            output[chunk.tokens] = prefill(
                query[chunk.tokens],
                kv_cache,
                chunk.block_table,
                seq_len=chunk.seq_len,
                softmax_scale=self.layer.softmax_scale,
                logits_soft_cap=self.layer.logits_soft_cap,
                sliding_window=self.layer.sliding_window,
                sinks=self.layer.sinks,
            )
        return output
