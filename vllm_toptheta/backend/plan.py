"""What the backend will do for one model: the resolved settings, and the thresholds they lead to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.logger import init_logger

from vllm_toptheta.backend.counters import LayerCounters
from vllm_toptheta.backend.guard import LayerGuard
from vllm_toptheta.backend.levels import COMMON, Levels
from vllm_toptheta.kernels.codec import ShadowCodec
from vllm_toptheta.kernels.contract import Layer, LayerThresholds, ShadowLayer
from vllm_toptheta.limits import NUM_FIRST_ANCHORS, NUM_LAST_ANCHORS
from vllm_toptheta.selection import select
from vllm_toptheta.settings import OPTIONS_KEY, Settings
from vllm_toptheta.store import Architecture, ShadowKeys, ThresholdCurve

# below vLLM's own logger, so that its format and level apply
logger = init_logger("vllm.toptheta")


@dataclass(frozen=True)
class LayerPlan:
    """What one sparse layer needs to know on one rank.

    Attributes:
        thresholds: theta; the guard moves the constant terms of level 0.
        constant_terms: [num_heads] float32, those of the calibrated thresholds of level 0.
        denominator_compensation: Whether the softmax denominator is that of all keys.
        value_mean_compensation: Whether the lost mass is given to the mean value.
        counters: What decoding does there.
        expected_lost_mass: [num_heads] float32 on the host, what 95 % of calibration rows stay below; None if the
            thresholds came without a measurement.
        guard: Decides about the thresholds; None if it is off, or nothing is expected.
        shadow: What mode `shadow` needs; None in mode `values`.
    """

    thresholds: LayerThresholds
    constant_terms: torch.Tensor
    denominator_compensation: bool
    value_mean_compensation: bool
    counters: LayerCounters
    expected_lost_mass: torch.Tensor | None
    guard: LayerGuard | None
    shadow: ShadowLayer | None = None

    def layer(self, *, softmax_scale: float, logits_soft_cap: float | None) -> Layer:
        """What kernels are told of the layer."""
        return Layer(
            softmax_scale=softmax_scale,
            logits_soft_cap=logits_soft_cap,
            denominator_compensation=self.denominator_compensation,
            value_mean_compensation=self.value_mean_compensation,
            thresholds=self.thresholds,
            shadow=self.shadow,
            counters=self.counters.buffers,
        )


@dataclass(frozen=True)
class Plan:
    """Settings and thresholds of a served model.

    Attributes:
        settings: The options in force.
        curve: theta(n) of every layer and head at the target; None if the model runs dense.
        model_id: The model that the thresholds were calibrated on; None if there are none.
        origin: Where the thresholds lie, or why there are none; for the log only.
        dense_layers: Layers that read everything.
        architecture: The model's heads and layers over all ranks.
        levels: What requests can ask for.
        shadow: What mode `shadow` needs; None in mode `values`, or if the model runs dense.
    """

    settings: Settings
    curve: ThresholdCurve | None
    model_id: str | None
    origin: str
    dense_layers: frozenset[int]
    architecture: Architecture
    levels: Levels
    shadow: ShadowKeys | None = None

    @classmethod
    def resolve(cls, vllm_config: Any) -> Plan:
        """Read the options, find the thresholds and check that they were made for this architecture.

        Raises:
            SettingsError: An option is unknown or does not fit the model.
            StoreError: Thresholds are missing, damaged, made for another architecture or lack the target, or what the
                mode needs.
            UnsupportedError: The thresholds apply after the softmax, or nothing can compute with their shadow keys.
        """
        settings = _settings(vllm_config)
        model_config = vllm_config.model_config
        architecture = Architecture.from_hf_config(model_config.hf_text_config.to_dict())
        selection = select(settings, model_config.model, architecture)
        refusal = _refusal(settings, vllm_config)
        return cls(
            settings=settings,
            curve=selection.curve,
            model_id=selection.model_id,
            origin=selection.origin,
            dense_layers=selection.dense_layers,
            architecture=architecture,
            levels=Levels(
                selection.curve,
                () if refusal else selection.others,
                min_context=settings.min_context,
                refusal=refusal,
            ),
            shadow=selection.shadow,
        )

    @classmethod
    def code_bytes_of(cls, vllm_config: Any) -> int:
        """`code_bytes` of a configuration; without shadow keys no threshold is read for it.

        Raises:
            SettingsError: As for `resolve`, like the others.
        """
        if _settings(vllm_config).mode == "values":
            return 0
        return cls.resolve(vllm_config).code_bytes

    @property
    def code_bytes(self) -> int:
        """Bytes of a token's shadow key in each kv head; 0 without."""
        return 0 if self.shadow is None else self.shadow.section.num_channels // 2

    @property
    def max_dense_len(self) -> int:
        """The longest context, in tokens, that still stays dense."""
        return max(self.settings.min_context, self.curve.dense_length if self.curve else 0)

    @property
    def guard_state(self) -> str:
        """What the guard does: an option, or `unmeasured` if there is nothing to compare with."""
        return "off" if self.settings.guard == "off" else "unmeasured"

    def log(self, *, more_memory: float = 0.0, scans: bool = True) -> None:
        """Say once what is in force.

        Args:
            more_memory: By how much shadow keys lengthen the pages of the KV cache, as a share.
            scans: Whether a step can be long enough to go by shadow keys.
        """
        if self.curve is None:
            logger.warning_once("toptheta: every layer runs dense: %s", self.origin)
            return
        chosen = {"target": self.curve.label}
        chosen |= self.settings.model_dump(exclude={"thresholds", "dense_layers", "target", "target_k", "page"})
        options = ", ".join(f"{name}={value}" for name, value in chosen.items())
        dense_layers = ",".join(map(str, sorted(self.dense_layers))) or "none"
        if self.shadow is not None:
            logger.info_once(
                "toptheta: shadow keys of %d bytes make the pages of the KV cache %.1f %% larger%s",
                self.code_bytes,
                100 * more_memory,
                "; there is no guard, because what is lost is only estimated" if self.settings.guard != "off" else "",
            )
            if not scans:
                logger.warning_once(
                    "toptheta: no step of this server can be long enough for shadow keys, so all keys are read; mode "
                    "values does the same in less memory"
                )
        elif self.guard_state == "unmeasured":
            logger.warning_once("toptheta: the guard is off, because thresholds say nothing of what they lose")
        logger.info_once(
            "toptheta: thresholds of %s in %s; dense_layers=%s, %s", self.model_id, self.origin, dense_layers, options
        )

    def for_layer(
        self, layer: int, *, num_heads: int, num_kv_heads: int, rank: int, device: torch.device | str = "cpu"
    ) -> LayerPlan | None:
        """A layer's share of the plan on one tensor-parallel rank, or None if the layer is dense.

        Ranks hold consecutive query heads; where there are more ranks than kv heads, several hold the same kv head
        (vLLM's QKVParallelLinear).

        Args:
            layer: Index in the model.
            num_heads: Query heads on the rank.
            num_kv_heads: Key and value heads on the rank.
            rank: Tensor-parallel rank.
            device: Where the tensors go.
        """
        if self.curve is None or layer in self.dense_layers:
            return None
        first = rank * num_heads
        group = num_heads // num_kv_heads
        whole_group = self.architecture.num_heads // self.architecture.num_kv_heads
        kv_heads = [(first + head * group) // whole_group for head in range(num_kv_heads)]
        heads = slice(first, first + num_heads)
        coefficients = self.levels.coefficients(layer, heads).to(device)
        return LayerPlan(
            thresholds=LayerThresholds(coefficients),
            constant_terms=coefficients[COMMON, :, 0].clone(),
            denominator_compensation=self.settings.compensation != "none",
            value_mean_compensation=self.settings.compensation == "sdc+vmc",
            counters=LayerCounters(layer, kv_heads, group, device, counts_keys=self.shadow is not None),
            # a store says nothing of what is lost, so there is nothing to compare with
            expected_lost_mass=None,
            guard=None,
            shadow=None
            if self.shadow is None
            else _shadow_layer(self.shadow, self.levels, layer, heads=heads, kv_heads=kv_heads, device=device),
        )


def _shadow_layer(
    keys: ShadowKeys, levels: Levels, layer: int, *, heads: slice, kv_heads: list[int], device: torch.device | str
) -> ShadowLayer:
    """A layer's share of what a store holds; zeros at the dense level.

    Args:
        keys: Of the store.
        levels: What requests can ask for.
        layer: Index in the model.
        heads: The rank's query heads.
        kv_heads: The kv heads that they belong to.
        device: Where the tensors go.
    """
    stored = keys.projection(layer)
    parts = (stored.encoder, stored.decoder, stored.key_mean)
    return ShadowLayer(
        codec=ShadowCodec.build(*(torch.from_numpy(part[kv_heads].copy()).to(device) for part in parts)),
        margin=levels.stack(lambda curve: keys.margin[layer, heads]).to(device),
        log_unread_ratio=levels.stack(lambda curve: keys.log_scale[layer, heads]).to(device),
        num_sink=NUM_FIRST_ANCHORS,
        num_recent=NUM_LAST_ANCHORS,
    )


def _settings(vllm_config: Any) -> Settings:
    options = vllm_config.additional_config
    return Settings.load(options.get(OPTIONS_KEY, {}) if isinstance(options, dict) else {})


def _refusal(settings: Settings, vllm_config: Any) -> str | None:
    """Why requests can ask for nothing; None if they can."""
    if not settings.per_request:
        return "this server was started with per_request false, so requests cannot choose how they are decoded"
    if vllm_config.parallel_config.use_ubatching:
        return "this server splits its batches in two (--enable-dbo), so requests cannot choose how they are decoded"
    return None
