"""The page tails of steps that fill any number of pages, on the GPU: prefill chunks, mixed batches."""

from __future__ import annotations

import torch

from vllm_toptheta.kernels.contract import Layer, LayerCache, TailStep, check_tails, expect
from vllm_toptheta.kernels.gpu.codes import write_codes
from vllm_toptheta.kernels.gpu.copies import write_copies
from vllm_toptheta.kernels.gpu.cuda.tier_split import TierLoader
from vllm_toptheta.kernels.gpu.value_sums import write_value_sums


def write_tails(step: TailStep, cache: LayerCache, layer: Layer, loader: TierLoader | None = None) -> None:
    """Write the tails of all pages that a step's tokens fill: value sums, and shadow keys or copies where
    the layer has them.

    A launch for each, whose grid depends on shapes and `max_query_len` only, and nothing allocated: the call can be
    captured in a CUDA graph. The tokens' keys and values must have been written. Sequences without tokens in this step
    are left alone.

    Args:
        step: The step, with all of its tokens.
        cache: The layer's pages, of any strides and float dtype.
        layer: The layer.
        loader: Loads the kernel in CUDA C++ for copies, of 16-bit pages; without it, the one in Triton is taken.

    Raises:
        ValueError: A shape, dtype or stride is not as the records describe it; the message starts with the field's
            name.
        CompileError, DriverError: As of `launch_tier_copy`.
    """
    num_seqs = len(step.seq_lens)
    check_tails(cache, layer)
    expect("block_table", step.block_table, (num_seqs, step.block_table.shape[1]), torch.int32)
    expect("seq_lens", step.seq_lens, (num_seqs,), torch.int32)
    expect("query_start_loc", step.query_start_loc, (num_seqs + 1,), torch.int32)
    if cache.kv_cache.stride(-1) != 1:
        raise ValueError(f"kv_cache: last axis has stride {cache.kv_cache.stride(-1)}, expected 1")
    if num_seqs:
        write_value_sums(step, cache)
        write_codes(step, cache, layer)
        write_copies(step, cache, layer, loader)
