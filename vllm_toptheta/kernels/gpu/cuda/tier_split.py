"""Launching `tier_split.cu`: for which shapes it is compiled, what it is given, and what memory it takes."""

from __future__ import annotations

import ctypes
import functools
import logging
import math
from typing import NamedTuple

import torch

from vllm_toptheta.kernels.codec import tier_bytes
from vllm_toptheta.kernels.gpu.cuda import tier_copy
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
from vllm_toptheta.kernels.gpu.records import Copies, Shape
from vllm_toptheta.limits import NUM_FIRST_ANCHORS, NUM_LAST_ANCHORS

SPLIT = "tier_split"
SOURCE = "tier_split.cu"
_LEAST_HEAVY_ROOM, _MOST_HEAVY_ROOM = 128, 1024  # whenever a list is full, all warps wait
_CTA_BYTES = 1024  # of shared memory that CUDA takes for itself
_MOST_LOG2_SCALE = 12.0  # where no key is light, or only those of next to no weight

logger = logging.getLogger("vllm.toptheta")  # below vLLM's own, so that its format and level apply


class SplitSizes(NamedTuple):
    """Sizes of the kernel for a layer's shape.

    Attributes:
        warps: Of a program.
        stages: Of the ring in which a warp's codes arrive.
        resident: Programs that a multiprocessor runs at a time.
        heavy_room: Heavy keys that a warp lists before the warps of its program read what is listed.
        shared_bytes: Shared memory of a program.
        saved_floats: What a thread may have to save, float32.
    """

    warps: int
    stages: int
    resident: int
    heavy_room: int
    shared_bytes: int
    saved_floats: int


TierLoader = Loader[SplitSizes]


