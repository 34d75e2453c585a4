"""What the backend will do for one model: the resolved settings, and the thresholds they lead to."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from vllm.logger import init_logger

from vllm_toptheta.backend.counters import LayerCounters
from vllm_toptheta.backend.guard import LayerGuard
from vllm_toptheta.backend.loss_watch import LossWatch
from vllm_toptheta.backend.request_choices import NOTHING_VERIFIED, RequestChoices
from vllm_toptheta.kernels.codec import ShadowCodec, TierCodec, tier_bytes
from vllm_toptheta.kernels.contract import Layer, LayerThresholds, ShadowLayer, TierLayer
from vllm_toptheta.selection import ServedThresholds, select
from vllm_toptheta.settings import Settings
from vllm_toptheta.store import Architecture, Evidence, Serving, ShadowKeys, local_folder, weights_sha256
from vllm_toptheta.store.quality import UNQUANTIZED

_LOGGED = {"mode", "compensation", "max_lost_mass", "guard_share", "always_shadow", "per_request"}

# below vLLM's own logger, so that its format and level apply
logger = init_logger("vllm.toptheta")


class DenseRule(NamedTuple):
    """Which sequences keep every key, beside those whose requests ask for it.

    Attributes:
        max_len: Those of at most this many tokens.
        min_step_tokens: All in a step that holds fewer, over its sequences.
    """

    max_len: int
    min_step_tokens: int


ALWAYS_SPARSE = DenseRule(0, 0)


@dataclass(frozen=True)
class LayerPlan:
    """What one sparse layer needs to know on one rank.

    Attributes:
        thresholds: theta; the guard moves its constant terms.
        constant_terms: [num_heads] float32, those that the server was started with.
        denominator_compensation: Whether the softmax denominator is that of all keys.
        value_mean_compensation: Whether the lost mass is given to the mean value.
        counters: What decoding does there.
        guard: Decides about the thresholds; None if it is off.
        shadow: Calibrated shadow keys; None without.
        tiers: What copies are for; None without.
        watch: Compares what is lost with what the evidence knew; None where it knew nothing.
    """

    thresholds: LayerThresholds
    constant_terms: torch.Tensor
    denominator_compensation: bool
    value_mean_compensation: bool
    counters: LayerCounters
    guard: LayerGuard | None
    shadow: ShadowLayer | None = None
    tiers: TierLayer | None = None
    watch: LossWatch | None = None

    @property
    def known_p99(self) -> float | None:
        """What one token in a hundred lost more than where the promise was measured; None if it is not watched."""
        return None if self.watch is None else self.watch.known.get(self.counters.layer)

    def layer(self, *, softmax_scale: float, logits_soft_cap: float | None) -> Layer:
        """What kernels are told of the layer."""
        return Layer(
            softmax_scale=softmax_scale,
            logits_soft_cap=logits_soft_cap,
            denominator_compensation=self.denominator_compensation,
            value_mean_compensation=self.value_mean_compensation,
            thresholds=self.thresholds,
            shadow=self.shadow,
            tiers=self.tiers,
            counters=self.counters.buffers,
        )


@dataclass(frozen=True)
class Plan:
    """Settings and thresholds of a served model.

    Attributes:
        settings: The options in force.
        thresholds: Those of every layer and head; None if the model runs dense.
        model_id: The model that a store was calibrated on; None where none is used.
        origin: Where the thresholds come from, or why there are none; for the log only.
        dense_layers: Layers that read everything.
        architecture: The model's heads and layers over all ranks.
        choices: What requests can ask for.
        shadow: Calibrated shadow keys; None without, or if the model runs dense.
        heavy: What a key must weigh to be read exactly, where there are copies of keys and values; None where not.
        quality: What is promised, or why nothing is; for the log only.
        promised: The evidence of what is promised; None where nothing is.
        differences: Where the server is not what the promise was measured on.
        automatic: Which sequences are best dense on this hardware, where the settings do not say so.
        watch: Compares what is lost with what the evidence knew; None where it knew nothing.
    """

    settings: Settings
    thresholds: ServedThresholds | None
    model_id: str | None
    origin: str
    dense_layers: frozenset[int]
    architecture: Architecture
    choices: RequestChoices
    shadow: ShadowKeys | None = None
    heavy: float | None = None
    quality: str = ""
    promised: Evidence | None = None
    differences: tuple[str, ...] = ()
    automatic: DenseRule = ALWAYS_SPARSE
    watch: LossWatch | None = None

    @classmethod
    def resolve(cls, vllm_config: Any) -> Plan:
        """Read the options, find the thresholds and check that they were made for this architecture.

        Raises:
            SettingsError: An option is unknown or does not fit the model.
            StoreError: A store is needed and missing, damaged, made for another architecture, or lacks the target or
                what the mode needs.
            UnsupportedError: The thresholds apply after the softmax, or nothing can compute with their shadow keys, or
                the settings are strict, and no promise can be known to be kept.
        """
        settings = Settings.of_engine(vllm_config)
        model_config = vllm_config.model_config
        architecture = Architecture.from_hf_config(model_config.hf_text_config.to_dict())
        selection = select(settings, model_config.model, architecture)
        promised = selection.evidence if selection.is_promised else None
        return cls(
            settings=settings,
            thresholds=selection.thresholds,
            model_id=selection.model_id,
            origin=selection.origin,
            dense_layers=selection.dense_layers,
            architecture=architecture,
            choices=RequestChoices(
                selection.thresholds,
                # what is calibrated for shadow keys holds at the floor that it was calibrated at
                any_floor=selection.shadow is None,
                presets=selection.evidence.preset_floors if selection.evidence else {},
                refusal=_refusal(settings, vllm_config),
                lossy_refusal=_lossy_refusal(settings, vllm_config),
            ),
            shadow=selection.shadow,
            heavy=selection.heavy,
            quality=selection.quality,
            promised=promised,
            differences=tuple(selection.check_promise(settings, _serving(vllm_config))),
            watch=LossWatch(promised.lost_mass_p99) if promised and promised.lost_mass_p99 else None,
        )

    @classmethod
    def code_bytes_of(cls, vllm_config: Any) -> int:
        """`code_bytes` of a configuration; in mode `values` no threshold is read for it.

        Raises:
            SettingsError: As for `resolve`, like the others.
        """
        if Settings.of_engine(vllm_config).mode == "values":
            return 0
        return cls.resolve(vllm_config).code_bytes

    @property
    def code_bytes(self) -> int:
        """Bytes of a token's shadow key or copies in each kv head; 0 without."""
        if self.heavy is not None:
            return tier_bytes(self.architecture.head_size)
        return 0 if self.shadow is None else self.shadow.section.num_channels // 2

    @property
    def dense_rule(self) -> DenseRule:
        """Which sequences stay dense."""
        max_len, min_step_tokens = self.automatic
        if self.settings.min_context is not None:
            max_len, min_step_tokens = self.settings.min_context, 0
        elif self.promised is not None:
            max_len = max(max_len, self.promised.dense_length)
        return DenseRule(max(max_len, self.thresholds.max_dense_len if self.thresholds else 0), min_step_tokens)

    @property
    def length_range(self) -> tuple[int, int]:
        """Lengths, in tokens, to which n is clamped in what is calibrated (`kernels.contract.DecodeStep`)."""
        if self.shadow is not None:
            return self.shadow.section.min_length, self.shadow.section.max_length
        return self.thresholds.length_range if self.thresholds else (1, 1)

    @property
    def guard(self) -> str:
        """What the guard does; off with calibrated shadow keys, because what is lost is only estimated."""
        return self.settings.guard if self.thresholds is not None and self.shadow is None else "off"

    def max_lost_mass(self, layer: int) -> float:
        """What a token of a query head may lose in a layer before the guard counts it.

        Where it is not set, it is what one token in a hundred lost more than where the promise was measured, if that is
        less than the default. The margin: the guard rounds it up to a power of two, and acts only where `guard_share`
        of the tokens, by default ten times as many as measured, lose more.
        """
        limit = self.settings.max_lost_mass
        if self.watch is None or "max_lost_mass" in self.settings.model_fields_set:
            return limit
        return min(limit, self.watch.known.get(layer, limit))

    def log(self, *, more_memory: float = 0.0, scans: bool = True) -> None:
        """Say once what is in force.

        Args:
            more_memory: By how much shadow keys or copies lengthen the pages of the KV cache, as a share.
            scans: Whether a step can be long enough to go by them.
        """
        if self.thresholds is None:
            logger.warning_once("toptheta: every layer runs dense: %s", self.origin)
            return
        if self.code_bytes:
            has_no_guard = self.shadow is not None and self.settings.guard != "off"
            logger.info_once(
                "toptheta: %s of %d bytes make the pages of the KV cache %.1f %% larger%s",
                "shadow keys"
                if self.heavy is None
                else f"copies of keys and values, exact rows from {self.heavy:g} of the anchors' weight on,",
                self.code_bytes,
                100 * more_memory,
                "; there is no guard, because what is lost is only estimated" if has_no_guard else "",
            )
            if not scans:
                logger.warning_once(
                    "toptheta: no step of this server can be long enough to skip keys, so all are read; mode values "
                    "does the same in less memory"
                )
        options, rule = self.settings.model_dump(include=_LOGGED), self.dense_rule
        logger.info_once(
            "toptheta: thresholds %s: %s; dense up to %d tokens%s, dense_layers=%s, guard=%s, %s",
            self.thresholds.label,
            self.origin,
            rule.max_len,
            f", and in steps of fewer than {rule.min_step_tokens}" if rule.min_step_tokens else "",
            ",".join(map(str, sorted(self.dense_layers))) or "none",
            self.guard,
            ", ".join(f"{name}={value}" for name, value in options.items()),
        )
        logger.info_once("toptheta: %s", self.quality)
        limits = {self.max_lost_mass(layer) for layer in range(self.architecture.num_layers)}
        if self.guard != "off" and limits != {self.settings.max_lost_mass}:
            logger.info_once(
                "toptheta: in place of max_lost_mass, the guard takes what 1 %% of the tokens lost more than where the "
                "promise was measured, %g to %g by layer",
                min(limits),
                max(limits),
            )
        if self.differences:
            logger.warning_once("toptheta: what is promised was measured otherwise: %s", "; ".join(self.differences))

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
        if self.thresholds is None or layer in self.dense_layers:
            return None
        first = rank * num_heads
        group = num_heads // num_kv_heads
        whole_group = self.architecture.num_heads // self.architecture.num_kv_heads
        kv_heads = [(first + head * group) // whole_group for head in range(num_kv_heads)]
        heads = slice(first, first + num_heads)
        coefficients = torch.from_numpy(self.thresholds.of_heads(layer, heads)).to(device)
        return LayerPlan(
            thresholds=LayerThresholds(coefficients, self.thresholds.is_relative),
            constant_terms=coefficients[:, 0].clone(),
            denominator_compensation=self.settings.compensation != "none",
            value_mean_compensation=self.settings.compensation == "sdc+vmc",
            counters=LayerCounters(
                layer,
                kv_heads,
                group,
                device,
                counts_keys=self.code_bytes > 0,
                counts_copies=self.heavy is not None,
            ),
            guard=None if self.guard == "off" else LayerGuard(self.settings.guard_share, self.max_lost_mass(layer)),
            watch=self.watch,
            shadow=None
            if self.shadow is None
            else _shadow_layer(self.shadow, layer, heads=heads, kv_heads=kv_heads, device=device),
            tiers=None
            if self.heavy is None
            else TierLayer(
                TierCodec.build(self.architecture.head_size, device), math.log(self.heavy) if self.heavy else -math.inf
            ),
        )


def _shadow_layer(
    keys: ShadowKeys, layer: int, *, heads: slice, kv_heads: list[int], device: torch.device | str
) -> ShadowLayer:
    """A layer's share of what a store holds.

    Args:
        keys: Of the store.
        layer: Index in the model.
        heads: The rank's query heads.
        kv_heads: The kv heads that they belong to.
        device: Where the tensors go.
    """
    stored = keys.projection(layer)
    parts = (stored.encoder, stored.decoder, stored.key_mean)
    return ShadowLayer(
        codec=ShadowCodec.build(*(torch.from_numpy(part[kv_heads].copy()).to(device) for part in parts)),
        margin=torch.from_numpy(keys.margin[layer, heads].copy()).to(device),
        log_unread_ratio=torch.from_numpy(keys.log_scale[layer, heads].copy()).to(device),
    )


def _serving(vllm_config: Any) -> Serving:
    """How the engine serves the model, as far as it is known: weights may still have to be downloaded."""
    model_config = vllm_config.model_config
    folder = None
    # a model may also be a file, or lie in an object store
    with suppress(ValueError):
        folder = local_folder(model_config.model, model_config.revision)
    return Serving(
        weights_sha256=None if folder is None else weights_sha256(folder),
        dtype=str(model_config.dtype).removeprefix("torch."),
        quantization=model_config.quantization or UNQUANTIZED,
        cache_dtype=vllm_config.cache_config.cache_dtype,
        max_length=model_config.max_model_len,
    )


def _refusal(settings: Settings, vllm_config: Any) -> str | None:
    """Why requests can ask for nothing; None if they can."""
    if not settings.per_request:
        return "this server was started with per_request false, so requests cannot choose how they are decoded"
    if vllm_config.parallel_config.use_ubatching:
        return "this server splits its batches in two (--enable-dbo), so requests cannot choose how they are decoded"
    return None


def _lossy_refusal(settings: Settings, vllm_config: Any) -> str | None:
    """Why none of them can go without verification; None if they can."""
    if not settings.lossless:
        return NOTHING_VERIFIED
    if vllm_config.use_v2_model_runner:
        return "GPUs verify a batch by graphs in which all of it is dense"
    return None
