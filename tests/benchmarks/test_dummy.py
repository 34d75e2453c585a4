"""Thresholds and margins that are set on a running engine, on one that only counts."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
from vllm.config import SpeculativeConfig

from vllm_toptheta import store
from vllm_toptheta.backend.counters import LayerCounters
from vllm_toptheta.benchmarks.dummy import SAMPLED_PAGES, accept, keep, write_model
from vllm_toptheta.kernels.codec import ShadowCodec
from vllm_toptheta.kernels.contract import NUM_COEFFICIENTS, LayerThresholds

NUM_LAYERS, NUM_KV_HEADS, GROUP, HEAD_SIZE, NUM_TOKENS = 2, 2, 2, 64, 4000


class CountingEngine:
    """Layers whose scores, and those of their shadows, are given; decoding compares them with the thresholds.

    Made and run in inference mode as vLLM's are, while what `collective_rpc` calls runs outside of it.
    """

    @torch.inference_mode()
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        scores = 1e-6 * torch.randn(NUM_LAYERS, NUM_KV_HEADS, GROUP, NUM_TOKENS, generator=generator)
        self.scores = scores
        self.shadows = scores + 3e-7 * torch.randn(scores.shape, generator=generator)
        self.keys = 1e-3 * torch.randn(NUM_LAYERS, 1 + SAMPLED_PAGES, NUM_KV_HEADS, 16, HEAD_SIZE, generator=generator)
        self.keys *= torch.linspace(2, 0.1, HEAD_SIZE)
        self.resets = 0
        layers = {f"layer {index}": self._layer(index) for index in range(NUM_LAYERS)}
        context = layers | {"dense": SimpleNamespace(impl=SimpleNamespace(layer_plan=None)), "no attention": object()}
        self.worker = SimpleNamespace(
            vllm_config=SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=context))
        )
        self.layers = list(layers.values())

    def _layer(self, index: int) -> Any:
        num_heads = NUM_KV_HEADS * GROUP
        zeros = torch.zeros(NUM_KV_HEADS, HEAD_SIZE, HEAD_SIZE // 2)
        plan = SimpleNamespace(
            counters=LayerCounters(index, list(range(NUM_KV_HEADS)), GROUP, counts_keys=True),
            thresholds=LayerThresholds(torch.full((num_heads, NUM_COEFFICIENTS), 7.0), is_relative=True),
            shadow=SimpleNamespace(
                margin=torch.zeros(num_heads),
                codec=ShadowCodec.build(zeros, zeros.mT, torch.zeros(NUM_KV_HEADS, HEAD_SIZE)),
            ),
        )
        return SimpleNamespace(
            impl=SimpleNamespace(layer_plan=plan), kv_cache=torch.cat([self.keys[index], self.keys[index]], dim=-1)
        )

    def collective_rpc(self, function: Callable[..., Any], args: tuple[Any, ...] = ()) -> list[Any]:
        return [function(self.worker, *args)]

    def reset_prefix_cache(self) -> None:
        self.resets += 1

    @torch.inference_mode()
    def decode(self) -> None:
        """Three tokens."""
        for index in range(NUM_LAYERS):
            plan = self.layers[index].impl.layer_plan
            theta = plan.thresholds.coefficients[:, 0].view(NUM_KV_HEADS, GROUP, 1)
            candidates = (self.shadows[index] >= theta - plan.shadow.margin.view(NUM_KV_HEADS, GROUP, 1)).any(1)
            survives = (self.scores[index] >= theta).any(1) & candidates
            plan.counters.buffers.totals[0] += 3
            plan.counters.buffers.keys_read.add_(3 * candidates.sum(1))
            plan.counters.buffers.value_rows_read.add_(3 * survives.sum(1))


@torch.inference_mode()
def last_read(engine: CountingEngine, counter: str) -> torch.Tensor:
    """Of a counter by layer and kv head, per token, with the numbers that are set now."""
    counters = [layer.impl.layer_plan.counters for layer in engine.layers]
    for one in counters:
        one.zero_()
    engine.decode()
    return torch.stack([getattr(one.buffers, counter) for one in counters]) / 3


def test_value_rows_are_as_many_as_wanted() -> None:
    engine = CountingEngine()
    keep(engine, engine.decode, rows=100)
    assert (last_read(engine, "value_rows_read") - 100).abs().max() <= 3
    assert not any(bool(layer.impl.layer_plan.shadow.margin.any()) for layer in engine.layers)
    assert engine.resets == 0
    assert not any(bool(layer.impl.layer_plan.thresholds.coefficients[:, 1:].any()) for layer in engine.layers)


def test_keys_and_value_rows_are_as_many_as_wanted() -> None:
    engine = CountingEngine()
    keep(engine, engine.decode, rows=100, keys=400)
    assert (last_read(engine, "keys_read") - 400).abs().max() <= 8
    assert (last_read(engine, "value_rows_read") - 100).abs().max() <= 3
    assert all(bool((layer.impl.layer_plan.shadow.margin > 0).all()) for layer in engine.layers)


def test_keys_are_projected_where_they_vary_most_and_encoded_anew() -> None:
    engine = CountingEngine()
    keep(engine, engine.decode, rows=100, keys=400)
    assert engine.resets == 1
    for layer, keys in zip(engine.layers, engine.keys, strict=True):
        projection = layer.impl.layer_plan.shadow.codec
        sampled = keys[1:].transpose(0, 1).flatten(1, 2)
        centred = sampled - projection.key_mean[:, None]
        kept = centred @ projection.encoder @ projection.decoder
        lost = float((centred - kept).square().sum() / centred.square().sum())
        # the half of the channels with the smaller variances
        assert lost == pytest.approx(0.15, abs=0.04)


def test_the_written_store_has_shadow_keys_alone(tmp_path: Path) -> None:
    model, thresholds = write_model(tmp_path)
    written = store.load(store.resolve(str(model), thresholds=thresholds))
    assert written.manifest.thresholds is None
    assert written.shadow.section.num_channels == 64


def test_drafts_are_accepted_by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [SimpleNamespace(num_speculative_tokens=3), None]
    monkeypatch.setattr(vllm.EngineArgs, "create_speculative_config", lambda args, **named: made.pop(0))
    accept(0.5)
    config = vllm.EngineArgs.create_speculative_config(None, target_model_config=None)
    assert (config.rejection_sample_method, config.synthetic_acceptance_rates) == ("synthetic", [0.5, 0.25, 0.125])
    assert vllm.EngineArgs.create_speculative_config(None) is None
    fields = inspect.signature(SpeculativeConfig).parameters
    assert {"rejection_sample_method", "synthetic_acceptance_rates"} <= set(fields)