@functools.cache
def split_sizes(head_size: int, group: int, heavy_room: int = _LEAST_HEAVY_ROOM) -> SplitSizes:
    """Those for heads of a size in groups of `group` queries: as many programs as registers and shared memory allow.

    The layout of shared memory is that of the source, which does not compile with another sum.
    """
    columns = 2 if group > 8 else 1
    tiles = head_size // 16
    stages = 3
    if head_size <= 128 and columns == 1:
        # one program's end overlaps with the other's scan
        warps, resident = 6, 2
    else:
        # more sums, in registers and in shared memory
        warps, resident = (4 if head_size == 256 and columns == 2 else 8), 1
    row_tokens, quad = (2, 2) if group <= 4 else (1, 4)
    heads = 4 if row_tokens == 2 else 8 * columns
    stage_tokens = 64 if head_size <= 128 else 32
    ring = max(stages * stage_tokens * (head_size // 2 + 2), 2 * columns * tiles * 8 * quad * 16)
    light_bytes = heads // 2 * 136 * 4 + 128 * 4 + 2 * (16 * head_size // 4 + 64)
    warp_bytes = ring + 32 * 8 + light_bytes + heavy_room * 4 + 48
    operands = 2 * row_tokens * columns * 32 * (head_size // 32) * 4
    common = 64 + heads * (2 * head_size + 64) + warps * 16 + operands + 16 * 3 * 4 + 64
    shared_bytes = warps * warp_bytes + common
    return SplitSizes(warps, stages, resident, heavy_room, shared_bytes, columns * (8 * tiles + 16) + 1)


class Arguments(ctypes.Structure):
    """`Args` of the source."""

    _fields_ = [
        *fields(
            ctypes.c_void_p,
            *("kv_cache", "block_table", "seq_lens", "head_programs", "threshold_offset", "query", "thresholds"),
            *("anchor_lse", "q_scale", "k_scale", "codes", "rotation", "piece_output", "piece_stats", "saved"),
            *("keys_read", "value_rows_read", "copies_read"),
        ),
        *fields(
            ctypes.c_uint32,
            *("stride_block", "stride_head", "stride_token", "query_stride_seq", "query_stride_head"),
            *("code_stride_block", "code_stride_head"),
        ),
        *fields(
            ctypes.c_int32,
            *("table_stride", "num_seqs", "num_kv_heads", "max_dense_len", "min_step_tokens"),
            *("few_tokens", "short_length"),
        ),
        ("schedule", ScheduleArguments),
        *fields(ctypes.c_float, "softmax_scale", "logits_soft_cap", "log_heavy", "log2_scale"),
    ]


def macros_of(shape: Shape, sizes: SplitSizes, *, has_soft_cap: bool) -> tuple[str, ...]:
    """What the source is compiled with."""
    return macros_for(
        shape,
        has_soft_cap=has_soft_cap,
        NUM_FIRST_ANCHORS=NUM_FIRST_ANCHORS,
        NUM_LAST_ANCHORS=NUM_LAST_ANCHORS,
        WARPS=sizes.warps,
        STAGES=sizes.stages,
        RESIDENT=sizes.resident,
        HEAVY_ROOM=sizes.heavy_room,
        EXPECTED_SHARED_BYTES=sizes.shared_bytes,
        EXPECTED_SAVED=sizes.saved_floats,
    )


def loader_for(device: torch.device, head_size: int, group: int) -> TierLoader:
    """That of a GPU, for heads of a size in groups of `group` queries."""
    return TierLoader(functools.partial(kernel_for, device), sizes_within(head_size, group, *shared_memory_of(device)))


def shared_memory_of(device: torch.device) -> tuple[int, int]:
    """Shared memory of a GPU's multiprocessor, and the most that a program may have, in bytes."""
    gpu = torch.cuda.get_device_properties(device)
    # torch's stubs lack the latter
    return gpu.shared_memory_per_multiprocessor, gpu.shared_memory_per_block_optin  # type: ignore[attr-defined]


def sizes_within(head_size: int, group: int, multiprocessor_bytes: int, program_bytes: int) -> SplitSizes:
    """`split_sizes` with the longest lists that leave room for all programs of a multiprocessor.

    Args:
        head_size, group: As for `split_sizes`.
        multiprocessor_bytes: Shared memory of a multiprocessor.
        program_bytes: The most that one program may have.
    """
    rooms = (split_sizes(head_size, group, room) for room in range(_MOST_HEAVY_ROOM, _LEAST_HEAVY_ROOM, -16))
    fits = (
        sizes
        for sizes in rooms
        if sizes.shared_bytes <= program_bytes
        and sizes.resident * (sizes.shared_bytes + _CTA_BYTES) <= multiprocessor_bytes
    )
    return next(fits, split_sizes(head_size, group))


@functools.cache
def find_loader(device: torch.device, head_size: int, group: int, element_bytes: int = 2) -> TierLoader | None:
    """`loader_for`, if kernels can be compiled and loaded here; None, and a warning, if not, or if keys are float8.

    Two are compiled to see, for pages of 16 tokens of bfloat16; they are kept on disk.

    Args:
        device: What reads the pages.
        head_size: Numbers of a key or a value.
        group: Query heads on a kv head.
        element_bytes: Of a cached number.
    """
    if element_bytes != 2:
        logger.warning("toptheta: float8 keys and values with copies are read by the slower kernels in Triton")
        return None
    shape = Shape(16, head_size, group, head_size, False, True, True, tier_bytes(head_size))
    return working_loader(
        device,
        lambda gpu: loader_for(gpu, head_size, group),
        lambda loader: (_loaded(loader, shape, False), tier_copy.loaded(loader, head_size, 16, torch.bfloat16)),
        what="copies",
    )


@functools.cache
def _loaded(loader: TierLoader, shape: Shape, has_soft_cap: bool) -> Launcher:
    macros = macros_of(shape, loader.sizes, has_soft_cap=has_soft_cap)
    return loader.load(SOURCE, SPLIT, macros, loader.sizes.shared_bytes)


def launch_tier_split(
    loader: TierLoader,
    given: SplitStep,
    copies: Copies,
    saved: torch.Tensor,
    head_programs: torch.Tensor | None,
    *,
    few_tokens: int,
    short_length: int,
    log_heavy: float,
    is_early: bool,
) -> None:
    """Enqueue what the kernels of `tier_query` and `tier_split` do in Triton with a step that is scanned.

    Args:
        loader: Compiles and loads for the device; a kernel is loaded once.
        saved: [num_programs * num_kv_heads * warps * 32 * saved_floats] float32, at least.
        head_programs: As of `contract.Layer`.

    Raises:
        ValueError: Rows of queries do not start at multiples of 16 bytes.
        CompileError: A kernel for this shape is not compiled yet, and the compiler refuses it.
        DriverError: The driver refuses a kernel or a launch.
    """
    sizes, counts, num_kv_heads, stream = loader.sizes, given.counts, given.num_kv_heads, given.stream
    arguments = Arguments(
        **given.arguments(),
        head_programs=pointer(head_programs),
        anchor_lse=pointer(given.queries.anchor_lse),
        codes=copies.codes.data_ptr(),
        rotation=copies.rotation.data_ptr(),
        saved=saved.data_ptr(),
        keys_read=pointer(counts.keys_read),
        copies_read=pointer(counts.copies_read),
        code_stride_block=copies.stride_block,
        code_stride_head=copies.stride_head,
        few_tokens=few_tokens,
        short_length=short_length,
        log_heavy=log_heavy,
        # no light key weighs more than `heavy`: then none is above 1
        log2_scale=min(_MOST_LOG2_SCALE, -log_heavy / math.log(2)),
    )
    split = _loaded(loader, given.shape, given.has_soft_cap)
    grid = num_kv_heads, given.num_programs, 1
    split.launch(grid, 32 * sizes.warps, sizes.shared_bytes, arguments, stream, is_early)
