"""Calibrates shadow keys for thresholds relative to the row: what keys are projected on, margins, and r.

observing passes    moments of keys and queries, hence the projection
measuring passes    how far shadows of survivors fall short of the thresholds, hence the margins
candidate passes    what is read and lost with those margins, hence r and the share of candidates
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_toptheta.calibration.candidates import (
    MARGIN_EDGES,
    AlwaysRead,
    CandidateRows,
    KeyMoments,
    key_moments,
    measure_candidates,
    shortfall_histogram,
)
from vllm_toptheta.calibration.fit import fit_scale
from vllm_toptheta.calibration.model import hidden_states, overriding_attention
from vllm_toptheta.calibration.options import CalibrationOptions
from vllm_toptheta.calibration.override import AttentionCall
from vllm_toptheta.calibration.relative import RelativeOverride
from vllm_toptheta.calibration.sampling import measured_lengths
from vllm_toptheta.errors import CalibrationError
from vllm_toptheta.limits import NUM_ANCHORS, NUM_FIRST_ANCHORS, NUM_LAST_ANCHORS
from vllm_toptheta.reference import KeyProjection, fit_projection
from vllm_toptheta.store import Architecture, ShadowSection
from vllm_toptheta.store.tensors import MAX_COEFFICIENT

__all__ = ["BLOCK_SIZE", "ShadowCalibration"]

BLOCK_SIZE = 16  # vLLM's smallest page: in a larger one, more of the newest tokens are candidates


class ShadowCalibration:
    """A calibration of shadow keys of one model on token sequences.

    Args:
        model: a transformers causal language model.
        sequences: tensors `[max_length]` int64.
        architecture: that of the model.
        options: what to calibrate; its `shadow` must be set.
    """

    def __init__(
        self, model: Any, sequences: Sequence[Tensor], *, architecture: Architecture, options: CalibrationOptions
    ) -> None:
        assert options.shadow is not None  # noqa: S101 - the caller asked
        num_layers, num_heads = architecture.num_layers, architecture.num_heads
        num_kv_heads, head_size = architecture.num_kv_heads, architecture.head_size
        self.model = model
        self.sequences = sequences
        self.options = options.shadow
        self.max_length = options.max_length
        self.num_channels = self.options.channels_of(head_size)
        self.always_read = AlwaysRead(NUM_FIRST_ANCHORS, NUM_LAST_ANCHORS, BLOCK_SIZE)
        self._num_keys = np.zeros(num_layers, np.int64)
        self._key_mean = np.zeros((num_layers, num_kv_heads, head_size))
        self._key_squares = np.zeros((num_layers, num_kv_heads, head_size, head_size))
        self._query_moment = np.zeros_like(self._key_squares)
        self._shortfalls = np.zeros((num_layers, num_heads, len(MARGIN_EDGES)), np.int64)
        # rows of only anchors keep everything
        _, self._lengths = measured_lengths(
            NUM_ANCHORS + 1, options.max_length, num_sequences=len(sequences), seed=options.seed
        )
        # by row: the mass that is not read, and what r = 1 makes of it
        self._masses = np.zeros((2, num_layers, num_heads, sum(map(len, self._lengths))), np.float32)
        self._candidates = np.zeros((num_layers, num_kv_heads))
        self._keys = np.zeros(num_layers)

    @property
    def arrays(self) -> Mapping[str, NDArray[Any]]:
        """All that passes leave behind, by name; writing into them restores an earlier state."""
        return {
            "shadow_num_keys": self._num_keys,
            "shadow_key_mean": self._key_mean,
            "shadow_key_squares": self._key_squares,
            "shadow_query_moment": self._query_moment,
            "shadow_shortfalls": self._shortfalls,
            "shadow_masses": self._masses,
            "shadow_candidates": self._candidates,
            "shadow_keys": self._keys,
        }

    @property
    def passes(self) -> list[Callable[[], None]]:
        """Every pass of the model over a sequence, in order; each needs those before it."""
        measured = range(len(self._lengths))
        return [
            *(partial(self._observe, index) for index in range(len(self.sequences))),
            *(partial(self._measure, index) for index in measured),
            *(partial(self._find_candidates, index) for index in measured),
        ]

    def _run(self, index: int, observe: Callable[[AttentionCall, Tensor], None]) -> None:
        with overriding_attention(self.model, RelativeOverride(self.options.weight_floor, observe)):
            hidden_states(self.model, self.sequences[index])

    def _observe(self, index: int) -> None:
        def observe(call: AttentionCall, thresholds: Tensor) -> None:
            # the first keys are unlike all others, and never looked up by their shadows
            query, key = (tensor[NUM_FIRST_ANCHORS:] for tensor in (call.query, call.key))
            self._add_moments(call.layer_idx, key_moments(query, key))

        self._run(index, observe)

    def _measure(self, index: int) -> None:
        def observe(call: AttentionCall, thresholds: Tensor) -> None:
            histogram = shortfall_histogram(self._rows(index, call, thresholds))
            self._shortfalls[call.layer_idx] += histogram.cpu().numpy()

        self._run(index, observe)

    def _find_candidates(self, index: int) -> None:
        start, lengths = sum(map(len, self._lengths[:index])), self._lengths[index]

        def observe(call: AttentionCall, thresholds: Tensor) -> None:
            layer_idx = call.layer_idx
            margin = torch.from_numpy(self.margins[layer_idx]).to(call.query.device)
            found = measure_candidates(self._rows(index, call, thresholds), margin)
            masses = torch.stack([found.unread_mass, found.estimate])
            self._masses[:, layer_idx, :, start : start + len(lengths)] = masses.cpu().numpy()
            self._candidates[layer_idx] += found.candidates.sum(dim=-1).cpu().numpy()
            self._keys[layer_idx] += lengths.sum()

        self._run(index, observe)

    def _rows(self, index: int, call: AttentionCall, thresholds: Tensor) -> CandidateRows:
        device = call.query.device
        lengths = torch.from_numpy(self._lengths[index])
        projection = self.projections[call.layer_idx]
        parts = (projection.encoder, projection.decoder, projection.key_mean)
        return CandidateRows(
            call,
            lengths,
            thresholds[lengths.to(device) - 1],
            projection=KeyProjection(*(part.to(device) for part in parts)),
            always_read=self.always_read,
        )

    @cached_property
    def projections(self) -> list[KeyProjection]:
        """What the keys of each layer are projected on; zeros where a layer was not observed."""
        projections = []
        for layer_idx, num_keys in enumerate(self._num_keys.tolist()):
            fitted = fit_projection(
                torch.from_numpy(self._key_mean[layer_idx]),
                torch.from_numpy(self._key_squares[layer_idx]) / max(num_keys, 1),
                torch.from_numpy(self._query_moment[layer_idx]),
                num_channels=self.num_channels,
            )
            # keys without any variance have steps without any size
            found = [
                tensor.clamp(-MAX_COEFFICIENT, MAX_COEFFICIENT) if num_keys else torch.zeros_like(tensor)
                for tensor in (fitted.encoder, fitted.decoder, fitted.key_mean)
            ]
            projections.append(KeyProjection(*found))
        return projections

    @cached_property
    def margins(self) -> NDArray[np.float32]:
        """`[num_layers, num_heads]`, scaled logits: the least ones with which candidates hold enough."""
        held = self._shortfalls.cumsum(axis=-1)
        wanted = np.ceil(held[..., -1:] * self.options.candidate_mass)
        return MARGIN_EDGES.numpy()[(held >= wanted).argmax(axis=-1)]

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Returns the tensors of the store for mode `shadow`. Needs all passes.

        Raises:
            CalibrationError: no layer can be calibrated.
        """
        if not self._num_keys.any():
            raise CalibrationError("no layer can be calibrated: all of them have a sliding window, or no attention")
        observed = (self._num_keys > 0)[:, None, None]
        unread_mass, estimate = self._masses
        projected = {
            f"shadow_{name}": np.stack([getattr(projection, name).numpy() for projection in self.projections])
            for name in ("encoder", "decoder", "key_mean")
        }
        found: dict[str, NDArray[Any]] = {
            "shadow_margin": self.margins,
            "shadow_scale_coefficients": fit_scale(unread_mass, estimate, np.concatenate(self._lengths)) * observed,
            "shadow_candidate_share": self._candidate_shares,
        }
        return {**projected, **{name: array.astype(np.float32) for name, array in found.items()}}

    def section(self) -> ShadowSection:
        """Returns what the manifest says of shadow keys. Needs all passes."""
        return ShadowSection(
            num_channels=self.num_channels,
            weight_floor=self.options.weight_floor,
            min_length=NUM_ANCHORS + 1,
            max_length=self.max_length,
            block_size=BLOCK_SIZE,
            candidate_mass=self.options.candidate_mass,
            candidate_share=round(float(self._candidate_shares[self._num_keys > 0].mean()), 4),
        )

    @property
    def _candidate_shares(self) -> NDArray[np.float64]:
        return np.asarray(self._candidates / np.maximum(self._keys, 1)[:, None])

    def _add_moments(self, layer_idx: int, moments: KeyMoments) -> None:
        """Merges by the update of Chan, Golub and LeVeque, as `accumulate.KthScoreStatistics` does."""
        mean, covariance, query_moment = (
            tensor.double().cpu().numpy() for tensor in (moments.key_mean, moments.key_covariance, moments.query_moment)
        )
        before, added = int(self._num_keys[layer_idx]), moments.num_keys
        share = added / (before + added)
        difference = mean - self._key_mean[layer_idx]
        spread = difference[..., :, None] * difference[..., None, :]
        self._key_squares[layer_idx] += covariance * added + spread * (before * share)
        self._key_mean[layer_idx] += difference * share
        self._query_moment[layer_idx] += (query_moment - self._query_moment[layer_idx]) * share
        self._num_keys[layer_idx] += added
