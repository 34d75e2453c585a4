"""Which kv heads get how many programs of a GPU's kernel in CUDA C++: by what they read in the steps before.

Captured graphs refer to the tensors that say so, which are written between steps. Sums are added in another order
after that, so a row is written only where it makes a difference, and under a steady load soon never.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_toptheta.backend.counters import LayerCounters
from vllm_toptheta.backend.host_copies import HostCopies, counted_since
from vllm_toptheta.kernels.gpu.balance import balance, counted_of, largest_share, work_of

WINDOW_STEPS = 64  # engine steps between two looks
MIN_ROWS = 1 << 20  # cached rows of a kv head, summed over tokens, that make a window
MIN_GAIN = 1.02  # of the largest share of a program, for which programs are shared out anew


@dataclass
class _BalancedLayer:
    """A layer, and what is remembered of it."""

    counters: LayerCounters
    head_programs: torch.Tensor  # [num_kv_heads] int32, on the device
    programs: list[int]  # the same
    seen: torch.Tensor  # what was counted at the end of the last window, as of `counted_of`


class ProgramBalance:
    """Balances the layers of one group on one rank.

    Args:
        layers: What each layer counts, and its `contract.Layer.head_programs`, which are written, and of which there
            stay as many.
    """

    def __init__(self, layers: Sequence[tuple[LayerCounters, torch.Tensor]]) -> None:
        self._layers = [
            _BalancedLayer(
                counters, programs, programs.tolist(), torch.zeros_like(counted_of(counters.buffers), device="cpu")
            )
            for counters, programs in layers
        ]
        self._copies = HostCopies(self._counted)

    def step(self) -> None:
        """Called before every step; does nothing in most of them."""
        if not self._layers:
            return
        counted = self._copies.step(WINDOW_STEPS)
        if counted is not None:
            for layer, of_layer in zip(self._layers, counted, strict=True):
                self._balance(layer, of_layer)

    def _counted(self) -> torch.Tensor:
        """`counted_of` every layer, [num_layers, 1 + counters]."""
        return torch.stack([counted_of(layer.counters.settled()) for layer in self._layers])

    @torch.inference_mode()
    def _balance(self, layer: _BalancedLayer, counted: torch.Tensor) -> None:
        window = counted_since(layer.seen, counted).tolist()
        if window[0] < MIN_ROWS:
            return
        layer.seen = counted.clone()
        num_heads = len(layer.programs)
        work = work_of(window, num_heads)
        programs = balance(work, sum(layer.programs) // num_heads)
        gain = largest_share(work, layer.programs) / largest_share(work, programs)
        if gain < MIN_GAIN:
            return
        layer.programs = programs
        written = torch.tensor(programs, dtype=torch.int32, pin_memory=layer.head_programs.is_cuda)
        layer.head_programs.copy_(written, non_blocking=True)
