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
    pointer,
    working_loader,
)
from vllm_toptheta.kernels.gpu.cuda.loading import kernel_for
from vllm_toptheta.kernels.gpu.records import Shape

SPLIT = "value_split"
SOURCE = "value_split.cu"
# of a step that is no slower if every key is kept: measured with 8 kv heads of 128. With 1, 2 and 4, and heads of 64
# and 256, it is below 32K tokens too: thresholds cost a time that does not depend on the number of programs
DENSE_STEP_TOKENS = 20_000
PIECE_TOKENS = 256  # that take as long as a piece does beside its keys: measured likewise


class ValueSizes(NamedTuple):
    """Sizes of the kernel for a layer's shape.

    Attributes:
        warps: Of a program.
        stages: Of the ring in which a warp's keys arrive.
        resident: Programs that a multiprocessor runs at a time.
        shared_bytes: Shared memory of a program.
    """

    warps: int
    stages: int
    resident: int
    shared_bytes: int

    @classmethod
    def of(cls, head_size: int, group: int) -> ValueSizes:
        """Those for heads of a size in groups of `group` queries, of all new tokens of a sequence together.

        Two programs leave room for the merge, which is then there before they end: of small steps it is a fifth.
        """
        if head_size == 64:
            return cls.made(head_size, group, warps=4, stages=6, resident=3 if group <= 8 else 2)
        if head_size == 96:
            return cls.made(head_size, group, warps=4, stages=5 if group <= 8 else 4, resident=2)
        if head_size == 128:
            return cls.made(head_size, group, warps=4, stages=4 if group <= 8 else 3, resident=2)
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
        query_stride = row_bytes + (0 if row_bytes % 128 else 64)
        common = 8 * columns * query_stride + 64 + 2 * 16 * 4
        return cls(warps, stages, resident, warps * (warp_bytes + 3 * 16 * 4) + common)


ValueLoader = Loader[ValueSizes]


class Arguments(ctypes.Structure):
    """`Args` of the source."""

    _fields_ = [
        *fields(
            ctypes.c_void_p,
            *("kv_cache", "block_table", "seq_lens", "head_programs", "threshold_offset", "query", "thresholds"),
            *("q_scale", "k_scale", "piece_output", "piece_stats", "value_rows_read"),
        ),
        *fields(
            ctypes.c_uint32, "stride_block", "stride_head", "stride_token", "query_stride_seq", "query_stride_head"
        ),
        *fields(ctypes.c_int32, "table_stride", "num_seqs", "num_kv_heads", "max_dense_len", "min_step_tokens"),
        ("schedule", ScheduleArguments),
        *fields(ctypes.c_float, "softmax_scale", "logits_soft_cap"),
        ("query_start_loc", ctypes.c_void_p),
    ]


def macros_of(shape: Shape, sizes: ValueSizes, *, has_soft_cap: bool) -> tuple[str, ...]:
    """What the source is compiled with."""
    return macros_for(
        shape,
        has_soft_cap=has_soft_cap,
        QUERY_LEN=shape.QUERY_LEN,
        WARPS=sizes.warps,
        STAGES=sizes.stages,
        RESIDENT=sizes.resident,
        EXPECTED_SHARED_BYTES=sizes.shared_bytes,
    )


def is_made_for(head_size: int, group: int, element_bytes: int) -> bool:
    """Whether there is a kernel for heads of a size in groups of `group` queries, and a cached number of so many bytes.

    The sums of large groups, as several new tokens of a sequence make them, do not fit into the registers.
    """
    most = {64: 16, 96: 16, 128: 16, 256: 8}
    return element_bytes == 2 and group <= most.get(head_size, 0)


def loader_for(device: torch.device, head_size: int, group: int) -> ValueLoader:
    """That of a GPU, for heads of a size in groups of `group` queries."""
    return ValueLoader(functools.partial(kernel_for, device), ValueSizes.of(head_size, group))


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
    return loader.load(
        SOURCE, SPLIT, macros_of(shape, loader.sizes, has_soft_cap=has_soft_cap), loader.sizes.shared_bytes
    )


def launch_value_split(
    loader: ValueLoader, given: SplitStep, head_programs: torch.Tensor | None, *, is_early: bool
) -> None:
    """Enqueue what `split.split_kernel` does in Triton.

    Args:
        loader: Compiles and loads for the device; a kernel is loaded once.
        head_programs: As of `contract.Layer`.

    Raises:
        ValueError: Rows of queries do not start at multiples of 16 bytes.
        CompileError: A kernel for this shape is not compiled yet, and the compiler refuses it.
        DriverError: The driver refuses a kernel or a launch.
    """
    sizes, grid = loader.sizes, (given.num_kv_heads, given.num_programs, 1)
    starts = pointer(given.tokens.query_start_loc)
    arguments = Arguments(**given.arguments(), query_start_loc=starts, head_programs=pointer(head_programs))
    split = _loaded(loader, given.shape, given.has_soft_cap)
    split.launch(grid, 32 * sizes.warps, sizes.shared_bytes, arguments, given.stream, is_early)
