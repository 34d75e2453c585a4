"""Launching `value_split.cu`: for which shapes it is compiled, what it is given, and what memory it takes."""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import torch

from vllm_toptheta.kernels.contract import DecodeStep
from vllm_toptheta.kernels.gpu.cuda.driver import DriverError
from vllm_toptheta.kernels.gpu.cuda.launching import Launcher, ScheduleArguments, pointer
from vllm_toptheta.kernels.gpu.cuda.loading import kernel_for
from vllm_toptheta.kernels.gpu.cuda.nvrtc import CompileError
from vllm_toptheta.kernels.gpu.records import Counts, Pieces, Queries, Schedule, Shape, Tokens

SPLIT = "value_split"
SOURCE = "value_split.cu"
_ROW_BYTES = 16  # that queries, keys and values are loaded by

logger = logging.getLogger("vllm.toptheta")  # below vLLM's own, so that its format and level apply


class ValueSizes(NamedTuple):
    """Sizes of the kernel for a layer's shape.

    Attributes:
        warps: Of a program.
        stages: Of the ring in which a warp's keys arrive.
        resident: Programs that a multiprocessor runs at a time.
        shared_bytes: Shared memory of a program.
        dense_tokens: As of `LaunchConfig`, where it was measured.
    """

    warps: int
    stages: int
    resident: int
    shared_bytes: int
    dense_tokens: int | None = None

    @classmethod
    def of(cls, head_size: int, group: int) -> ValueSizes:
        """Those for heads of a size in groups of `group` queries.

        Two programs leave room for the merge, which is then there before they end: of small steps it is a fifth.
        """
        if head_size == 64:
            return cls.made(head_size, group, warps=4, stages=6, resident=3 if group <= 8 else 2)
        if head_size == 128:
            sizes = cls.made(head_size, group, warps=4, stages=4 if group <= 8 else 3, resident=2)
            return sizes._replace(dense_tokens=600)
        return cls.made(head_size, group, warps=4, stages=3, resident=2 if group <= 4 else 1)

    @classmethod
    def made(cls, head_size: int, group: int, *, warps: int, stages: int, resident: int) -> ValueSizes:
        """The layout of shared memory is that of the source, which does not compile with another sum."""
        columns, heads, quad = next(
            sizes for most, sizes in ((4, (1, 4, 2)), (8, (1, 8, 4)), (16, (2, 16, 4))) if group <= most
        )
        row_bytes = 2 * head_size
        stage = 16 * row_bytes
        ring = (stages - 1) * stage + max(stage, columns * head_size // 16 * 8 * quad * 16)
        warp_bytes = ring + heads * 72 * 4 + 64 * 4
        common = 8 * columns * (row_bytes + 64) + 64 + 2 * 16 * 4
        return cls(warps, stages, resident, warps * (warp_bytes + 3 * 16 * 4) + common)


class ValueLoader(NamedTuple):
    """How the kernel of a layer's shape comes into being.

    Attributes:
        load: From macros such as `HEAD_SIZE=128`, and bytes of shared memory.
        sizes: Of the kernel.
    """

    load: Callable[[str, tuple[str, ...], int], Launcher]
    sizes: ValueSizes


class Arguments(ctypes.Structure):
    """`Args` of the source."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in (
                "kv_cache",
                "block_table",
                "seq_lens",
                "threshold_offset",
                "query",
                "thresholds",
                "q_scale",
                "k_scale",
                "piece_output",
                "piece_stats",
                "value_rows_read",
            )
        ),
        *(
            (name, ctypes.c_uint32)
            for name in ("stride_block", "stride_head", "stride_token", "query_stride_seq", "query_stride_head")
        ),
        *(
            (name, ctypes.c_int32)
            for name in ("table_stride", "num_seqs", "num_kv_heads", "max_dense_len", "min_step_tokens")
        ),
        ("schedule", ScheduleArguments),
        *((name, ctypes.c_float) for name in ("softmax_scale", "logits_soft_cap")),
    ]


def macros_of(shape: Shape, sizes: ValueSizes, *, has_soft_cap: bool) -> tuple[str, ...]:
    """What the source is compiled with."""
    values: dict[str, int | str] = {
        "HEAD_SIZE": shape.HEAD_SIZE,
        "GROUP": shape.GROUP,
        "BLOCK_SIZE": shape.BLOCK_SIZE,
        "IS_FLOAT16": str(shape.FLOAT16).lower(),
        "SOFT_CAP": str(has_soft_cap).lower(),
        "VALUE_MEAN": str(shape.VALUE_MEAN).lower(),
        "WARPS": sizes.warps,
        "STAGES": sizes.stages,
        "RESIDENT": sizes.resident,
        "EXPECTED_SHARED_BYTES": sizes.shared_bytes,
    }
    return tuple(f"{name}={value}" for name, value in values.items())


def is_made_for(head_size: int, group: int, element_bytes: int) -> bool:
    """Whether there is a kernel for heads of a size in groups of `group` queries, and a cached number of so many bytes.

    Rows of other heads are no power of two of 16 bytes; the sums of large groups do not fit into the registers.
    """
    return element_bytes == 2 and (head_size in (64, 128) or (head_size == 256 and group <= 8))


def loader_for(device: torch.device, head_size: int, group: int) -> ValueLoader:
    """That of a GPU, for heads of a size in groups of `group` queries."""
    return ValueLoader(functools.partial(kernel_for, device, SOURCE), ValueSizes.of(head_size, group))


@functools.cache
def find_loader(device: torch.device, head_size: int, group: int, element_bytes: int) -> ValueLoader | None:
    """`loader_for`, if the kernel can be compiled and loaded here; None, and a warning, if not.

    None without a warning where it is not made for a layer (`is_made_for`). One kernel is compiled to see, for pages
    of 16 tokens of bfloat16; it is kept on disk.

    Args:
        device: What reads the pages.
        head_size: Numbers of a key or a value.
        group: Query heads on a kv head.
        element_bytes: Of a cached number.
    """
    if device.type != "cuda" or not is_made_for(head_size, group, element_bytes):
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    loader = loader_for(torch.device("cuda", index), head_size, group)
    try:
        _loaded(loader, Shape(16, head_size, group, head_size, False, True, True, 0), False)
    except (CompileError, DriverError, OSError) as error:
        logger.warning("toptheta: keys and values are read by the slower kernels in Triton, because %s", error)
        return None
    return loader


@functools.cache
def _loaded(loader: ValueLoader, shape: Shape, has_soft_cap: bool) -> Launcher:
    return loader.load(SPLIT, macros_of(shape, loader.sizes, has_soft_cap=has_soft_cap), loader.sizes.shared_bytes)


def launch_value_split(
    loader: ValueLoader,
    step: DecodeStep,
    tokens: Tokens,
    queries: Queries,
    pieces: Pieces,
    counts: Counts,
    shape: Shape,
    schedule: Schedule,
    *,
    num_programs: int,
    is_early: bool,
) -> None:
    """Enqueue what `split.split_kernel` does in Triton.

    Args:
        loader: Compiles and loads for the device; a kernel is loaded once.
        num_programs: Of each kv head.

    Raises:
        ValueError: Rows of queries do not start at multiples of 16 bytes.
        CompileError: A kernel for this shape is not compiled yet, and the compiler refuses it.
        DriverError: The driver refuses a kernel or a launch.
    """
    sizes, query = loader.sizes, queries.query
    element, query_element = tokens.kv_cache.element_size(), query.element_size()
    query_stride_seq, query_stride_head = queries.stride_seq * query_element, queries.stride_head * query_element
    if (query.data_ptr() | query_stride_seq | query_stride_head) % _ROW_BYTES:
        raise ValueError(f"query: strides {query.stride()}, expected rows at multiples of {_ROW_BYTES} bytes")
    num_seqs, num_heads, _ = query.shape
    num_kv_heads = num_heads // shape.GROUP
    arguments = Arguments(
        kv_cache=tokens.kv_cache.data_ptr(),
        block_table=tokens.block_table.data_ptr(),
        seq_lens=tokens.seq_lens.data_ptr(),
        threshold_offset=pointer(tokens.threshold_offset),
        query=query.data_ptr(),
        thresholds=queries.thresholds.data_ptr(),
        q_scale=pointer(queries.q_scale),
        k_scale=pointer(queries.k_scale),
        piece_output=pieces.output.data_ptr(),
        piece_stats=pieces.stats.data_ptr(),
        value_rows_read=pointer(counts.value_rows_read),
        stride_block=tokens.stride_block * element,
        stride_head=tokens.stride_head * element,
        stride_token=tokens.stride_token * element,
        query_stride_seq=query_stride_seq,
        query_stride_head=query_stride_head,
        table_stride=step.block_table.stride(0),
        num_seqs=num_seqs,
        num_kv_heads=num_kv_heads,
        max_dense_len=step.max_dense_len,
        min_step_tokens=step.min_step_tokens,
        schedule=ScheduleArguments.of(schedule, num_programs),
        softmax_scale=queries.softmax_scale,
        logits_soft_cap=queries.logits_soft_cap or 0.0,
    )
    split = _loaded(loader, shape, queries.logits_soft_cap is not None)
    stream = torch.cuda.current_stream(query.device).cuda_stream if query.is_cuda else 0
    split.launch((num_kv_heads, num_programs, 1), 32 * sizes.warps, sizes.shared_bytes, arguments, stream, is_early)
