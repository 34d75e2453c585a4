"""Text unlike the calibration text, on real attention: the guard brings the lost mass back, and lets go again."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from vllm_toptheta.backend import guard_monitor
from vllm_toptheta.backend.counters import LayerCounters
from vllm_toptheta.backend.guard import RELAXATION, LayerGuard
from vllm_toptheta.backend.loss_watch import MAX_SHARE, LossWatch
from vllm_toptheta.backend.plan import LayerPlan
from vllm_toptheta.kernels.contract import NUM_COEFFICIENTS, LayerThresholds
from vllm_toptheta.kernels.cpu.scratch import Counted
from vllm_toptheta.reference import top_theta_attention

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, SEQ_LEN = 4, 2, 64, 300
BOUND = 0.25  # what a token may lose


class Layer:
    """A sparse layer that decodes tokens of its own: the sharper the queries, the less is lost."""

    def __init__(
        self,
        *,
        relaxes: bool,
        threshold: float = 1.5,
        device: str = "cpu",
        bound: float = BOUND,
        watch: LossWatch | None = None,
        is_guarded: bool = True,
    ) -> None:
        self.generator = torch.Generator().manual_seed(0)
        coefficients = torch.zeros(NUM_HEADS, NUM_COEFFICIENTS, device=device)
        coefficients[:, 0] = threshold
        self.plan = LayerPlan(
            thresholds=LayerThresholds(coefficients),
            constant_terms=coefficients[:, 0].clone(),
            denominator_compensation=True,
            value_mean_compensation=True,
            counters=LayerCounters(3, [0, 1], NUM_HEADS // NUM_KV_HEADS, device),
            guard=LayerGuard(0.25, bound) if is_guarded else None,
            watch=watch,
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
                threshold=self.plan.thresholds.coefficients[:, 0],
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
    assert np.mean(layer.decode(4.0, 100)) < BOUND
    assert layer.guard.level == 0
    lost = layer.decode(1.0, 400)
    assert np.mean(lost[:16]) > 2 * BOUND
    assert np.mean(lost[-100:]) < BOUND
    assert 0 < layer.guard.level < len(RELAXATION) - 1
    assert torch.equal(layer.plan.thresholds.coefficients[:, 0], layer.plan.constant_terms - layer.guard.relaxation)
    layer.decode(4.0, 16 * 150)
    assert layer.guard.level == 0
    assert torch.equal(layer.plan.thresholds.coefficients[:, 0], layer.plan.constant_terms)


def test_thresholds_made_in_inference_mode_move_outside_of_it() -> None:
    with torch.inference_mode():
        layer = Layer(relaxes=True)
    layer.decode(1.0, 100)
    assert layer.guard.level > 0
    assert torch.equal(layer.plan.thresholds.coefficients[:, 0], layer.plan.constant_terms - layer.guard.relaxation)


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
    assert torch.equal(layer.plan.thresholds.coefficients[:, 0], layer.plan.constant_terms)
    assert said[0].startswith("toptheta: in layer 3, ")
    assert said[0].endswith("with guard=relax, thresholds are lowered by 0.5")


@pytest.mark.parametrize("is_guarded", [False, True])
def test_what_the_evidence_did_not_know_is_an_alarm_until_it_is_over(
    is_guarded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(guard_monitor.logger, "warning", lambda text, *values: said.append(text % values))
    watch = LossWatch({3: BOUND, 7: 0.1})
    layer = Layer(relaxes=True, watch=watch, is_guarded=is_guarded)
    layer.decode(4.0, 100)
    assert (watch.alarms, said) == (0, [])
    assert watch.share is not None
    assert watch.share < MAX_SHARE
    layer.decode(1.0, 100 if is_guarded else 17)
    layer.decode(4.0, 100)
    assert (watch.alarms, watch.is_alarming, set(watch.shares)) == (1, False, {3})
    began, *_, ended = (text for text in said if "in layer 3" not in text)
    assert began.startswith("toptheta: live text is unlike what the promise was measured on: ")
    assert began.endswith(" % of its tokens lose more of the softmax than 1 % did there, most in layers 3")
    assert ended.startswith("toptheta: live text loses as little again as what the promise was measured on: ")
    assert len(said) == 2 or is_guarded


def test_a_layer_that_the_evidence_does_not_know_is_guarded_and_not_watched() -> None:
    watch = LossWatch({7: 0.1})
    layer = Layer(relaxes=True, watch=watch)
    layer.decode(1.0, 100)
    assert layer.guard.level > 0
    assert watch.shares == {}


def test_however_little_may_be_lost_next_to_nothing_is_no_alarm() -> None:
    layer = Layer(relaxes=True, threshold=-50.0, bound=1e-6)
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
        read.copy_(layer.plan.thresholds.coefficients[:, 0])
    for _ in range(17 * 3):
        layer.monitor.step()
        layer.plan.counters.buffers.lost_mass_histogram[:, -1] += 1  # as the kernel counts a token that lost nearly all
        torch.cuda.synchronize()  # no copy is on its way for longer than a step
    graph.replay()
    assert layer.guard.level > 0
    assert read.tolist() == [1.5 - layer.guard.relaxation] * NUM_HEADS


@pytest.mark.parametrize(
    ("max_lost_mass", "alarming"),
    [(0.5, [9]), (0.4, [9]), (0.25, [8, 9]), (0.3, [9]), (0.26, [9]), (0.001, [1, 2, 3, 4, 5, 6, 7, 8, 9])],
)
def test_the_bound_is_rounded_up_to_a_power_of_two(max_lost_mass: float, alarming: list[int]) -> None:
    for bucket in range(10):
        layer = Layer(relaxes=True, bound=max_lost_mass)
        for _ in range(17 * 2):
            layer.monitor.step()
            layer.plan.counters.buffers.lost_mass_histogram[:, bucket] += 1
        assert (layer.guard.level > 0) == (bucket in alarming), bucket


@pytest.mark.parametrize("guard", ["relax", "warn", "off"])
@pytest.mark.parametrize("is_calibrated", [True, False])
def test_what_is_guarded(make_config: Any, calibrated: dict[str, Any], guard: str, is_calibrated: bool) -> None:
    from vllm_toptheta.backend.plan import Plan

    options = {"guard": guard, "guard_share": 0.3, **(calibrated if is_calibrated else {})}
    plan = Plan.resolve(make_config(options))
    layer_plan = plan.for_layer(2, num_heads=3, num_kv_heads=1, rank=1)
    assert layer_plan is not None
    assert plan.guard == guard
    assert (layer_plan.guard is not None) == (guard != "off")
    assert layer_plan.guard is None or layer_plan.guard.limit == 0.3
