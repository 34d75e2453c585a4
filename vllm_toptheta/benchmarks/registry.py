"""The decode attention kernels that are compared, all on the same paged cache; each is imported when it is built."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any, Literal

import torch

from vllm_toptheta.benchmarks.inputs import LOG_HEAVY, Anchors, Inputs
from vllm_toptheta.kernels.codec import TierCodec
from vllm_toptheta.kernels.contract import Counters, Layer, LayerCache, LayerCall, TierLayer
from vllm_toptheta.kernels.gpu.balance import balance, counted_of, work_of
from vllm_toptheta.kernels.gpu.cuda import value_split
from vllm_toptheta.kernels.gpu.cuda.tier_split import find_loader
from vllm_toptheta.kernels.gpu.scratch import Scratch, Sizes, TierScratch
from vllm_toptheta.kernels.gpu.tiers import decode as decode_by_tiers
from vllm_toptheta.kernels.gpu.tuning import LaunchConfig, ShadowConfig, num_multiprocessors, tier_config
from vllm_toptheta.kernels.gpu.values import decode
from vllm_toptheta.limits import NUM_ANCHORS

Call = Callable[[], Any]
Dense = Literal["never", "served", "always"]
KEEPS_EVERYTHING = 2**31 - 1  # as max_dense_len


def toptheta(
    inputs: Inputs,
    *,
    dense: Dense = "never",
    per_request: bool = True,
    anchors: Anchors = "followed",
    count: bool = True,
    config: LaunchConfig | None = None,
    in_triton: bool = False,
    is_balanced: bool = True,
) -> tuple[Call, Counters]:
    """Our kernel, and what it adds to.

    Args:
        inputs: The step.
        dense: Whether every key is kept: as is best where it is served without a `min_context`, or in any case.
        per_request: Whether every sequence has an offset, although all are 0; else it has none.
        anchors: Whether thresholds follow the anchors of each sequence, as they are served; or are the same for all
            sequences, be it that their anchors are scored nevertheless.
        count: Whether it counts.
        config: Launch parameters instead of the table's.
        in_triton: Take no kernel in CUDA C++.
        is_balanced: Whether kv heads have programs by what they read, after one step that is not timed.
    """
    num_seqs, (_, num_heads, head_size) = len(inputs.seq_lens), inputs.query.shape
    num_kv_heads = inputs.kv_cache.shape[1]
    device = inputs.query.device
    counters = Counters.allocate(num_heads, num_kv_heads, device)
    sizes = Sizes(num_seqs, num_heads, num_kv_heads, head_size, max_query_len=inputs.query_len)
    group, element_bytes = num_heads // num_kv_heads * inputs.query_len, inputs.kv_cache.element_size()
    # as a server reads them
    loader = None if in_triton else value_split.find_loader(device, head_size, group, element_bytes)
    scratch = Scratch.allocate(sizes, kv_dtype=inputs.kv_cache.dtype, device=device, config=config, loader=loader)
    layer = Layer(
        inputs.softmax_scale,
        thresholds=inputs.thresholds(anchors),
        counters=counters if count else None,
    )
    longest = {"never": NUM_ANCHORS, "served": scratch.config.dense_length, "always": KEEPS_EVERYTHING}[dense]
    fewest = scratch.config.min_step_tokens(num_kv_heads, num_multiprocessors(device)) if dense == "served" else 0
    step = inputs.step(max_dense_len=longest, min_step_tokens=fewest, per_request=per_request)
    cache, output = LayerCache.of(inputs.kv_cache, layer), torch.empty_like(inputs.query)
    if loader is not None and is_balanced:
        decode(step, LayerCall(inputs.query, output, cache, layer._replace(counters=counters)), scratch)
        layer = _balanced(layer, scratch.config, counters)
    call = LayerCall(inputs.query, output, cache, layer)
    return lambda: decode(step, call, scratch), counters


def toptheta_by_tiers(
    inputs: Inputs, *, config: ShadowConfig | None = None, in_triton: bool = False, is_balanced: bool = True
) -> tuple[Call, Counters]:
    """Our kernels with copies of keys and values, and what they add to.

    Args:
        inputs: A step of `Inputs.replay`, whose pages have room for copies, which are written.
        config: Launch parameters instead of the defaults; every step is scanned.
        in_triton: Take no kernel in CUDA C++.
        is_balanced: As of `toptheta`.
    """
    num_seqs, num_heads, head_size = inputs.query.shape
    num_kv_heads = inputs.kv_cache.shape[1]
    device = inputs.query.device
    counters = Counters.allocate(num_heads, num_kv_heads, device, counts_keys=True, counts_copies=True)
    sizes = Sizes(num_seqs, num_heads, num_kv_heads, head_size)
    group, element_bytes = num_heads // num_kv_heads, inputs.kv_cache.element_size()
    loader = None if in_triton else find_loader(device, head_size, group, element_bytes)
    config = (config or tier_config(loader)).scanning
    scratch = TierScratch.allocate(sizes, kv_dtype=inputs.kv_cache.dtype, device=device, config=config, loader=loader)
    tiers = TierLayer(TierCodec.build(head_size, device), LOG_HEAVY)
    layer = Layer(inputs.softmax_scale, thresholds=inputs.thresholds(), tiers=tiers, counters=counters)
    inputs.write_tails(tiers=tiers)
    step = inputs.step()
    cache, output = LayerCache.of(inputs.kv_cache, layer), torch.empty_like(inputs.query)
    if loader is not None and is_balanced:
        decode_by_tiers(step, LayerCall(inputs.query, output, cache, layer), scratch)
        layer = _balanced(layer, config, counters)
    call = LayerCall(inputs.query, output, cache, layer)
    return lambda: decode_by_tiers(step, call, scratch), counters


def _balanced(layer: Layer, config: LaunchConfig | ShadowConfig, counters: Counters) -> Layer:
    """A layer whose kv heads have programs by what was counted of them, which is forgotten."""
    device, num_kv_heads = counters.totals.device, len(counters.value_rows_read)
    work = work_of(counted_of(counters).tolist(), num_kv_heads)
    programs = balance(work, config.num_programs(num_kv_heads, num_multiprocessors(device)))
    counters.zero_()
    return layer._replace(head_programs=torch.tensor(programs, dtype=torch.int32, device=device))


def flash_attention_3(inputs: Inputs, *, num_splits: int = 0) -> Call:
    """FlashAttention-3 as vLLM calls it, its schedule computed ahead; 0 splits leaves their number to it.

    Raises:
        ImportError: vLLM or its FlashAttention is not installed.
        RuntimeError: It does not run on this GPU or with this cache.
    """
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    num_seqs, (_, num_heads, head_size) = len(inputs.seq_lens), inputs.query.shape
    keys, values = (half.transpose(1, 2) for half in inputs.kv_cache.split(head_size, dim=3))
    query = inputs.query if keys.dtype.itemsize > 1 else inputs.query.to(keys.dtype)
    starts = inputs.query_start_loc
    schedule = get_scheduler_metadata(
        batch_size=num_seqs,
        max_seqlen_q=inputs.query_len,
        max_seqlen_k=inputs.max_seq_len,
        num_heads_q=num_heads,
        num_heads_kv=keys.shape[2],
        headdim=head_size,
        cache_seqlens=inputs.seq_lens,
        qkv_dtype=query.dtype,
        cu_seqlens_q=starts,
        page_size=keys.shape[1],
        causal=True,
        num_splits=num_splits,
    )
    output = torch.empty_like(inputs.query)
    return lambda: flash_attn_varlen_func(
        q=query,
        k=keys,
        v=values,
        out=output,
        cu_seqlens_q=starts,
        max_seqlen_q=inputs.query_len,
        seqused_k=inputs.seq_lens,
        max_seqlen_k=inputs.max_seq_len,
        softmax_scale=inputs.softmax_scale,
        causal=True,
        block_table=inputs.block_table,
        fa_version=3,
        scheduler_metadata=schedule,
        num_splits=num_splits,
    )


def vllm_triton(inputs: Inputs) -> Call:
    """vLLM's Triton attention, split along the context as its backend does for small batches.

    Raises:
        ImportError: vLLM is not installed.
    """
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    num_seqs, (_, num_heads, head_size) = len(inputs.seq_lens), inputs.query.shape
    num_kv_heads = inputs.kv_cache.shape[1]
    keys, values = (half.transpose(1, 2) for half in inputs.kv_cache.split(head_size, dim=3))
    splits, max_seqs = 16, 128 // num_kv_heads  # the backend's constants
    scratch = torch.empty(max_seqs, num_heads, splits, 1 << (head_size - 1).bit_length(), device="cuda")
    scale = torch.ones(num_seqs, num_kv_heads, device="cuda")
    output = torch.empty_like(inputs.query)
    starts = inputs.query_start_loc
    return lambda: unified_attention(
        q=inputs.query,
        k=keys,
        v=values,
        out=output,
        cu_seqlens_q=starts,
        max_seqlen_q=inputs.query_len,
        seqused_k=inputs.seq_lens,
        max_seqlen_k=inputs.max_seq_len,
        softmax_scale=inputs.softmax_scale,
        causal=True,
        window_size=(-1, -1),
        block_table=inputs.block_table,
        softcap=0.0,
        q_descale=None,
        k_descale=scale,
        v_descale=scale,
        seq_threshold_3D=max_seqs,
        num_par_softmax_segments=splits,
        softmax_segm_output=scratch,
        softmax_segm_max=torch.empty(scratch.shape[:3], device="cuda"),
        softmax_segm_expsum=torch.empty(scratch.shape[:3], device="cuda"),
    )


def flashinfer(inputs: Inputs) -> Call:
    """FlashInfer's paged decode, planned ahead.

    Raises:
        ImportError: FlashInfer is not installed.
        ValueError: Sequences have several new tokens, which it has no plan for.
    """
    if inputs.query_len != 1:
        raise ValueError("decodes one new token of a sequence")
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper  # type: ignore[import-not-found]

    num_seqs, num_heads, head_size = inputs.query.shape
    _, num_kv_heads, block_size, _ = inputs.kv_cache.shape
    pages = -(-inputs.seq_lens // block_size)
    starts = torch.zeros(num_seqs + 1, dtype=torch.int32, device="cuda")
    starts[1:] = pages.cumsum(0)
    index = torch.arange(inputs.block_table.shape[1], device="cuda")
    blocks = inputs.block_table[index < pages[:, None]].contiguous()
    last = inputs.seq_lens - (pages - 1) * block_size
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(256 << 20, dtype=torch.uint8, device="cuda"),
        "NHD",
        use_cuda_graph=True,
        use_tensor_cores=True,
        paged_kv_indptr_buffer=starts.clone(),
        paged_kv_indices_buffer=blocks.clone(),
        paged_kv_last_page_len_buffer=last.int(),
    )
    wrapper.plan(
        starts,
        blocks,
        last.int(),
        num_heads,
        num_kv_heads,
        head_size,
        block_size,
        q_data_type=inputs.query.dtype,
        kv_data_type=inputs.kv_cache.dtype,
        sm_scale=inputs.softmax_scale,
    )
    halves = tuple(half.transpose(1, 2) for half in inputs.kv_cache.split(head_size, dim=3))
    output = torch.empty_like(inputs.query)
    return lambda: wrapper.run(inputs.query, halves, out=output)


# the dense kernels, the baseline first; FlashAttention's two settings are those that vLLM uses
DENSE: dict[str, Callable[[Inputs], Call]] = {
    "FlashAttention-3": flash_attention_3,
    "FlashAttention-3, 32 splits": lambda inputs: flash_attention_3(inputs, num_splits=32),
    "vLLM Triton": vllm_triton,
    "FlashInfer": flashinfer,
}


def versions() -> dict[str, str]:
    """Versions of what is compared."""
    found = {"torch": str(torch.__version__)}
    for package in ("triton", "vllm", "flashinfer-python"):
        try:
            found[package] = version(package)
        except ImportError:
            continue
    return found
