"""What launches of this folder's kernels have in common."""

from __future__ import annotations

import ctypes
from typing import Protocol

import torch

from vllm_toptheta.kernels.gpu.records import Schedule


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


class ScheduleArguments(ctypes.Structure):
    """`ScheduleArgs` of schedule.cuh."""

    _fields_ = [(name, ctypes.c_int32) for name in ("num_programs", "unit", "min_work", "dense_work", "piece_work")]

    @classmethod
    def of(cls, schedule: Schedule, num_programs: int) -> ScheduleArguments:
        """How a step is shared out among `num_programs` programs of each kv head."""
        return cls(num_programs, schedule.UNIT, schedule.MIN_WORK, schedule.DENSE_WORK, schedule.PIECE_WORK)


def pointer(tensor: torch.Tensor | None) -> int | None:
    """Where a tensor starts, None for null."""
    return None if tensor is None else tensor.data_ptr()
