"""Pages that connectors copy on GPUs, by vLLM's own account of what a page is; nothing here needs one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker import OffloadingConnectorWorker
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.kv_offload.base import CanonicalKVCaches

from tests.kernels.paged import empty_cache
from vllm_toptheta.backend.hooks import page_tails
from vllm_toptheta.backend.pages import tokens_of_row, with_tail, with_tail_rows
from vllm_toptheta.backend.plan import Plan
from vllm_toptheta.kernels.pages import tail_row_view, value_sum_view

BLOCKS, HEADS, TOKENS, SIZE = 5, 2, 16, 64
SPEC = FullAttentionSpec(block_size=TOKENS, num_kv_heads=HEADS, head_size=SIZE, dtype=torch.bfloat16)


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("transfer", [None, "a connector"])
def test_sums_get_rows_where_a_gpu_lets_a_connector_copy_them(
    monkeypatch: pytest.MonkeyPatch, on_cpu: bool, transfer: str | None
) -> None:
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: on_cpu)
    monkeypatch.setattr(Plan, "code_bytes_of", lambda config: 0)
    model = SimpleNamespace(is_hybrid=False, hf_text_config=SimpleNamespace(to_dict=dict))
    config = SimpleNamespace(kv_transfer_config=transfer, model_config=model, speculative_config=None)
    layer = SimpleNamespace(attn_backend=SimpleNamespace(get_name=lambda: "TOPTHETA"))
    spec = page_tails._padding(lambda layer, config: SPEC)(layer, config)
    has_rows = transfer is not None and not on_cpu
    assert tokens_of_row(spec) == (TOKENS if has_rows else None)
    assert (spec.unpadded_page_size_bytes == spec.page_size_bytes) == has_rows


def copied(spec: AttentionSpec, kv_cache: torch.Tensor, page: int, to: int) -> None:
    """Copy a page as vLLM's OffloadingConnector has its worker do."""
    parallel = SimpleNamespace(
        tensor_parallel_size=1,
        prefill_context_parallel_size=1,
        decode_context_parallel_size=1,
        cp_kv_cache_interleave_size=1,
        world_size=1,
        rank=0,
    )
    found: list[CanonicalKVCaches] = []
    offloading: Any = SimpleNamespace(
        replicated_layout=False,
        config=SimpleNamespace(canonical_layout=False, parallel=parallel),
        get_worker=found.append,
    )
    model = SimpleNamespace(get_total_num_kv_heads=lambda: HEADS)
    vllm_config: Any = SimpleNamespace(parallel_config=parallel, model_config=model)
    groups = [KVCacheGroupSpec(["layer"], spec)]
    worker = OffloadingConnectorWorker(offloading, vllm_config, KVCacheConfig(BLOCKS, [], groups))
    worker.register_kv_caches({"layer": kv_cache})
    ((ref,),) = found[0].group_data_refs
    memory = found[0].tensors[ref.tensor_idx].tensor
    memory[to, : ref.page_size_bytes] = memory[page, : ref.page_size_bytes]


@pytest.mark.parametrize("order", ["BNHC", "BHNC"])
def test_rows_are_copied_with_their_pages(order: str) -> None:
    sizes = {"B": BLOCKS, "H": HEADS, "N": TOKENS + 1, "C": 2 * SIZE}
    memory = torch.randn([sizes[axis] for axis in order]).bfloat16()
    kv_cache = memory.permute([order.index(axis) for axis in "BHNC"])
    tail_row_view(kv_cache).normal_()
    copied(with_tail_rows(SPEC), kv_cache, 1, 3)
    # as integers: half of a sum's bits may be no number in the type of the cache
    assert torch.equal(kv_cache[3].view(torch.int16), kv_cache[1].view(torch.int16))
    assert torch.equal(tail_row_view(kv_cache)[3], tail_row_view(kv_cache)[1])


def test_what_pages_are_padded_with_is_not() -> None:
    # or CPUs need not make tails again
    kv_cache = empty_cache(BLOCKS, HEADS, TOKENS, SIZE, torch.bfloat16)
    kv_cache.normal_()
    value_sum_view(kv_cache).normal_()
    copied(with_tail(SPEC), kv_cache, 1, 3)
    assert torch.equal(kv_cache[3], kv_cache[1])
    assert not (value_sum_view(kv_cache)[3] == value_sum_view(kv_cache)[1]).any()
