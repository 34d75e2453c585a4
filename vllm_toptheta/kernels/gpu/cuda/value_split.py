"""Launching `value_split.cu`: for which shapes it is compiled, what it is given, and what memory it takes."""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

import torch

from vllm_toptheta.kernels.gpu.cuda.launching import (
    Launcher,
    Loader,
    ScheduleArguments,
    SplitStep,
    fields,
    macros_for,
    working_loader,
)
from vllm_toptheta.kernels.gpu.cuda.loading import kernel_for
from vllm_toptheta.kernels.gpu.records import Shape

SPLIT = "value_split"
SOURCE = "value_split.cu"


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


ValueLoader = Loader[ValueSizes]


class Arguments(ctypes.Structure):
    """`Args` of the source."""

    _fields_ = [
        *fields(
            ctypes.c_void_p,
            *("kv_cache", "block_table", "seq_lens", "threshold_offset", "query", "thresholds"),
            *("q_scale", "k_scale", "piece_output", "piece_stats", "value_rows_read"),
        ),
        *fields(
            ctypes.c_uint32, "stride_block", "stride_head", "stride_token", "query_stride_seq", "query_stride_head"
        ),
        *fields(ctypes.c_int32, "table_stride", "num_seqs", "num_kv_heads", "max_dense_len", "min_step_tokens"),
        ("schedule", ScheduleArguments),
        *fields(ctypes.c_float, "softmax_scale", "logits_soft_cap"),
    ]


def macros_of(shape: Shape, sizes: ValueSizes, *, has_soft_cap: bool) -> tuple[str, ...]:
    """What the source is compiled with."""
    return macros_for(
        shape,
        has_soft_cap=has_soft_cap,
        WARPS=sizes.warps,
        STAGES=sizes.stages,
        RESIDENT=sizes.resident,
        EXPECTED_SHARED_BYTES=sizes.shared_bytes,
    )


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
    if not is_made_for(head_size, group, element_bytes):
        return None
    shape = Shape(16, head_size, group, head_size, False, True, True, 0)
    return working_loader(
        device,
        lambda gpu: loader_for(gpu, head_size, group),
        lambda loader: _loaded(loader, shape, False),
        what="keys and values",
    )


@functools.cache
def _loaded(loader: ValueLoader, shape: Shape, has_soft_cap: bool) -> Launcher:
    return loader.load(SPLIT, macros_of(shape, loader.sizes, has_soft_cap=has_soft_cap), loader.sizes.shared_bytes)


def launch_value_split(loader: ValueLoader, given: SplitStep, *, is_early: bool) -> None:
    """Enqueue what `split.split_kernel` does in Triton.

    Args:
        loader: Compiles and loads for the device; a kernel is loaded once.

    Raises:
        ValueError: Rows of queries do not start at multiples of 16 bytes.
        CompileError: A kernel for this shape is not compiled yet, and the compiler refuses it.
        DriverError: The driver refuses a kernel or a launch.
    """
    sizes, grid = loader.sizes, (given.num_kv_heads, given.num_programs, 1)
    arguments = Arguments(**given.arguments())
    split = _loaded(loader, given.shape, given.has_soft_cap)
    split.launch(grid, 32 * sizes.warps, sizes.shared_bytes, arguments, given.stream, is_early)
