"""Text unlike the calibration text, on real attention: the guard brings the lost mass back, and lets go again."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import store_factory
from vllm_toptheta.backend import guard_monitor
from vllm_toptheta.backend.counters import LayerCounters
from vllm_toptheta.backend.guard import RELAXATION, LayerGuard
from vllm_toptheta.backend.plan import LayerPlan
from vllm_toptheta.kernels.contract import LayerThresholds
from vllm_toptheta.kernels.cpu.scratch import Counted
from vllm_toptheta.reference import top_theta_attention

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, SEQ_LEN = 4, 2, 64, 300
EXPECTED = 0.2  # lost mass that 95 % of calibration rows stay below


class Layer:
    """A sparse layer that decodes tokens of its own: the sharper the queries, the less is lost."""

    def __init__(
        self, *, relaxes: bool, threshold: float = 1.5, device: str = "cpu", expected: float = EXPECTED
    ) -> None:
        self.generator = torch.Generator().manual_seed(0)
        coefficients = torch.full((1, NUM_HEADS, 1), threshold, device=device)
        self.plan = LayerPlan(
            thresholds=LayerThresholds(coefficients),
            constant_terms=coefficients[0, :, 0].clone(),
            denominator_compensation=True,
            value_mean_compensation=True,
            counters=LayerCounters(3, [0, 1], NUM_HEADS // NUM_KV_HEADS, device),
            expected_lost_mass=torch.full((NUM_HEADS,), expected),
            guard=LayerGuard(0.25),
        )
        self.monitor = guard_monitor.GuardMonitor([self.plan], relaxes=relaxes)

    @property
    def guard(self) -> LayerGuard:
        assert self.plan.guard is not None
        return self.plan.guard

    def decode(self, sharpness: float, num_steps: int) -> list[float]:
        """Mean lost mass of every step of one token."""
        means = []
        for _ in range(num_steps):
            self.monitor.step()
            query = sharpness * torch.randn(1, NUM_HEADS, HEAD_SIZE, generator=self.generator)
            key, value = torch.randn(2, SEQ_LEN, NUM_KV_HEADS, HEAD_SIZE, generator=self.generator)
            result = top_theta_attention(
                query,
                key,
                value,
                threshold=self.plan.thresholds.coefficients[0].T,
                target_k=1,
                softmax_scale=HEAD_SIZE**-0.5,
            )
            read, one = result.value_rows_read, torch.ones(1, 1, dtype=torch.int64)
            counted = Counted(torch.tensor([1, 0, SEQ_LEN, 1, 0]), one, read, result.lost_mass, read)
            self.plan.counters.scratch.add(self.plan.counters.buffers, counted)
            means.append(float(result.lost_mass.mean()))
        return means


@pytest.fixture(autouse=True)
def _short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_monitor, "WINDOW_STEPS", 16)
    monkeypatch.setattr(guard_monitor, "MIN_TOKENS", 16)


def test_lost_mass_returns_into_range_and_thresholds_return_later() -> None:
    layer = Layer(relaxes=True)
    assert np.mean(layer.decode(4.0, 100)) < EXPECTED
    assert layer.guard.level == 0
    lost = layer.decode(1.0, 400)
    assert np.mean(lost[:16]) > 2 * EXPECTED
    assert np.mean(lost[-100:]) < EXPECTED
    assert 0 < layer.guard.level < len(RELAXATION) - 1
    assert torch.equal(layer.plan.thresholds.coefficients[0, :, 0], layer.plan.constant_terms - layer.guard.relaxation)
    layer.decode(4.0, 16 * 150)
    assert layer.guard.level == 0
    assert torch.equal(layer.plan.thresholds.coefficients[0, :, 0], layer.plan.constant_terms)


def test_thresholds_made_in_inference_mode_move_outside_of_it() -> None:
    with torch.inference_mode():
        layer = Layer(relaxes=True)
    layer.decode(1.0, 100)
    assert layer.guard.level > 0
    assert torch.equal(layer.plan.thresholds.coefficients[0, :, 0], layer.plan.constant_terms - layer.guard.relaxation)


def test_where_lower_thresholds_do_not_help_every_key_is_kept() -> None:
    layer = Layer(relaxes=True, threshold=9.0)
    layer.decode(1.0, 17 * len(RELAXATION))
    assert math.isinf(layer.guard.relaxation)
    assert layer.decode(1.0, 4) == [0.0] * 4


def test_warn_says_so_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(guard_monitor.logger, "warning", lambda text, *values: said.append(text % values))
    layer = Layer(relaxes=False)
    layer.decode(1.0, 200)
    assert torch.equal(layer.plan.thresholds.coefficients[0, :, 0], layer.plan.constant_terms)
    assert said[0].startswith("toptheta: in layer 3, ")
    assert said[0].endswith("with guard=relax, thresholds are lowered by 0.5")


def test_heads_that_are_expected_to_lose_nothing_may_lose_next_to_nothing() -> None:
    layer = Layer(relaxes=True, threshold=-50.0, expected=0.0)
    layer.decode(1.0, 100)
    assert (layer.guard.level, layer.guard.share_above) == (0, 0.0)


def test_few_tokens_are_no_window() -> None:
    layer = Layer(relaxes=True)
    layer.decode(1.0, 15)
    for _ in range(500):  # steps of prompts
        layer.monitor.step()
    assert layer.guard.level == 0


def test_counters_zeroed_after_warm_up_do_not_confuse_it() -> None:
    layer = Layer(relaxes=True)
    layer.decode(4.0, 100)
    layer.plan.counters.zero_()
    layer.decode(4.0, 100)
    assert layer.guard.level == 0
    assert layer.guard.share_above < 0.25


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_graph_sees_the_thresholds_move() -> None:
    layer = Layer(relaxes=True, device="cuda")
    read = torch.zeros(NUM_HEADS, device="cuda")
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        read.copy_(layer.plan.thresholds.coefficients[0, :, 0])
    for _ in range(17 * 3):
        layer.monitor.step()
        layer.plan.counters.buffers.lost_mass_histogram[:, -1] += 1  # as the kernel counts a token that lost nearly all
        torch.cuda.synchronize()  # no copy is on its way for longer than a step
    graph.replay()
    assert layer.guard.level > 0
    assert read.tolist() == [1.5 - layer.guard.relaxation] * NUM_HEADS


def test_without_expectations_nothing_is_guarded(make_config: Any, tmp_path: Path) -> None:
    from vllm_toptheta.backend.plan import Plan

    shape = {"num_layers": 4, "num_heads": 9, "num_kv_heads": 3, "head_size": 64, "target_ks": (8, 128)}
    store_factory.make_store(tmp_path / "store", max_length=4096, measured=True, **shape)
    for guard, state in (("relax", "unmeasured"), ("off", "off")):
        plan = Plan.resolve(make_config({"thresholds": str(tmp_path / "store"), "guard": guard}))
        assert plan.guard_state == state
        layer_plan = plan.for_layer(2, num_heads=3, num_kv_heads=1, rank=1)
        assert layer_plan is not None
        assert layer_plan.guard is None
