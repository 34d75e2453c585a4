"""Which of the kernels for GPUs a rank's layers are decoded by, and which sequences those make no faster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_toptheta.backend.plan import DenseRule, Plan
from vllm_toptheta.kernels.gpu.cuda import tier_split, value_split
from vllm_toptheta.kernels.gpu.cuda.tier_split import TierLoader
from vllm_toptheta.kernels.gpu.cuda.value_split import ValueLoader
from vllm_toptheta.kernels.gpu.tuning import ShadowConfig, launch_config, num_multiprocessors, tier_config
from vllm_toptheta.limits import FLOAT8_CACHE_DTYPES, MAX_QUERY_LEN
from vllm_toptheta.settings import Settings
from vllm_toptheta.support import splits_pages


@dataclass(frozen=True)
class Loaders:
    """What loads kernels in CUDA C++; None where those in Triton are taken.

    Attributes:
        values: Of mode `values`.
        drafts: Likewise, of sequences with drafts.
        tiers: Of copies of keys and values.
    """

    values: ValueLoader | None = None
    drafts: ValueLoader | None = None
    tiers: TierLoader | None = None

    @classmethod
    def find(
        cls, plan: Plan, spec: AttentionSpec, group: int, device: torch.device, *, max_query_len: int = 1
    ) -> Loaders:
        """Those that a plan needs, for `group` query heads on a kv head, and up to `max_query_len` new tokens."""

        def arguments(group: int) -> tuple[torch.device, int, int, int]:
            return device, spec.head_size, group, spec.dtype.itemsize

        if plan.heavy is not None:
            return cls(tiers=tier_split.find_loader(*arguments(group)))
        if plan.code_bytes:
            return cls()
        drafts = value_split.find_loader(*arguments(group * max_query_len)) if max_query_len > 1 else None
        return cls(value_split.find_loader(*arguments(group)), drafts)

    def of_values(self, max_query_len: int) -> ValueLoader | None:
        """Of mode `values`, where sequences have up to so many new tokens."""
        return self.values if max_query_len == 1 else self.drafts


def best_dense(plan: Plan, spec: AttentionSpec, device: torch.device, loaders: Loaders) -> DenseRule:
    """Which sequences of a rank are decoded no faster by thresholds, as the launch parameters say."""
    config = (
        shadow_config(plan, loaders.tiers)
        if plan.code_bytes
        else launch_config(spec.head_size, spec.dtype.itemsize, device).for_loader(loaders.values)
    )
    return DenseRule(config.dense_length, config.min_step_tokens(spec.num_kv_heads, num_multiprocessors(device)))


def shadow_config(plan: Plan, loader: TierLoader | None) -> ShadowConfig:
    """Launch parameters of mode `shadow`; `loader` loads kernels of copies in CUDA C++."""
    config = ShadowConfig() if plan.heavy is None else tier_config(loader)
    return config.scanning if plan.settings.always_shadow else config


def max_verified(vllm_config: Any) -> int:
    """New tokens of a sequence that are decoded in one step, at most: the last one and drafts; 1 without drafts.

    Drafts are attended to densely in mode `shadow`; where there is no kernel in CUDA C++ for as many queries, because
    that in Triton takes longer than FlashAttention; and by versions of vLLM that have not run them by thresholds.
    """
    speculative = vllm_config.speculative_config
    if speculative is None or not splits_pages():
        return 1
    settings = Settings.of_engine(vllm_config)
    if settings.lossless or settings.mode != "values":
        return 1
    tokens = 1 + (speculative.num_speculative_tokens or 0)
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    group = model.get_num_attention_heads(parallel) // model.get_num_kv_heads(parallel)
    element_bytes = 1 if vllm_config.cache_config.cache_dtype in FLOAT8_CACHE_DTYPES else 2
    is_fast = value_split.is_made_for(model.get_head_size(), group * tokens, element_bytes)
    return tokens if tokens <= MAX_QUERY_LEN and is_fast else 1
