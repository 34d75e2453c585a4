"""The backend on NVIDIA GPUs: FlashAttention for prompts and dense layers, Top-Theta for the tokens that are decoded.

It subclasses vLLM's FlashAttention backend and adds to it, on sparse layers only: page tails with running value sums
and copies in few bits, and decode kernels that read surviving values, and in mode `shadow` few keys. Steps that only
decode run in FULL CUDA graphs, so there everything that depends on lengths is decided on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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

from vllm_toptheta.backend.capabilities import BackendCapabilities, BuilderCapabilities, ImplCapabilities
from vllm_toptheta.backend.guard_monitor import GuardMonitor
from vllm_toptheta.backend.hooks import sleep, warm_up
from vllm_toptheta.backend.kernel_choice import Loaders, best_dense, max_verified, shadow_config
from vllm_toptheta.backend.layers import choose_tail_writers
from vllm_toptheta.backend.pages import more_memory, tokens_of_row
from vllm_toptheta.backend.plan import Plan, logger
from vllm_toptheta.backend.program_balance import ProgramBalance
from vllm_toptheta.backend.requests import request_offsets
from vllm_toptheta.backend.sparse_layer import SparseLayer
from vllm_toptheta.backend.support_checks import check_no_chunks, check_sharing, check_split
from vllm_toptheta.backend.versions import with_all_rows, without_decodes
from vllm_toptheta.kernels.contract import DecodeStep, Layer, LayerCache, LayerCall, TailStep
from vllm_toptheta.kernels.gpu import shadow, tiers, values
from vllm_toptheta.kernels.gpu.scratch import Scratch, ShadowScratch, Sizes, TierScratch
from vllm_toptheta.kernels.gpu.tails import write_tails
from vllm_toptheta.kernels.gpu.tuning import launch_config, num_multiprocessors, tier_config
from vllm_toptheta.limits import CACHE_DTYPES, FLOAT8_CACHE_DTYPES, HEAD_SIZES
from vllm_toptheta.settings import Settings

# channels of the kv heads on a GPU up to which thresholds were slower than FlashAttention-3 in every step measured,
# with the kernel in Triton
FEW_CHANNELS = 128

FLOAT8 = torch.float8_e4m3fn  # what vLLM stores for `FLOAT8_CACHE_DTYPES`


@dataclass(frozen=True)
class StepSplit:
    """How a step is divided; decoding sequences stand in front of the batch.

    Attributes:
        num_decode_tokens: New tokens of sequences that decode: the last one of each, and drafts.
        decode: Those sequences.
        tails: All sequences.
        prefill: FlashAttention's metadata of everything behind those that decode, or None.
    """

    num_decode_tokens: int
    decode: DecodeStep
    tails: TailStep
    prefill: FlashAttentionMetadata | None


class GpuMetadataBuilder(BuilderCapabilities, FlashAttentionMetadataBuilder):
    """FlashAttention's metadata with a `StepSplit` attached as `toptheta`.

    Attributes:
        plan: The model's.
        requests: What the rank's requests ask for.
        guard_monitor: Sees what layers lose.
        program_balance: Sees what kv heads read.
        is_verifying: Whether all of a step is dense, because drafts are verified in it.
        max_query_len: New tokens of a sequence that thresholds decode in a step, as of `max_verified`.
    """

    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: AttentionSpec) -> AttentionCGSupport:
        """Which steps graphs may capture: those that verify drafts have several tokens a sequence."""
        if Settings.of_engine(vllm_config).lossless or max_verified(vllm_config) > 1:
            return AttentionCGSupport.UNIFORM_BATCH
        return cls._cudagraph_support

    @classmethod
    def get_varlen_cudagraph_max_query_len(cls, vllm_config: VllmConfig, kv_cache_spec: AttentionSpec) -> int | None:
        """New tokens of sequences that graphs may capture where their numbers differ; asked since vLLM 0.33."""
        most = max_verified(vllm_config)
        return most if most > 1 else None

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # FlashAttention's, which the instance says again
        self.supports_draft_decode_metadata_update = False
        self.max_query_len = max_verified(vllm_config)
        self._init_reorder_batch_threshold(self.max_query_len)
        plan = Plan.resolve(vllm_config)
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        check_no_chunks(layers)
        check_sharing(layers, vllm_config)
        check_split(kv_cache_spec)
        impl = next(iter(layers.values())).impl
        group = impl.num_heads // impl.num_kv_heads
        loaders = Loaders.find(plan, kv_cache_spec, group, device, max_query_len=self.max_query_len)
        self.plan = replace(plan, automatic=best_dense(plan, kv_cache_spec, device, loaders))
        self.is_verifying = plan.settings.lossless  # what drafts has builders of its own
        max_num_seqs = vllm_config.scheduler_config.max_num_seqs
        rank = get_tensor_model_parallel_rank()
        if rank == 0:
            config = shadow_config(self.plan, loaders.tiers)
            num_programs = config.num_programs(kv_cache_spec.num_kv_heads, num_multiprocessors(device))
            self.plan.log(
                more_memory=more_memory(kv_cache_spec, self.plan.code_bytes),
                scans=config.scans(max_num_seqs, vllm_config.model_config.max_model_len, num_programs=num_programs),
            )
            is_small = kv_cache_spec.num_kv_heads * kv_cache_spec.head_size <= FEW_CHANNELS and not loaders.values
            if is_small and self.plan.settings.mode == "values" and self.plan.thresholds is not None:
                logger.warning_once(
                    "toptheta: %d kv heads of size %d on each GPU leave little to save: with thresholds, every step "
                    "that was measured took longer than with FlashAttention-3 (docs/limits.md)",
                    kv_cache_spec.num_kv_heads,
                    kv_cache_spec.head_size,
                )
        warm_up.install()
        sleep.install()
        # a captured graph may have more rows than there can be sequences
        max_num_rows = max(max_num_seqs, vllm_config.compilation_config.max_cudagraph_capture_size or 0)
        self.requests = request_offsets(self.plan.choices, vllm_config, max_num_rows, device)
        sparse: list[GpuTopThetaImpl] = []
        for name, layer in layers.items():
            impl = layer.impl
            if isinstance(impl, GpuTopThetaImpl):
                window = None if impl.sliding_window == (-1, -1) else impl.sliding_window[0] + 1
                layer_idx = extract_layer_index(name)
                impl.bind(self.plan, layer_idx, self.requests, rank=rank, sliding_window=window, device=device)
                impl.loaders, impl.has_tail_row = loaders, tokens_of_row(kv_cache_spec) is not None
                impl.reserve(max_num_seqs, device, max_query_len=self.max_query_len)
                sparse += [impl] if impl.layer_plan else []
        choose_tail_writers(layers)
        layer_plans = [impl.layer_plan for impl in sparse if impl.layer_plan is not None]
        self.guard_monitor = GuardMonitor(layer_plans, relaxes=self.plan.settings.guard == "relax")
        # the kernels in Triton give as many programs to each
        self.program_balance = balance_of(sparse if loaders.values or loaders.tiers else [], device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> FlashAttentionMetadata:
        common = common_attn_metadata
        metadata = super().build(0, common, fast_build)
        if self.is_verifying:
            num_decodes, num_decode_tokens, prefill = 0, 0, metadata
        else:
            self.guard_monitor.step()
            self.program_balance.step()
            num_decodes, num_decode_tokens, prefill = self._divide(common, metadata)
        # kernels of few new tokens are one: each number of them would be compiled
        has_drafts = self.max_query_len > 1 and common.max_query_len > 1
        metadata.toptheta = StepSplit(
            num_decode_tokens,
            DecodeStep(
                metadata.block_table[:num_decodes],
                metadata.seq_lens[:num_decodes],
                max_dense_len=self.plan.dense_rule.max_len,
                min_step_tokens=self.plan.dense_rule.min_step_tokens,
                length_range=self.plan.length_range,
                threshold_offset=self.requests.offsets if self.plan.choices.refusal is None else None,
                query_start_loc=metadata.query_start_loc[: num_decodes + 1] if has_drafts else None,
                max_query_len=self.max_query_len if has_drafts else 1,
            ),
            TailStep(metadata.block_table, metadata.seq_lens, metadata.query_start_loc, metadata.max_query_len),
            prefill,
        )
        return metadata

    def _divide(
        self, common: CommonAttentionMetadata, metadata: FlashAttentionMetadata
    ) -> tuple[int, int, FlashAttentionMetadata | None]:
        """How many sequences decode, and their tokens; FlashAttention's metadata of those behind, None without any."""
        common = with_all_rows(common)
        num_decodes, num_prefills, num_tokens, _ = split_decodes_and_prefills(
            common,
            decode_threshold=self.max_query_len,
            # as many tokens may be the end of a prompt
            treat_short_extends_as_decodes=self.max_query_len == 1 or common.is_prefilling is None,
        )
        if num_decodes and num_prefills:
            # fast_build: a second ahead-of-time schedule in the same step would overwrite the first one's buffer
            behind = super().build(0, without_decodes(common, num_decodes, num_tokens), fast_build=True)
            return num_decodes, num_tokens, behind
        return num_decodes, num_tokens, metadata if num_prefills else None

    def use_cascade_attention(self, *args: Any, **kwargs: Any) -> bool:
        return False


