"""The backend on NVIDIA GPUs: FlashAttention for prompts and dense layers, Top-Theta for the tokens that are decoded.

It subclasses vLLM's FlashAttention backend and adds to it, on sparse layers only: page tails with running value sums
and shadow keys, and decode kernels that read surviving values, and in mode `shadow` few keys. Steps that only decode
run in FULL CUDA graphs, so there everything that depends on lengths is decided on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.worker.workspace import current_workspace_manager

from vllm_toptheta.backend.capabilities import (
    CACHE_DTYPES,
    FLOAT8_CACHE_DTYPES,
    BackendCapabilities,
    BuilderCapabilities,
    ImplCapabilities,
)
from vllm_toptheta.backend.guard_monitor import GuardMonitor
from vllm_toptheta.backend.hooks import page_tails, warm_up
from vllm_toptheta.backend.levels import COMMON
from vllm_toptheta.backend.pages import more_memory
from vllm_toptheta.backend.plan import LayerPlan, Plan
from vllm_toptheta.backend.requests import RequestLevels, request_levels
from vllm_toptheta.backend.versions import without_decodes
from vllm_toptheta.errors import UnsupportedError
from vllm_toptheta.kernels import decode as kernels
from vllm_toptheta.kernels.pages import codes_view, value_sum_view
from vllm_toptheta.kernels.shadow import ShadowWorkspace, decode_shadow
from vllm_toptheta.kernels.shadow_codes import write_codes
from vllm_toptheta.kernels.tuning import ShadowConfig, launch_config, num_multiprocessors
from vllm_toptheta.kernels.value_sums import close_pages
from vllm_toptheta.limits import HEAD_SIZES

FLOAT8 = torch.float8_e4m3fn  # what vLLM stores for `FLOAT8_CACHE_DTYPES`


@dataclass(frozen=True)
class StepSplit:
    """How a step is divided; decoding sequences stand in front of the batch.

    Attributes:
        num_decodes: Sequences with one new token, and as many tokens.
        prefill: FlashAttention's metadata of everything behind them, or None.
    """

    num_decodes: int
    prefill: FlashAttentionMetadata | None


def shadow_config(plan: Plan) -> ShadowConfig:
    """Launch parameters of mode `shadow`."""
    return ShadowConfig().scanning if plan.settings.always_shadow else ShadowConfig()


class GpuMetadataBuilder(BuilderCapabilities, FlashAttentionMetadataBuilder):
    """FlashAttention's metadata with a `StepSplit` attached as `toptheta`."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # FlashAttention's, which the instance says again
        self.supports_draft_decode_metadata_update = False
        self._init_reorder_batch_threshold(1)
        self.plan = Plan.resolve(vllm_config)
        max_num_seqs = vllm_config.scheduler_config.max_num_seqs
        if get_tensor_model_parallel_rank() == 0:
            config = shadow_config(self.plan)
            num_programs = config.num_programs(kv_cache_spec.num_kv_heads, num_multiprocessors(device))
            self.plan.log(
                more_memory=more_memory(kv_cache_spec, self.plan.code_bytes),
                scans=config.scans(max_num_seqs, vllm_config.model_config.max_model_len, num_programs=num_programs),
            )
        warm_up.install()
        # a captured graph may have more rows than there can be sequences
        max_num_rows = max(max_num_seqs, vllm_config.compilation_config.max_cudagraph_capture_size or 0)
        requests = request_levels(self.plan.levels, vllm_config, max_num_rows, device)
        layer_plans = []
        for name, layer in get_layers_from_vllm_config(vllm_config, Attention, layer_names).items():
            if isinstance(layer.impl, GpuTopThetaImpl):
                layer.impl.bind(self.plan, extract_layer_index(name), device, max_num_seqs, requests)
                layer_plans += [layer.impl.layer_plan] if layer.impl.layer_plan else []
        self.guard_monitor = GuardMonitor(layer_plans, relaxes=self.plan.settings.guard == "relax")

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> FlashAttentionMetadata:
        self.guard_monitor.step()
        common = common_attn_metadata
        metadata = super().build(0, common, fast_build)
        num_decodes, num_prefills, num_decode_tokens, _ = split_decodes_and_prefills(common, decode_threshold=1)
        prefill = None
        if num_decodes and num_prefills:
            # fast_build: a second ahead-of-time schedule in the same step would overwrite the first one's buffer
            prefill = super().build(0, without_decodes(common, num_decodes, num_decode_tokens), fast_build=True)
        elif num_prefills:
            prefill = metadata
        metadata.toptheta = StepSplit(num_decodes, prefill)
        return metadata

    def use_cascade_attention(self, *args: Any, **kwargs: Any) -> bool:
        return False


