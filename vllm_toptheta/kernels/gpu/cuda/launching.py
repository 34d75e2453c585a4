"""What launches of this folder's kernels have in common."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch

from vllm_toptheta.kernels.contract import DecodeStep
from vllm_toptheta.kernels.gpu.cuda.driver import DriverError
from vllm_toptheta.kernels.gpu.cuda.nvrtc import CompileError
from vllm_toptheta.kernels.gpu.records import Counts, Pieces, Queries, Schedule, Shape, Tokens

_ROW_BYTES = 16  # that queries are loaded by

logger = logging.getLogger("vllm.toptheta")  # below vLLM's own, so that its format and level apply
SizesT = TypeVar("SizesT")


class Launcher(Protocol):
    """A compiled kernel; see `driver.Kernel.launch`."""

    def launch(
        self,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        arguments: ctypes.Structure,
        stream: int,
        is_early: bool,
    ) -> None: ...


class Loader(NamedTuple, Generic[SizesT]):
    """How the kernels of a layer's shape come into being.

    Attributes:
        load: From a source's name, a kernel's in it, macros such as `HEAD_SIZE=128`, and bytes of shared memory.
        sizes: Of the kernels.
    """

    load: Callable[[str, str, tuple[str, ...], int], Launcher]
    sizes: SizesT


LoaderT = TypeVar("LoaderT", bound=Loader[Any])


def working_loader(
    device: torch.device,
    loader_for: Callable[[torch.device], LoaderT],
    try_out: Callable[[LoaderT], object],
    *,
    what: str,
) -> LoaderT | None:
    """A GPU's loader, if kernels can be compiled and loaded there; None, and a warning, if not.

    Args:
        device: None but a GPU has one.
        loader_for: Makes it for a device with an index.
        try_out: Loads a kernel.
        what: That kernels in Triton read instead.
    """
    if device.type != "cuda":  # where Triton interprets
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    loader = loader_for(torch.device("cuda", index))
    try:
        try_out(loader)
    except (CompileError, DriverError, OSError) as error:
        logger.warning("toptheta: %s are read by the slower kernels in Triton, because %s", what, error)
        return None
    return loader


def macros_for(shape: Shape, *, has_soft_cap: bool, **sizes: int) -> tuple[str, ...]:
    """What a source is compiled with: for a layer's shape, with sizes that are macros by their names."""
    values: dict[str, int | str] = {
        "HEAD_SIZE": shape.HEAD_SIZE,
        "GROUP": shape.GROUP,
        "BLOCK_SIZE": shape.BLOCK_SIZE,
        "IS_FLOAT16": str(shape.FLOAT16).lower(),
        "SOFT_CAP": str(has_soft_cap).lower(),
        "VALUE_MEAN": str(shape.VALUE_MEAN).lower(),
        **sizes,
    }
    return tuple(f"{name}={value}" for name, value in values.items())


class ScheduleArguments(ctypes.Structure):
    """`ScheduleArgs` of schedule.cuh."""

    _fields_ = [(name, ctypes.c_int32) for name in ("num_programs", "unit", "min_work", "dense_work", "piece_work")]

    @classmethod
    def of(cls, schedule: Schedule, num_programs: int) -> ScheduleArguments:
        """How a step is shared out among `num_programs` programs of each kv head."""
        return cls(num_programs, schedule.UNIT, schedule.MIN_WORK, schedule.DENSE_WORK, schedule.PIECE_WORK)


class SplitStep(NamedTuple):
    """A step as it is split among programs.

    Attributes:
        step, tokens, queries, pieces, counts, shape, schedule: As kernels in Triton take them.
        num_programs: Of each kv head.
    """

    step: DecodeStep
    tokens: Tokens
    queries: Queries
    pieces: Pieces
    counts: Counts
    shape: Shape
    schedule: Schedule
    num_programs: int

    @property
    def num_seqs(self) -> int:
        return len(self.step.seq_lens)

    @property
    def num_kv_heads(self) -> int:
        return self.queries.num_heads // (self.shape.GROUP // self.shape.QUERY_LEN)

    @property
    def has_soft_cap(self) -> bool:
        return self.queries.logits_soft_cap is not None

    @property
    def stream(self) -> int:
        """What is enqueued to."""
        return stream_of(self.queries.query)

    def arguments(self) -> dict[str, Any]:
        """What every source is given, by the names of its `Args`; strides are in bytes.

        Raises:
            ValueError: Rows of queries do not start at multiples of 16 bytes.
        """
        step, tokens, queries = self.step, self.tokens, self.queries
        query, element, query_element = queries.query, tokens.kv_cache.element_size(), queries.query.element_size()
        stride_seq, stride_head = queries.stride_seq * query_element, queries.stride_head * query_element
        if (query.data_ptr() | stride_seq | stride_head) % _ROW_BYTES:
            raise ValueError(f"query: strides {query.stride()}, expected rows at multiples of {_ROW_BYTES} bytes")
        return {
            "kv_cache": tokens.kv_cache.data_ptr(),
            "block_table": tokens.block_table.data_ptr(),
            "seq_lens": tokens.seq_lens.data_ptr(),
            "threshold_offset": pointer(tokens.threshold_offset),
            "query": query.data_ptr(),
            "thresholds": queries.thresholds.data_ptr(),
            "q_scale": pointer(queries.q_scale),
            "k_scale": pointer(queries.k_scale),
            "piece_output": self.pieces.output.data_ptr(),
            "piece_stats": self.pieces.stats.data_ptr(),
            "value_rows_read": pointer(self.counts.value_rows_read),
            "stride_block": tokens.stride_block * element,
            "stride_head": tokens.stride_head * element,
            "stride_token": tokens.stride_token * element,
            "query_stride_seq": stride_seq,
            "query_stride_head": stride_head,
            "table_stride": step.block_table.stride(0),
            "num_seqs": self.num_seqs,
            "num_kv_heads": self.num_kv_heads,
            "max_dense_len": step.max_dense_len,
            "min_step_tokens": step.min_step_tokens,
            "schedule": ScheduleArguments.of(self.schedule, self.num_programs),
            "softmax_scale": queries.softmax_scale,
            "logits_soft_cap": queries.logits_soft_cap or 0.0,
        }


def stream_of(tensor: torch.Tensor) -> int:
    """The stream that launches on a tensor's device are enqueued to; 0 where kernels are emulated."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


def fields(kind: type, *names: str) -> list[tuple[str, type]]:
    """Of a ctypes structure, all of one type."""
    return [(name, kind) for name in names]


def pointer(tensor: torch.Tensor | None) -> int | None:
    """Where a tensor starts, None for null."""
    return None if tensor is None else tensor.data_ptr()
