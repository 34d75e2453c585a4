"""The backend on vLLM's CPU platform.

It composes the kernels of `vllm_toptheta.kernels.cpu`: every token of a prompt attends densely, unless the option
`prefill` says otherwise, and every generated token goes through the thresholds. It owns its cache layout (K and V of a
token side by side, head by head), so it shares nothing with vLLM's own CPU kernels, which repack their pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
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
from vllm_toptheta.backend.guard_monitor import GuardMonitor
from vllm_toptheta.backend.hooks import page_tails
from vllm_toptheta.backend.levels import COMMON, DENSE
from vllm_toptheta.backend.pages import more_memory
from vllm_toptheta.backend.plan import LayerPlan, Plan
from vllm_toptheta.backend.requests import RequestLevels, request_levels
from vllm_toptheta.errors import UnsupportedError
from vllm_toptheta.kernels import cpu as kernels
from vllm_toptheta.kernels.cpu_prefill import prefill, sparse_prefill
from vllm_toptheta.kernels.cpu_shadow import decode_shadow, write_codes
from vllm_toptheta.kernels.pages import codes_view, value_sum_view

if TYPE_CHECKING:
    from vllm.v1.kv_cache_layout import KVCacheLayout


@dataclass(frozen=True)
class PrefillChunk:
    """Tokens of one sequence that are not decoded: part of a prompt, or computed again after a preemption."""

    tokens: slice  # in the step's flat token axis
    block_table: torch.Tensor  # [max_blocks] int32
    seq_len: int
    rule: torch.Tensor  # [4] int64, see `kernels.rules`


@dataclass(frozen=True)
class StepMetadata(AttentionMetadata):
    """One step, prepared once for all layers.

    Attributes:
        decodes: The sequences that decode, or None.
        decode_tokens: Where their tokens stand in the flat token axis: [num_decodes] int64, or a slice.
        length_powers: [num_decodes, degree + 1] float32, see `Plan.length_powers`; None if no threshold applies.
        log_lengths: [num_decodes] float32, see `Plan.log_lengths`.
        levels: [num_decodes] int64, whose thresholds apply, or the one of all.
        is_dense: [num_decodes, 1] bool, sequences that keep every key.
        is_counted: [num_decodes, 1] int64, 1 where thresholds of level 0 apply.
        totals: [5] int64, what the step adds to `LayerCounters.totals`.
        prefills: Everything that is not decoding.
        closed_pages: Pages that become full, or None.
    """

    decodes: kernels.DecodeBatch | None
    decode_tokens: torch.Tensor | slice
    length_powers: torch.Tensor | None
    log_lengths: torch.Tensor
    levels: torch.Tensor | int
    is_dense: torch.Tensor
    is_counted: torch.Tensor
    totals: torch.Tensor
    prefills: list[PrefillChunk]
    closed_pages: kernels.ClosedPages | None


class CpuMetadataBuilder(BuilderCapabilities, AttentionMetadataBuilder[StepMetadata]):
    """Prepares each step, and tells the layers of its KV cache group who they are."""

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.plan = Plan.resolve(vllm_config)
        if get_tensor_model_parallel_rank() == 0:
            self.plan.log(more_memory=more_memory(kv_cache_spec, self.plan.code_bytes))
        self.requests = request_levels(self.plan.levels, vllm_config, vllm_config.scheduler_config.max_num_seqs)
        layer_plans = []
        for name, layer in get_layers_from_vllm_config(vllm_config, Attention, layer_names).items():
            if isinstance(layer.impl, CpuTopThetaImpl):
                layer.impl.bind(self.plan, extract_layer_index(name), self.requests)
                layer_plans += [layer.impl.layer_plan] if layer.impl.layer_plan else []
        self.guard_monitor = GuardMonitor(layer_plans, relaxes=self.plan.settings.guard == "relax")

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> StepMetadata:
        self.guard_monitor.step()
        common = common_attn_metadata
        block_size = self.kv_cache_spec.block_size
        starts = common.query_start_loc_cpu[: common.num_reqs + 1].long()
        query_lens = starts.diff()
        seq_lens = common.seq_lens[: common.num_reqs].long()
        block_table = common.block_table_tensor[: common.num_reqs]
        is_decode = query_lens == 1
        if common.is_prefilling is not None:
            # the last token of a prompt is dense too, also when it is the only one left to compute
            is_decode &= ~common.is_prefilling[: common.num_reqs]
        rules = self.requests.rules.long()
        decode_rows = torch.nonzero(is_decode).flatten()
        prefills = [
            PrefillChunk(
                slice(int(starts[row]), int(starts[row + 1])), block_table[row], int(seq_lens[row]), rules[row]
            )
            for row in torch.nonzero(~is_decode & (query_lens > 0)).flatten().tolist()
        ]
        lengths = seq_lens[decode_rows]
        levels, dense_lengths, _, _ = rules[decode_rows].unbind(dim=1)
        is_dense, is_common = lengths <= dense_lengths, levels == COMMON
        return StepMetadata(
            decodes=(
                kernels.DecodeBatch.of_step(block_table[decode_rows], lengths, block_size) if len(decode_rows) else None
            ),
            decode_tokens=starts[:-1][decode_rows] if prefills else slice(0, len(decode_rows)),
            length_powers=None if bool(is_dense.all()) else self.plan.length_powers(lengths, rules[decode_rows]),
            log_lengths=self.plan.log_lengths(lengths, rules[decode_rows]),
            levels=COMMON if bool(is_common.all()) else levels,
            is_dense=is_dense[:, None],
            is_counted=(~is_dense & is_common).long()[:, None],
            totals=torch.tensor(
                [
                    len(lengths),
                    int((is_dense & is_common).sum()),
                    int(lengths.sum()),
                    len(lengths) > 0,
                    int((~is_common).sum()),
                ]
            ),
            prefills=prefills,
            closed_pages=kernels.ClosedPages.of_step(block_table, seq_lens - query_lens, seq_lens, block_size),
        )


class CpuTopThetaBackend(BackendCapabilities, AttentionBackend):
    """Heads of any size, 16-bit and 32-bit; vLLM's CPU platform asks through `support_checks.check_layer`."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]

    @staticmethod
    def get_impl_cls() -> type[CpuTopThetaImpl]:
        return CpuTopThetaImpl

    @staticmethod
    def get_builder_cls() -> type[CpuMetadataBuilder]:
        return CpuMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: AttentionSpec | None = None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        from vllm.v1.kv_cache_layout import KVCacheLayout

        return (KVCacheLayout.LBHNC,)


