"""Launching `tier_copy.cu`, which writes the copies of keys and values of pages that a step fills."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

from vllm_toptheta.kernels.gpu.cuda.launching import Launcher, Loader, fields, pointer, stream_of
from vllm_toptheta.kernels.gpu.records import Copies, Tokens
from vllm_toptheta.limits import NUM_FIRST_ANCHORS

COPY = "tier_copy"
SOURCE = "tier_copy.cu"
WARPS = 16
# of a launch: in a step of many sequences, most of them may find nothing to do
_MOST_PROGRAMS = 1 << 15


class Arguments(ctypes.Structure):
    """`Args` of the source."""

    _fields_ = [
        *fields(ctypes.c_void_p, "kv_cache", "block_table", "seq_lens", "query_start_loc", "codes", "rotation"),
        *fields(
            ctypes.c_uint32,
            *("stride_block", "stride_head", "stride_token", "code_stride_block", "code_stride_head"),
        ),
        *fields(ctypes.c_int32, "table_stride"),
    ]


def macros_of(head_size: int, block_size: int, dtype: torch.dtype) -> tuple[str, ...]:
    """What the source is compiled with, for pages of `block_size` tokens of a 16-bit dtype."""
    return (
        f"HEAD_SIZE={head_size}",
        f"BLOCK_SIZE={block_size}",
        f"IS_FLOAT16={str(dtype == torch.float16).lower()}",
        f"NUM_FIRST_ANCHORS={NUM_FIRST_ANCHORS}",
        f"COPY_WARPS={WARPS}",
    )


@functools.cache
def loaded(loader: Loader[Any], head_size: int, block_size: int, dtype: torch.dtype) -> Launcher:
    """The kernel for such pages, compiled and loaded once."""
    return loader.load(SOURCE, COPY, macros_of(head_size, block_size, dtype), 0)


def launch_tier_copy(
    loader: Loader[Any], tokens: Tokens, copies: Copies, *, max_query_len: int, is_early: bool = False
) -> None:
    """Enqueue the copies of every page that a step's tokens fill.

    Args:
        loader: Compiles and loads for the device.
        tokens: The step, in pages of bfloat16 or float16.
        copies: Where they are written.
        max_query_len: About how many tokens a sequence has in this step.
        is_early: Launched while the kernel before still runs.

    Raises:
        CompileError: The kernel for these pages is not compiled yet, and the compiler refuses it.
        DriverError: The driver refuses the kernel or the launch.
    """
    cache = tokens.kv_cache
    _, num_kv_heads, block_size, content = cache.shape
    num_seqs, element = len(tokens.seq_lens), cache.element_size()
    arguments = Arguments(
        kv_cache=cache.data_ptr(),
        block_table=tokens.block_table.data_ptr(),
        seq_lens=tokens.seq_lens.data_ptr(),
        query_start_loc=pointer(tokens.query_start_loc),
        codes=copies.codes.data_ptr(),
        rotation=copies.rotation.data_ptr(),
        stride_block=tokens.stride_block * element,
        stride_head=tokens.stride_head * element,
        stride_token=tokens.stride_token * element,
        code_stride_block=copies.stride_block,
        code_stride_head=copies.stride_head,
        table_stride=tokens.block_table.stride(0),
    )
    most_pages = (max_query_len + block_size - 1) // block_size
    programs = max(1, min(most_pages, _MOST_PROGRAMS // (num_seqs * num_kv_heads)))
    copy = loaded(loader, content // 2, block_size, cache.dtype)
    copy.launch((num_kv_heads, num_seqs, programs), 32 * WARPS, 0, arguments, stream_of(cache), is_early)
