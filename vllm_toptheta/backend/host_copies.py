"""What kernels count on the device, on the host now and then, without anybody waiting for it."""

from __future__ import annotations

from collections.abc import Callable

import torch


def counted_since(seen: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """What was counted since `seen` was looked at, or all of it if the counters were zeroed in between."""
    window = counted - seen
    return counted if bool((window < 0).any()) else window


class HostCopies:
    """Copies of a tensor, one after the other.

    Args:
        take: Makes the tensor to be copied, on any device, from what kernels add to.
    """

    def __init__(self, take: Callable[[], torch.Tensor]) -> None:
        self._take = take
        self._steps = 0
        self._copy: torch.Tensor | None = None  # on its way to the host
        self._copied: torch.cuda.Event | None = None

    def step(self, every: int) -> torch.Tensor | None:
        """Called before every step: a copy on the host, as soon as it is there; None in most steps.

        Args:
            every: Steps from one copy to the beginning of the next.
        """
        self._steps += 1
        if self._copy is None:
            if self._steps >= every:
                self._start()
            return None
        if self._copied is not None and (torch.cuda.is_current_stream_capturing() or not self._copied.query()):
            return None
        copy, self._copy, self._steps = self._copy, None, 0
        return copy

    @torch.inference_mode()
    def _start(self) -> None:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return
        taken = self._take()
        if not taken.is_cuda:
            self._copy = taken
        else:
            self._copy = torch.empty(taken.shape, dtype=taken.dtype, pin_memory=True)
            self._copy.copy_(taken, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