class CpuTopThetaImpl(ImplCapabilities, AttentionImpl[StepMetadata]):
    """One layer's attention on one rank."""

    supports_quant_query_input = False

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
        **unsupported: Any,
    ) -> None:
        refused = {
            "ALiBi": alibi_slopes is not None,
            "KV sharing between layers": kv_sharing_target_layer_name is not None,
            **{f"layer option {name}": value is not None for name, value in unsupported.items()},
        }
        if reasons := [reason for reason, applies in refused.items() if applies]:
            raise UnsupportedError(
                f"attention backend toptheta does not support {', '.join(reasons)}",
                remedy="Serve this model without --attention-backend toptheta",
            )
        page_tails.install()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.sliding_window = sliding_window
        self.logits_soft_cap = logits_soft_cap or None
        self.plan: Plan | None = None
        self.layer_plan: LayerPlan | None = None  # None in a dense layer
        self.requests: RequestLevels | None = None

    def bind(self, plan: Plan, layer: int, requests: RequestLevels) -> None:
        """Take this layer's share of the plan; vLLM may build its metadata builders more than once."""
        if self.plan is None:
            self.plan, self.requests = plan, requests
            if self.sliding_window is None:
                self.layer_plan = plan.for_layer(
                    layer,
                    num_heads=self.num_heads,
                    num_kv_heads=self.num_kv_heads,
                    rank=get_tensor_model_parallel_rank(),
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
        kernels.write_kv(key[:tokens], value[:tokens], kv_cache, slot_mapping)

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
        if attn_metadata is None:
            return output.zero_()
        step = attn_metadata
        uses_mean = self.layer_plan is not None and self.layer_plan.value_mean_compensation
        value_sum = value_sum_view(kv_cache) if uses_mean else None
        if value_sum is not None and step.closed_pages is not None:
            kernels.close_pages(kv_cache, value_sum, step.closed_pages)
        shadow = None if self.layer_plan is None else self.layer_plan.shadow
        if shadow is not None and step.closed_pages is not None:
            # before anything is decoded: a sequence may stand on pages that another one fills in this very step
            codes = codes_view(kv_cache, shadow.code_bytes)
            write_codes(kv_cache, codes, step.closed_pages, projection=shadow.projection)
        if step.decodes is not None:
            decoded = self._decode(query[step.decode_tokens], kv_cache, step, step.decodes, value_sum)
            output[step.decode_tokens] = decoded.to(output.dtype)
        for chunk in step.prefills:
            output[chunk.tokens] = self._prefill(query[chunk.tokens], kv_cache, chunk).to(output.dtype)
        return output

    def _prefill(self, query: torch.Tensor, kv_cache: torch.Tensor, chunk: PrefillChunk) -> torch.Tensor:
        """[num_tokens, num_heads, head_size] for tokens of a prompt."""
        attend = partial(
            prefill,
            query,
            kv_cache,
            chunk.block_table,
            seq_len=chunk.seq_len,
            softmax_scale=self.scale,
            logits_soft_cap=self.logits_soft_cap,
        )
        plan, layer_plan = self.plan, self.layer_plan
        if plan is None or layer_plan is None or plan.settings.prefill == "dense":
            return attend(sliding_window=self.sliding_window)
        lengths = torch.arange(chunk.seq_len - len(query) + 1, chunk.seq_len + 1)
        level, dense_length, _, _ = chunk.rule.tolist()
        powers = plan.length_powers(lengths, chunk.rule)
        if powers is None or level == DENSE:
            return attend()
        threshold = layer_plan.thresholds(powers, level)
        threshold[lengths <= dense_length] = -torch.inf
        return sparse_prefill(
            query,
            kv_cache,
            chunk.block_table,
            seq_len=chunk.seq_len,
            threshold=threshold,
            softmax_scale=self.scale,
            logits_soft_cap=self.logits_soft_cap,
            denominator_compensation=layer_plan.denominator_compensation,
            value_mean_compensation=layer_plan.value_mean_compensation,
        )

    def _decode(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        step: StepMetadata,
        decodes: kernels.DecodeBatch,
        value_sum: torch.Tensor | None,
    ) -> torch.Tensor:
        """[num_decodes, num_heads, head_size] float32 for the step's decoding sequences."""
        layer_plan = self.layer_plan
        if layer_plan is None or step.length_powers is None:
            # also where all sequences are too short for thresholds
            result = kernels.decode(
                query,
                kv_cache,
                decodes,
                softmax_scale=self.scale,
                logits_soft_cap=self.logits_soft_cap,
                sliding_window=self.sliding_window,
            )
        else:
            threshold = layer_plan.thresholds(step.length_powers, step.levels).masked_fill(step.is_dense, -torch.inf)
            result = self._decode_sparsely(query, kv_cache, step, decodes, layer_plan, threshold, value_sum)
        if layer_plan is not None:
            keys_read = None
            if layer_plan.shadow is not None:
                keys_read = result.value_rows_read if result.keys_read is None else result.keys_read
            layer_plan.counters.add(
                step.totals,
                is_counted=step.is_counted,
                rows_read=result.value_rows_read,
                lost_mass=result.lost_mass,
                keys_read=keys_read,
            )
        return result.output

    def _decode_sparsely(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        step: StepMetadata,
        decodes: kernels.DecodeBatch,
        layer_plan: LayerPlan,
        threshold: torch.Tensor,
        value_sum: torch.Tensor | None,
    ) -> kernels.DecodeResult:
        """Decode by thresholds, [num_decodes, num_heads], -inf for sequences that keep every key."""
        options: dict[str, Any] = {
            "threshold": threshold,
            "softmax_scale": self.scale,
            "logits_soft_cap": self.logits_soft_cap,
            "denominator_compensation": layer_plan.denominator_compensation,
            "value_sum": value_sum,
        }
        shadow = layer_plan.shadow
        if shadow is None:
            return kernels.decode(query, kv_cache, decodes, **options)
        return decode_shadow(
            query,
            kv_cache,
            codes_view(kv_cache, shadow.code_bytes),
            decodes,
            projection=shadow.projection,
            margin=shadow.margin[step.levels].expand_as(threshold),
            scale=shadow.scales(step.log_lengths, step.levels),
            num_sink=shadow.num_sink,
            num_recent=shadow.num_recent,
            **options,
        )
