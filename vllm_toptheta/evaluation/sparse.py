"""A variant made ready to attend: its thresholds and compensation terms, by layer, head and length of the row."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vllm_toptheta.calibration.override import AttentionCall
from vllm_toptheta.errors import EvaluationError
from vllm_toptheta.evaluation.candidates import ShadowCandidates
from vllm_toptheta.evaluation.tiering import Copies, Tiers
from vllm_toptheta.evaluation.variants import Variant
from vllm_toptheta.limits import NUM_ANCHORS, NUM_FIRST_ANCHORS, NUM_LAST_ANCHORS
from vllm_toptheta.reference import (
    AttentionResult,
    Compensation,
    Phase,
    Placement,
    anchor_lse,
    causal_scores,
    top_k_attention,
    top_theta_attention,
)
from vllm_toptheta.store import ThresholdStore

__all__ = ["Encoded", "SparseAttention"]


@dataclass(frozen=True)
class Encoded:
    """What is made of a layer's keys and values once, for all blocks of its rows; nothing for most variants.

    Attributes:
        codes: `[seq_len, num_kv_heads, num_channels]` uint8, of shadow keys.
        copies: of tiers.
    """

    codes: Tensor | None = None
    copies: Copies | None = None


_NOTHING_ENCODED = Encoded()


class SparseAttention:
    """One variant, for rows of up to a length.

    Args:
        variant: what to apply.
        store: the thresholds that the variant names; None for one that needs none.
        max_length: keys of the longest row.
        phase: which rows are thresholded.
        device: of the queries.

    Raises:
        EvaluationError: the variant's compensation is calibrated, and its thresholds are not; or tiers are of some rows
            only.
        ExpectationsMissing: the store lacks what the variant's compensation needs.
        ShadowMissing: the store lacks shadow keys, and the variant needs them.
        SettingsError: the variant's target is not one.
        TargetOutOfRange: the store was not calibrated for it.
    """

    def __init__(
        self,
        variant: Variant,
        store: ThresholdStore | None = None,
        *,
        max_length: int,
        phase: Phase = "both",
        device: torch.device | str = "cpu",
    ) -> None:
        self.variant = variant
        self.phase: Phase = phase
        self.max_length = max_length
        self.dense_layers = frozenset(variant.dense_layers or ())
        self._placement: Placement = "pre_softmax"
        self._thresholds: Tensor | None = None
        self._offline_sum: Tensor | None = None
        self._exp_threshold_scale: Tensor | None = None
        self._candidates: ShadowCandidates | None = None
        self._tiers: Tiers | None = None
        if variant.weight_floor is not None and variant.heavy is not None:
            if phase != "both":
                raise EvaluationError(f"tiers are of every row, not of phase {phase} alone", field="phase")
            self._tiers = Tiers(weight_floor=variant.weight_floor, heavy=variant.heavy)
        if store is None:
            if variant.calibrated_term is not None:
                raise EvaluationError(
                    f"{variant.compensation} needs what only calibrated thresholds have, not {variant.target}",
                    field="compensations",
                    remedy="Choose none, sdc or sdc+vmc",
                )
            self.dense_length = NUM_ANCHORS if variant.weight_floor is not None else _keys(variant)
        else:
            self._read(variant, store, device=device)

    def _read(self, variant: Variant, store: ThresholdStore, *, device: torch.device | str) -> None:
        if variant.dense_layers is None:
            self.dense_layers = frozenset(store.manifest.dense_layers)
        if variant.method == "top_k":
            self.dense_length = _keys(variant)
            return
        lengths = np.arange(self.max_length + 1)
        if variant.method == "shadow":
            self.dense_layers = frozenset(variant.dense_layers or ())
            self.dense_length = NUM_ANCHORS
            self._candidates = ShadowCandidates(store.shadow, device=device)
            if variant.calibrated_term is not None:
                scale = store.shadow.exp_threshold_scale(lengths)
                self._exp_threshold_scale = torch.from_numpy(scale).to(device)
            return
        self._placement = store.manifest.placement
        curve = store.curve_of(variant.target)
        self.dense_length = curve.dense_length
        # each [max_length + 1, num_layers, num_heads]: row n is for rows that see n keys
        self._thresholds = torch.from_numpy(curve.threshold(lengths)).to(device)
        match variant.calibrated_term:
            case "offline_sum":
                self._offline_sum = torch.from_numpy(curve.expected("offline_sum", lengths)).to(device)
            case "exp_threshold_scale":
                self._exp_threshold_scale = torch.from_numpy(curve.expected("exp_threshold_scale", lengths)).to(device)

    def encode(self, call: AttentionCall) -> Encoded:
        """Returns what `attend` otherwise makes anew for each block of a call.

        Args:
            call: of all blocks.
        """
        return Encoded(
            codes=None if self._candidates is None else self._candidates.encode(call.layer_idx, call.key),
            copies=None if self._tiers is None else self._tiers.copy(call),
        )

    def attend(
        self, call: AttentionCall, *, num_prompt_tokens: int, encoded: Encoded = _NOTHING_ENCODED
    ) -> AttentionResult:
        """Returns the attention of some rows of a layer, which must not be a dense one.

        Args:
            call: of rows that see at most `max_length` keys.
            num_prompt_tokens: tokens of the sequence that are its prompt.
            encoded: from `encode`, of a call that this is a block of; what it lacks is made now.

        Raises:
            EvaluationError: a row is longer than `max_length`.
        """
        layer_idx, query, key, value = call.layer_idx, call.query, call.key, call.value
        softmax_scale, soft_cap = call.softmax_scale, call.soft_cap
        if len(key) > self.max_length:
            raise EvaluationError(f"a row of {len(key)} keys, made for {self.max_length}")

        if self._tiers is not None:
            return self._tiers.attend(call, encoded.copies)

        def of_rows(table: Tensor) -> Tensor:
            return table[call.num_before + 1 : len(key) + 1, layer_idx]

        compensation = Compensation(
            self.variant.denominator,
            self.variant.value_mean,
            offline_sum=None if self._offline_sum is None else of_rows(self._offline_sum),
            exp_threshold_scale=1.0 if self._exp_threshold_scale is None else of_rows(self._exp_threshold_scale),
        )
        if self.variant.method == "top_k":
            return top_k_attention(
                query,
                key,
                value,
                target_k=self.dense_length,
                softmax_scale=softmax_scale,
                compensation=compensation,
                logits_soft_cap=soft_cap,
                phase=self.phase,
                num_prompt_tokens=num_prompt_tokens,
                sinks=call.sinks,
            )
        found = None
        threshold = of_rows(self._thresholds) if self._thresholds is not None else self._relative_threshold(call)
        if self._candidates is not None:
            found = self._candidates.find(
                layer_idx,
                query,
                self._candidates.encode(layer_idx, key) if encoded.codes is None else encoded.codes[: len(key)],
                threshold,
                softmax_scale=softmax_scale,
                soft_cap=soft_cap,
            )
        return top_theta_attention(
            query,
            key,
            value,
            threshold=threshold,
            target_k=self.dense_length,
            softmax_scale=softmax_scale,
            placement=self._placement,
            compensation=compensation,
            cap_k=self.variant.cap_k,
            logits_soft_cap=soft_cap,
            phase=self.phase,
            num_prompt_tokens=num_prompt_tokens,
            candidates=None if found is None else found.candidates,
            shadow_scores=None if found is None else found.shadow_scores,
            sinks=call.sinks,
        )

    def _relative_threshold(self, call: AttentionCall) -> Tensor:
        """`reference.relative_threshold` of these rows, without the scores of keys that are no row's anchors."""
        key, num_before, seq_len = call.key, call.num_before, len(call.key)
        anchors = torch.cat([key[:NUM_FIRST_ANCHORS], key[max(NUM_FIRST_ANCHORS, num_before + 1 - NUM_LAST_ANCHORS) :]])
        num_keys = torch.arange(num_before + 1, seq_len + 1, device=key.device)
        scores = causal_scores(call.query, anchors, softmax_scale=call.softmax_scale, logits_soft_cap=call.soft_cap)
        floor = torch.tensor(self.variant.weight_floor, dtype=scores.dtype, device=scores.device)
        lse = anchor_lse(scores, num_keys - (seq_len - len(anchors)), sinks=call.sinks)
        return lse + (floor / num_keys).log()[:, None]


def _keys(variant: Variant) -> int:
    """The k of exact top-k."""
    return int(variant.target.removeprefix("k:"))
