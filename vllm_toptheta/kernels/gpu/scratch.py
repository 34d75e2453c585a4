"""Scratch memory of a decode step on GPUs; what it holds before and after means nothing.

One scratch serves any number of layers, one after the other, and any batch of at most the sequences that it was made
for. It names the launch parameters that it was made for too, since they set its sizes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from vllm_toptheta.kernels.gpu.balance import MOST_OF_A_HEAD
from vllm_toptheta.kernels.gpu.cuda.tier_split import TierLoader
from vllm_toptheta.kernels.gpu.cuda.value_split import ValueLoader
from vllm_toptheta.kernels.gpu.survivors import LIST_DEPTH
from vllm_toptheta.kernels.gpu.tuning import LaunchConfig, ShadowConfig, launch_config, num_multiprocessors, tier_config

Spec = tuple[tuple[tuple[int, ...], torch.dtype], ...]  # shape and dtype of every buffer, in the order of the fields


class Sizes(NamedTuple):
    """What the sizes of a scratch depend on, beside launch parameters.

    Attributes:
        max_num_seqs: Sequences of the largest batch.
        num_heads, num_kv_heads, head_size: Of a layer on this rank.
        code_bytes: Bytes of a shadow key; 0 in mode `values`.
        max_query_len: New tokens of each sequence, as of `DecodeStep`.
    """

    max_num_seqs: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    code_bytes: int = 0
    max_query_len: int = 1

    @property
    def num_queries(self) -> int:
        """Of a sequence, on a kv head."""
        return self.num_heads // self.num_kv_heads * self.max_query_len

    def config(self, usual: LaunchConfig, loader: ValueLoader | None) -> LaunchConfig:
        """How mode `values` is launched, by what is usual for the heads, and the kernel that `loader` loads, if any."""
        if loader is None and self.max_query_len > 1:
            return usual.for_drafts(self.num_queries, self.head_size)
        return usual.for_loader(loader)


class Scratch(NamedTuple):
    """Of mode `values`; see `threshold_kernel.threshold_kernel` and `split.split_kernel` for the buffers.

    `loader` loads the kernel in CUDA C++, which has no lists in memory; without it, the one in Triton is taken.
    """

    config: LaunchConfig
    loader: ValueLoader | None
    thresholds: torch.Tensor
    survivors: torch.Tensor
    order: torch.Tensor
    partial_output: torch.Tensor
    partial_stats: torch.Tensor

    @staticmethod
    def spec(sizes: Sizes, config: LaunchConfig, num_sms: int, *, loader: ValueLoader | None = None) -> Spec:
        """The buffers for a GPU of `num_sms` multiprocessors."""
        num_kv_heads, group = sizes.num_kv_heads, sizes.num_queries
        num_programs = config.num_programs(num_kv_heads, num_sms)
        # the kernel in CUDA C++ lists in shared memory
        num_lists = 0 if loader else num_programs * num_kv_heads
        num_pieces = (most_programs(num_programs, loader) + sizes.max_num_seqs) * num_kv_heads
        return (
            ((sizes.max_num_seqs * sizes.max_query_len, sizes.num_heads), torch.float32),
            ((num_lists, LIST_DEPTH, config.tile, group + 1), torch.int32),
            ((num_lists, 2, LIST_DEPTH * config.tile), torch.int64),
            ((num_pieces, group, sizes.head_size), torch.float32),
            ((num_pieces, 3, group), torch.float32),
        )

    @classmethod
    def allocate(
        cls,
        sizes: Sizes,
        *,
        kv_dtype: torch.dtype,
        device: torch.device | str,
        config: LaunchConfig | None = None,
        loader: ValueLoader | None = None,
    ) -> Scratch:
        """A scratch of its own, by the launch parameters of the table unless others are given."""
        config = config or sizes.config(launch_config(sizes.head_size, kv_dtype.itemsize, device), loader)
        spec = cls.spec(sizes, config, num_multiprocessors(torch.device(device)), loader=loader)
        return cls(config, loader, *_allocate(spec, device))


class ShadowScratch(NamedTuple):
    """Of mode `shadow`; see `shadow_query.query_kernel` and `shadow_split.shadow_split_kernel` for the buffers.

    Steps of which all keys are read need that of mode `values`, and `values_config` says how they are launched.
    """

    config: ShadowConfig
    values_config: LaunchConfig
    thresholds: torch.Tensor
    query_codes: torch.Tensor
    floors: torch.Tensor
    candidates: torch.Tensor
    candidate_order: torch.Tensor
    survivors: torch.Tensor
    order: torch.Tensor
    partial_output: torch.Tensor
    partial_stats: torch.Tensor

    @staticmethod
    def spec(sizes: Sizes, config: ShadowConfig, values_config: LaunchConfig, num_sms: int) -> Spec:
        """As `Scratch.spec`."""
        values = Scratch.spec(sizes, values_config, num_sms)
        num_lists = config.num_programs(sizes.num_kv_heads, num_sms) * sizes.num_kv_heads
        num_pieces = max(num_lists + sizes.max_num_seqs * sizes.num_kv_heads, values[-1][0][0])
        return (
            values[0],
            ((sizes.max_num_seqs, sizes.num_heads, 2 * sizes.code_bytes), torch.int8),
            ((sizes.max_num_seqs, sizes.num_heads), torch.int32),
            ((num_lists, config.list_depth, config.tile), torch.int32),
            ((num_lists, config.list_depth * config.tile), torch.int32),
            *values[1:3],
            *(((num_pieces, *shape[1:]), dtype) for shape, dtype in values[3:]),
        )

    @classmethod
    def allocate(
        cls, sizes: Sizes, *, kv_dtype: torch.dtype, device: torch.device | str, config: ShadowConfig | None = None
    ) -> ShadowScratch:
        """As `Scratch.allocate`; steps of which all keys are read are launched by the table."""
        config = config or ShadowConfig()
        values_config = launch_config(sizes.head_size, kv_dtype.itemsize, device)
        spec = cls.spec(sizes, config, values_config, num_multiprocessors(torch.device(device)))
        return cls(config, values_config, *_allocate(spec, device))


class TierScratch(NamedTuple):
    """Of copies of keys and values; see `shadow_query.query_kernel` and `shadow_split.shadow_split_kernel`.

    Steps of which all keys are read need that of mode `values`, and `values_config` says how they are launched.
    `loader` loads the kernel in CUDA C++, which has no lists in memory; without it, the one in Triton is taken.
    """

    config: ShadowConfig
    values_config: LaunchConfig
    loader: TierLoader | None
    thresholds: torch.Tensor
    anchor_lse: torch.Tensor
    query_codes: torch.Tensor
    query_terms: torch.Tensor
    heavy: torch.Tensor
    heavy_order: torch.Tensor
    light: torch.Tensor
    light_order: torch.Tensor
    saved: torch.Tensor
    survivors: torch.Tensor
    order: torch.Tensor
    partial_output: torch.Tensor
    partial_stats: torch.Tensor

    @staticmethod
    def spec(
        sizes: Sizes, config: ShadowConfig, values_config: LaunchConfig, num_sms: int, *, loader: TierLoader | None
    ) -> Spec:
        """As `Scratch.spec`."""
        values = Scratch.spec(sizes, values_config, num_sms)
        group = sizes.num_heads // sizes.num_kv_heads
        num_programs = config.num_programs(sizes.num_kv_heads, num_sms)
        num_lists = num_programs * sizes.num_kv_heads
        most_pieces = (most_programs(num_programs, loader) + sizes.max_num_seqs) * sizes.num_kv_heads
        num_pieces = max(most_pieces, values[-1][0][0])
        # the kernel in CUDA C++ turns queries itself, and lists in shared memory
        num_turned = 0 if loader else sizes.max_num_seqs
        room = 0 if loader else config.list_depth * config.tile
        saved = num_lists * loader.sizes.warps * 32 * loader.sizes.saved_floats if loader else 0
        return (
            values[0],
            values[0],
            ((num_turned, sizes.num_heads, sizes.head_size), torch.int8),
            ((num_turned, sizes.num_heads, 3), torch.float32),
            ((num_lists, room), torch.int32),
            ((num_lists, room), torch.int32),
            ((num_lists, room, group + 1), torch.int32),
            ((num_lists, 2, room), torch.int32),
            ((saved,), torch.float32),
            *values[1:3],
            *(((num_pieces, *shape[1:]), dtype) for shape, dtype in values[3:]),
        )

    @classmethod
    def allocate(
        cls,
        sizes: Sizes,
        *,
        kv_dtype: torch.dtype,
        device: torch.device | str,
        config: ShadowConfig | None = None,
        loader: TierLoader | None = None,
    ) -> TierScratch:
        """As `ShadowScratch.allocate`."""
        config = config or tier_config(loader)
        values_config = launch_config(sizes.head_size, kv_dtype.itemsize, device)
        num_sms = num_multiprocessors(torch.device(device))
        spec = cls.spec(sizes, config, values_config, num_sms, loader=loader)
        return cls(config, values_config, loader, *_allocate(spec, device))


def most_programs(num_programs: int, loader: ValueLoader | TierLoader | None) -> int:
    """Programs that a kv head has at most, of `num_programs` on average: kernels in CUDA C++ balance them."""
    return num_programs * MOST_OF_A_HEAD if loader else num_programs


def _allocate(spec: Spec, device: torch.device | str) -> Iterable[torch.Tensor]:
    return (torch.empty(shape, dtype=dtype, device=device) for shape, dtype in spec)