def balance_of(impls: Sequence[GpuTopThetaImpl], device: torch.device) -> ProgramBalance:
    """Of layers whose values or copies are read by a kernel in CUDA C++."""
    return ProgramBalance(
        [
            (impl.layer_plan.counters, impl.head_programs(impl.layer, device))
            for impl in impls
            if impl.layer_plan is not None and impl.layer is not None
        ]
    )


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

    @classmethod
    def get_supported_kernel_block_sizes(cls, *spec: Any) -> list[Any]:
        # vLLM tells the spec since it has specs with rows
        sizes = super().get_supported_kernel_block_sizes(*spec)
        tokens = tokens_of_row(spec[0]) if spec else None
        return sizes if tokens is None else [tokens]


class GpuTopThetaImpl(SparseLayer, ImplCapabilities, FlashAttentionImpl):
    """One layer's attention on one rank.

    Attributes:
        loaders: Of kernels in CUDA C++.
        has_tail_row: Whether pages have a row behind their tokens, which FlashAttention must not see.
    """

    loaders = Loaders()
    has_tail_row = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        FlashAttentionImpl.__init__(self, *args, **kwargs)
        self.prepare({"ALiBi": self.alibi_slopes is not None})

    def reserve(self, max_num_seqs: int, device: torch.device, *, max_query_len: int = 1) -> None:
        """Have vLLM's scratch memory grow to what a batch of `max_num_seqs` sequences needs."""
        for query_len in {1, max_query_len} if self.layer_plan is not None else ():
            self._scratch(max_num_seqs, 1 if self._is_quantized else 2, device, max_query_len=query_len)

    def head_programs(self, layer: Layer, device: torch.device) -> torch.Tensor:
        """The layer's `Layer.head_programs`, the same for each kv head until others are written there."""
        programs = layer.head_programs
        if programs is None:
            config = (
                tier_config(self.loaders.tiers)
                if self.loaders.tiers
                else launch_config(self.head_size, 2, device).for_loader(self.loaders.values)
            )
            num_programs = config.num_programs(self.num_kv_heads, num_multiprocessors(device))
            programs = torch.full((self.num_kv_heads,), num_programs, dtype=torch.int32, device=device)
            self.layer = layer._replace(head_programs=programs)
        return programs

    @property
    def _is_quantized(self) -> bool:
        return self.kv_cache_dtype in FLOAT8_CACHE_DTYPES

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        super().do_kv_cache_update(layer, key, value, self._tokens_of(kv_cache), slot_mapping)

    def _tokens_of(self, kv_cache: torch.Tensor) -> torch.Tensor:
        return kv_cache[:, :, :-1] if self.has_tail_row else kv_cache

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
        if attn_metadata is None or self.layer_plan is None or self.layer is None:
            # without metadata there is no cache yet
            pages = kv_cache if attn_metadata is None else self._tokens_of(kv_cache)
            return super().forward(
                layer, query, key, value, pages, attn_metadata, output, output_scale, output_block_scale
            )
        split: StepSplit = attn_metadata.toptheta
        decodes = split.num_decode_tokens
        # FlashAttention and vLLM's own kernels get the bytes, as always
        cache = LayerCache.of(
            kv_cache.view(FLOAT8) if self._is_quantized else kv_cache,
            self.layer,
            has_tail_row=self.has_tail_row,
            k_scale=layer._k_scale if self._is_quantized else None,
            v_scale=layer._v_scale if self._is_quantized else None,
        )
        if split.prefill is not None:
            # tails also of the pages that decoded tokens fill: another sequence may stand on them in this very step
            if self.writes_tails:
                write_tails(split.tails, cache, self.layer, self.loaders.tiers)
            super().forward(
                layer,
                query[decodes:],
                None if key is None else key[decodes:],
                None if value is None else value[decodes:],
                self._tokens_of(kv_cache),
                split.prefill,
                output[decodes:],
                output_scale,
                output_block_scale,
            )
        if decodes:
            q_scale = layer._q_scale if self._is_quantized else None
            self._decode(split.decode, LayerCall(query[:decodes], output[:decodes], cache, self.layer, q_scale))
        return output

    def _decode(self, step: DecodeStep, call: LayerCall) -> None:
        num_seqs, element_bytes = len(step.seq_lens), call.cache.kv_cache.element_size()
        scratch = self._scratch(num_seqs, element_bytes, call.query.device, max_query_len=step.max_query_len)
        if isinstance(scratch, TierScratch):
            tiers.decode(step, call, scratch)
        elif isinstance(scratch, ShadowScratch):
            shadow.decode(step, call, scratch)
        else:
            values.decode(step, call, scratch)

    def _scratch(
        self, num_seqs: int, element_bytes: int, device: torch.device, *, max_query_len: int = 1
    ) -> Scratch | ShadowScratch | TierScratch:
        """vLLM's shared scratch memory; it grows while the engine warms up and is fixed from then on."""
        plan, layer = self.plan, self.layer
        num_sms = num_multiprocessors(device)
        share = current_workspace_manager().get_simultaneous
        config = launch_config(self.head_size, element_bytes, device)
        sizes = Sizes(num_seqs, self.num_heads, self.num_kv_heads, self.head_size)
        if plan is None or layer is None or not layer.code_bytes:
            loader = self.loaders.of_values(max_query_len)
            sizes = sizes._replace(max_query_len=max_query_len)
            config = sizes.config(config, loader)
            return Scratch(config, loader, *share(*Scratch.spec(sizes, config, num_sms, loader=loader)))
        chosen = shadow_config(plan, self.loaders.tiers)
        if layer.tiers is not None:
            spec = TierScratch.spec(sizes, chosen, config, num_sms, loader=self.loaders.tiers)
            return TierScratch(chosen, config, self.loaders.tiers, *share(*spec))
        sizes = sizes._replace(code_bytes=layer.code_bytes)
        return ShadowScratch(chosen, config, *share(*ShadowScratch.spec(sizes, chosen, config, num_sms)))
