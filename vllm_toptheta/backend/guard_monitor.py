"""Where the guard meets the device: it reads what decoding lost, window by window, and moves thresholds in place.

The kernels count lost masses in histograms on the device, and read thresholds from tensors that captured graphs refer
to. So the guard needs nothing from a step: it copies the histograms to the host now and then, without waiting for the
copy, and writes into those tensors.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from vllm.logger import init_logger

from vllm_toptheta.backend.guard import LayerGuard
from vllm_toptheta.backend.plan import LayerPlan
from vllm_toptheta.limits import LOST_MASS_EDGES

logger = init_logger("vllm.toptheta")

WINDOW_STEPS = 64  # engine steps between two looks
MIN_TOKENS = 64  # decoded tokens that make a window


@dataclass
class _MonitoredLayer:
    """A layer, and what the guard remembers of it."""

    plan: LayerPlan
    guard: LayerGuard
    seen: torch.Tensor  # [num_heads, num_buckets] int64, on the host: the histogram at the end of the last window


class GuardMonitor:
    """Monitors the sparse layers of one group on one rank.

    Args:
        layer_plans: The layers; those without a guard are left alone.
        relaxes: Whether thresholds are lowered; otherwise it is only said that they should be.
        max_lost_mass: What a token of a query head may lose; rounded up to an edge of the histogram.
    """

    def __init__(self, layer_plans: Sequence[LayerPlan], *, relaxes: bool, max_lost_mass: float) -> None:
        self.relaxes = relaxes
        # a bucket is above if all of it is
        self._first_above = 1 + bisect_left(LOST_MASS_EDGES, max_lost_mass)
        self._max_lost_mass = LOST_MASS_EDGES[self._first_above - 1]
        self._layers = [_monitored(plan, plan.guard) for plan in layer_plans if plan.guard is not None]
        self._steps = 0
        self._copy: torch.Tensor | None = None  # [num_layers, num_heads, num_buckets] int64, on its way to the host
        self._copied: torch.cuda.Event | None = None

    def step(self) -> None:
        """Called before every step; does nothing in most of them."""
        if not self._layers:
            return
        self._steps += 1
        if self._copy is None:
            if self._steps >= WINDOW_STEPS:
                self._start_copy()
        elif self._copied is None or self._copied.query():
            histograms, self._copy, self._steps = self._copy, None, 0
            for layer, histogram in zip(self._layers, histograms, strict=True):
                self._observe(layer, histogram)

    @torch.inference_mode()
    def _start_copy(self) -> None:
        histograms = torch.stack([layer.plan.counters.settled().lost_mass_histogram for layer in self._layers])
        if not histograms.is_cuda:
            self._copy = histograms
        elif not torch.cuda.is_current_stream_capturing():
            self._copy = torch.empty(histograms.shape, dtype=histograms.dtype, pin_memory=True)
            self._copy.copy_(histograms, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    @torch.inference_mode()
    def _observe(self, layer: _MonitoredLayer, histogram: torch.Tensor) -> None:
        window = histogram - layer.seen
        if bool((window < 0).any()):  # the counters were zeroed
            window = histogram
        if int(window.sum()) < MIN_TOKENS * len(window):
            return
        layer.seen = histogram.clone()
        share = float(window[:, self._first_above :].sum() / window.sum())
        if not layer.guard.observe(share):
            return
        if self.relaxes:
            layer.plan.thresholds.coefficients[:, 0] = layer.plan.constant_terms - layer.guard.relaxation
        logger.warning(
            "toptheta: in layer %d, %.0f %% of the tokens of a head lost more than %g of the softmax: %s%s",
            layer.plan.counters.layer,
            100 * share,
            self._max_lost_mass,
            "" if self.relaxes else "with guard=relax, ",
            _consequence(layer.guard),
        )


def _monitored(plan: LayerPlan, guard: LayerGuard) -> _MonitoredLayer:
    histogram = plan.counters.buffers.lost_mass_histogram
    return _MonitoredLayer(plan=plan, guard=guard, seen=torch.zeros(histogram.shape, dtype=torch.int64))


def _consequence(guard: LayerGuard) -> str:
    if math.isinf(guard.relaxation):
        return "the layer keeps every key"
    return f"thresholds are lowered by {guard.relaxation:g}" if guard.level else "thresholds are as set"
