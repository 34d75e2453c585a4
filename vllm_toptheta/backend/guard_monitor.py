"""Where the guard meets the device: it reads what decoding lost, window by window, and moves thresholds in place.

What the evidence of a promise knew of lost mass is compared with the same windows, whether there is a guard or not.

The kernels count lost masses in histograms on the device, and read thresholds from tensors that captured graphs refer
to. So the guard needs nothing from a step: it looks at copies of the histograms, and writes into those tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from vllm.logger import init_logger

from vllm_toptheta.backend.guard import LayerGuard
from vllm_toptheta.backend.host_copies import HostCopies, counted_since
from vllm_toptheta.backend.loss_watch import LossWatch
from vllm_toptheta.backend.plan import LayerPlan
from vllm_toptheta.limits import first_bucket_above

logger = init_logger("vllm.toptheta")

WINDOW_STEPS = 64  # engine steps between two looks
MIN_TOKENS = 64  # decoded tokens that make a window


@dataclass
class _MonitoredLayer:
    """A layer, and what is remembered of it."""

    plan: LayerPlan
    seen: torch.Tensor  # [num_heads, num_buckets] int64, on the host: the histogram at the end of the last window


class GuardMonitor:
    """Monitors the sparse layers of one group on one rank.

    Args:
        layer_plans: The layers; those that are neither guarded nor watched are left alone.
        relaxes: Whether thresholds are lowered; otherwise it is only said that they should be.
    """

    def __init__(self, layer_plans: Sequence[LayerPlan], *, relaxes: bool) -> None:
        self.relaxes = relaxes
        self._layers = [
            _monitored(plan) for plan in layer_plans if plan.guard is not None or plan.known_p99 is not None
        ]
        self._watch = next((plan.watch for plan in layer_plans if plan.watch is not None), None)
        self._copies = HostCopies(self._histograms)

    def step(self) -> None:
        """Called before every step; does nothing in most of them."""
        if not self._layers:
            return
        histograms = self._copies.step(WINDOW_STEPS)
        if histograms is None:
            return
        shares: dict[int, float] = {}
        for layer, histogram in zip(self._layers, histograms, strict=True):
            window = _window(layer, histogram)
            if window is None:
                continue
            if layer.plan.guard is not None:
                self._observe(layer.plan, layer.plan.guard, window)
            if layer.plan.known_p99 is not None:
                shares[layer.plan.counters.layer] = _share(window, first_bucket_above(layer.plan.known_p99))
        if shares and self._watch is not None and self._watch.observe(shares):
            _report(self._watch)

    def _histograms(self) -> torch.Tensor:
        """[num_layers, num_heads, num_buckets] int64."""
        return torch.stack([layer.plan.counters.settled().lost_mass_histogram for layer in self._layers])

    @torch.inference_mode()
    def _observe(self, plan: LayerPlan, guard: LayerGuard, window: torch.Tensor) -> None:
        share = _share(window, guard.first_above)
        if not guard.observe(share):
            return
        if self.relaxes:
            plan.thresholds.coefficients[:, 0] = plan.constant_terms - guard.relaxation
        logger.warning(
            "toptheta: in layer %d, %.0f %% of the tokens of a head lost more than %g of the softmax: %s%s",
            plan.counters.layer,
            100 * share,
            guard.bound,
            "" if self.relaxes else "with guard=relax, ",
            _consequence(guard),
        )


def _monitored(plan: LayerPlan) -> _MonitoredLayer:
    histogram = plan.counters.buffers.lost_mass_histogram
    return _MonitoredLayer(plan=plan, seen=torch.zeros(histogram.shape, dtype=torch.int64))


def _window(layer: _MonitoredLayer, histogram: torch.Tensor) -> torch.Tensor | None:
    """The layer's histogram since the last window; None while too few tokens are in it."""
    window = counted_since(layer.seen, histogram)
    if int(window.sum()) < MIN_TOKENS * len(window):
        return None
    layer.seen = histogram.clone()
    return window


def _share(window: torch.Tensor, first_bucket: int) -> float:
    return float(window[:, first_bucket:].sum() / window.sum())


def _report(watch: LossWatch) -> None:
    share = 100 * (watch.share or 0.0)
    if watch.is_alarming:
        most = sorted(watch.shares, key=watch.shares.__getitem__, reverse=True)[:3]
        logger.warning(
            "toptheta: live text is unlike what the promise was measured on: %.1f %% of its tokens lose more of the "
            "softmax than 1 %% did there, most in layers %s",
            share,
            ", ".join(map(str, most)),
        )
    else:
        logger.warning(
            "toptheta: live text loses as little again as what the promise was measured on: %.1f %% of its tokens lose "
            "more than 1 %% did there",
            share,
        )


def _consequence(guard: LayerGuard) -> str:
    if math.isinf(guard.relaxation):
        return "the layer keeps every key"
    return f"thresholds are lowered by {guard.relaxation:g}" if guard.level else "thresholds are as set"