class GpuTopThetaBackend(BackendCapabilities, FlashAttentionBackend):
    """What is not declared here or in `BackendCapabilities` is as FlashAttention says: dtypes, block sizes, cards."""

    @staticmethod
    def get_impl_cls() -> type[GpuTopThetaImpl]:
        return GpuTopThetaImpl

    @staticmethod
    def get_builder_cls() -> type[GpuMetadataBuilder]:
        return GpuMetadataBuilder

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size in HEAD_SIZES and super().supports_head_size(head_size)

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: Any) -> bool:
        return kv_cache_dtype in (None, *CACHE_DTYPES, *FLOAT8_CACHE_DTYPES) and super().supports_kv_cache_dtype(
            kv_cache_dtype
        )


class GpuTopThetaImpl(ImplCapabilities, FlashAttentionImpl):
    """One layer's attention on one rank."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refused = {
            "ALiBi": self.alibi_slopes is not None,
            "KV sharing between layers": self.kv_sharing_target_layer_name is not None,
        }
        if reasons := [reason for reason, applies in refused.items() if applies]:
            raise UnsupportedError(
                f"attention backend toptheta does not support {', '.join(reasons)}",
                remedy="Serve this model without --attention-backend toptheta",
            )
        page_tails.install()
        self.plan: Plan | None = None
        self.layer_plan: LayerPlan | None = None  # None in a dense layer
        self.requests: RequestLevels | None = None

    def bind(self, plan: Plan, layer: int, device: torch.device, max_num_seqs: int, requests: RequestLevels) -> None:
        """Take this layer's share of the plan; vLLM may build its metadata builders more than once.

        Args:
            plan: The model's plan.
            layer: This layer's index in the model.
            device: Where the thresholds go.
            max_num_seqs: Sequences of the largest batch, for which the workspace is reserved.
            requests: What this rank's requests ask for.
        """
        if self.plan is None:
            self.plan, self.requests = plan, requests
            if self.sliding_window == (-1, -1):
                self.layer_plan = plan.for_layer(
                    layer,
                    num_heads=self.num_heads,
                    num_kv_heads=self.num_kv_heads,
                    rank=get_tensor_model_parallel_rank(),
                    device=device,
                )
        if self.layer_plan is not None:
            self._workspace(max_num_seqs, 1 if self.kv_cache_dtype in FLOAT8_CACHE_DTYPES else 2, device)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: FlashAttentionMetadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend; decoding sequences of a sparse layer by the thresholds, everything else by FlashAttention.

        Args and shapes are `FlashAttentionImpl.forward`'s.
        """
        if attn_metadata is None or self.layer_plan is None:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        split: StepSplit = attn_metadata.toptheta
        decodes = split.num_decodes
        # FlashAttention and vLLM's own kernels get the bytes, as always
        pages = kv_cache.view(FLOAT8) if self.kv_cache_dtype in FLOAT8_CACHE_DTYPES else kv_cache
        if split.prefill is not None:
            # tails also of the pages that decoded tokens fill: another sequence may stand on them in this very step
            if self.layer_plan.value_mean_compensation:
                close_pages(
                    pages,
                    value_sum_view(pages),
                    attn_metadata.block_table,
                    attn_metadata.seq_lens,
                    attn_metadata.query_start_loc,
                )
            shadow = self.layer_plan.shadow
            if shadow is not None:
                write_codes(
                    pages,
                    codes_view(pages, shadow.code_bytes),
                    attn_metadata.block_table,
                    attn_metadata.seq_lens,
                    attn_metadata.query_start_loc,
                    projection=shadow.projection,
                    max_query_len=attn_metadata.max_query_len,
                )
            super().forward(
                layer,
                query[decodes:],
                None if key is None else key[decodes:],
                None if value is None else value[decodes:],
                kv_cache,
                split.prefill,
                output[decodes:],
                output_scale,
                output_block_scale,
            )
        if decodes:
            self._decode(layer, query[:decodes], pages, attn_metadata, output[:decodes])
        return output

    def _decode(
        self,
        layer: Any,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: FlashAttentionMetadata,
        output: torch.Tensor,
    ) -> None:
        plan, layer_plan, requests = self.plan, self.layer_plan, self.requests
        if plan is None or plan.curve is None or layer_plan is None or requests is None:
            raise UnsupportedError("a dense layer reached the sparse decode")
        can_ask = plan.levels.refusal is None
        levels = slice(None) if can_ask else COMMON
        num_seqs = len(query)
        counters = layer_plan.counters
        is_quantized = kv_cache.dtype == FLOAT8
        block_table, seq_lens = metadata.block_table[:num_seqs], metadata.seq_lens[:num_seqs]
        options: dict[str, Any] = {
            "output": output,
            "workspace": self._workspace(num_seqs, kv_cache.element_size(), query.device),
            "coefficients": layer_plan.coefficients[levels],
            "rules": requests.rules if can_ask else None,
            "min_length": plan.curve.min_length,
            "max_length": plan.curve.max_length,
            "min_sparse_context": plan.min_sparse_context,
            "softmax_scale": self.scale,
            "logits_soft_cap": self.logits_soft_cap or None,
            "q_scale": layer._q_scale if is_quantized else None,
            "k_scale": layer._k_scale if is_quantized else None,
            "v_scale": layer._v_scale if is_quantized else None,
            "denominator_compensation": layer_plan.denominator_compensation,
            "value_sum": value_sum_view(kv_cache) if layer_plan.value_mean_compensation else None,
            "counters": kernels.DecodeCounters(
                counters.rows_read, counters.lost_mass, counters.lost_mass_histogram, counters.totals
            ),
        }
        shadow = layer_plan.shadow
        if shadow is None:
            kernels.decode(query, kv_cache, block_table, seq_lens, **options)
            return
        decode_shadow(
            query,
            kv_cache,
            codes_view(kv_cache, shadow.code_bytes),
            block_table,
            seq_lens,
            projection=shadow.projection,
            margin=shadow.margin[levels],
            log_scale=shadow.log_scale[levels],
            num_sink=shadow.num_sink,
            num_recent=shadow.num_recent,
            keys_read=counters.keys_read,
            config=shadow_config(plan),
            **options,
        )

    def _workspace(
        self, num_seqs: int, element_bytes: int, device: torch.device
    ) -> kernels.DecodeWorkspace | ShadowWorkspace:
        """vLLM's shared scratch memory; it grows while the engine warms up and is fixed from then on."""
        plan, shadow = self.plan, None if self.layer_plan is None else self.layer_plan.shadow
        sizes = num_seqs, self.num_heads, self.num_kv_heads, self.head_size
        num_sms = num_multiprocessors(device)
        share = current_workspace_manager().get_simultaneous
        config = launch_config(self.head_size, element_bytes, device)
        if plan is None or shadow is None:
            return kernels.DecodeWorkspace(*share(*kernels.DecodeWorkspace.spec(*sizes, config, num_sms)))
        spec = ShadowWorkspace.spec(*sizes, shadow.code_bytes, shadow_config(plan), config, num_sms)
        return ShadowWorkspace(*share(*spec))
