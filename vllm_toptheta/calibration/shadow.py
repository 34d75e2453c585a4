"""Calibrates shadow keys: what keys are projected on, margins, and r, while thresholds are calibrated.

    observing passes    moments of keys and queries, hence the projection
    measuring passes    how far shadows of survivors fall short of the final thresholds, hence the margins
    screening passes    what is read and lost with those margins, hence r and the share of candidates

The routes wrap those of the passes, so that only the last kind is a pass of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_toptheta.calibration.fit import fit_scale
from vllm_toptheta.calibration.options import ShadowOptions
from vllm_toptheta.calibration.route import AttentionRoute
from vllm_toptheta.calibration.screening import (
    MARGIN_EDGES,
    AlwaysRead,
    CandidateMeasures,
    KeyMoments,
    ScreenedRows,
    key_moments,
    measure_candidates,
    shortfall_histogram,
)
from vllm_toptheta.reference import KeyProjection, fit_projection
from vllm_toptheta.store import Architecture, ShadowSection
from vllm_toptheta.store.tensors import MAX_COEFFICIENT

__all__ = ["BLOCK_SIZE", "ShadowCalibration"]

BLOCK_SIZE = 16  # vLLM's smallest page: in a larger one, more of the newest tokens are candidates

# of a layer, and of its sampled rows
Screen = Callable[[int, ScreenedRows], None]


class ShadowCalibration:
    """What is calibrated for mode `shadow`, beside the thresholds.

    Args:
        architecture: that of the model.
        options: what to calibrate.
        num_targets: targets with thresholds of their own.
        lengths: of each measured sequence, `[num_rows]` ascending: the keys that its sampled rows see.
    """

    def __init__(
        self,
        architecture: Architecture,
        options: ShadowOptions,
        *,
        num_targets: int,
        lengths: Sequence[NDArray[np.int64]],
    ) -> None:
        num_layers, num_heads = architecture.num_layers, architecture.num_heads
        num_kv_heads, head_size = architecture.num_kv_heads, architecture.head_size
        self.options = options
        self.num_channels = options.channels_of(head_size)
        self.always_read = AlwaysRead(options.num_sink, options.num_recent, BLOCK_SIZE)
        self._num_keys = np.zeros(num_layers, np.int64)
        self._key_mean = np.zeros((num_layers, num_kv_heads, head_size))
        self._key_squares = np.zeros((num_layers, num_kv_heads, head_size, head_size))
        self._query_moment = np.zeros_like(self._key_squares)
        self._shortfalls = np.zeros((num_targets, num_layers, num_heads, len(MARGIN_EDGES)), np.int64)
        self._lengths = lengths
        num_rows = sum(map(len, lengths))
        # by row: the mass that is not read, and what r = 1 makes of it
        self._masses = np.zeros((2, num_targets, num_layers, num_heads, num_rows), np.float32)
        self._candidates = np.zeros((num_targets, num_layers, num_kv_heads))
        self._keys = np.zeros((num_targets, num_layers))

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

    def observing(self, route: AttentionRoute) -> AttentionRoute:
        """Returns a route that also takes the moments of keys and queries.

        Args:
            route: of an observing pass.
        """
        return _MomentsRoute(route, first=self.options.num_sink, report=self._add_moments)

    def measuring(
        self, route: AttentionRoute, index: int, target: int, thresholds: NDArray[np.float32], dense_length: int
    ) -> AttentionRoute:
        """Returns a route that also finds which margins the survivors' shadows need. Needs all observing passes.

        Args:
            route: of a measuring pass.
            index: which of the measured sequences.
            target: which of the targets.
            thresholds: `[num_rows, num_layers, num_heads]`, scaled logits, of the sequence's sampled rows.
            dense_length: rows that see at most this many keys stay dense.
        """

        def screen(layer_idx: int, rows: ScreenedRows) -> None:
            self._shortfalls[target, layer_idx] += shortfall_histogram(rows).cpu().numpy()

        return self._screened(route, screen, index, thresholds, dense_length)

    def screening(
        self, route: AttentionRoute, index: int, target: int, thresholds: NDArray[np.float32], dense_length: int
    ) -> AttentionRoute:
        """Returns a route that also finds what candidates keep and lose. Needs all measuring passes.

        Args:
            route, index, target, thresholds, dense_length: as for `measuring`.
        """
        start = sum(map(len, self._lengths[:index]))
        place = slice(start, start + len(self._lengths[index]))
        num_keys = int(self._lengths[index][self._lengths[index] > dense_length].sum())

        def screen(layer_idx: int, rows: ScreenedRows) -> None:
            margin = torch.from_numpy(self.margins[target, layer_idx]).to(rows.query.device)
            found: CandidateMeasures = measure_candidates(rows, margin)
            masses = torch.stack([found.unread_mass, found.estimate])
            self._masses[:, target, layer_idx, :, place] = masses.cpu().numpy()
            self._candidates[target, layer_idx] += found.candidates.sum(dim=-1).cpu().numpy()
            self._keys[target, layer_idx] += num_keys

        return self._screened(route, screen, index, thresholds, dense_length)

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
        """`[num_targets, num_layers, num_heads]`, scaled logits: the least ones with which candidates hold enough."""
        held = self._shortfalls.cumsum(axis=-1)
        wanted = np.ceil(held[..., -1:] * self.options.candidate_mass)
        return MARGIN_EDGES.numpy()[(held >= wanted).argmax(axis=-1)]

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Returns the tensors of the store for mode `shadow`. Needs all passes."""
        lengths, observed = np.concatenate(self._lengths), (self._num_keys > 0)[:, None, None]
        scale = np.stack([fit_scale(unread, x, lengths) * observed for unread, x in zip(*self._masses, strict=True)])
        by_target: dict[str, NDArray[Any]] = {
            "shadow_margin": self.margins,
            "shadow_candidate_share": self._candidate_shares,
        }
        by_layer = {
            f"shadow_{name}": np.stack([getattr(projection, name).numpy() for projection in self.projections])
            for name in ("encoder", "decoder", "key_mean")
        }
        return {
            **by_layer,
            **{name: np.moveaxis(array, 0, -1).astype(np.float32) for name, array in by_target.items()},
            "shadow_scale_coefficients": np.moveaxis(scale, 0, -2).astype(np.float32),
        }

    def section(self, sparse_layers: Sequence[int]) -> ShadowSection:
        """Returns what the manifest says of shadow keys. Needs all passes.

        Args:
            sparse_layers: those whose candidates are counted; all if there are none.
        """
        shares = self._candidate_shares[:, list(sparse_layers) or slice(None)]
        return ShadowSection(
            num_channels=self.num_channels,
            num_sink=self.options.num_sink,
            num_recent=self.options.num_recent,
            block_size=BLOCK_SIZE,
            candidate_mass=self.options.candidate_mass,
            candidate_share=tuple(shares.mean(axis=(1, 2)).round(4).tolist()),
        )

    @property
    def _candidate_shares(self) -> NDArray[np.float64]:
        return np.asarray(self._candidates / np.maximum(self._keys, 1)[..., None])

    def _screened(
        self, route: AttentionRoute, screen: Screen, index: int, thresholds: NDArray[np.float32], dense_length: int
    ) -> AttentionRoute:
        return _ScreeningRoute(
            route,
            torch.from_numpy(self._lengths[index]),
            torch.from_numpy(thresholds),
            dense_length=dense_length,
            projections=self.projections,
            always_read=self.always_read,
            screen=screen,
        )

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


class _MomentsRoute(AttentionRoute):
    """Reports moments of the keys and queries that another route attends with.

    The first keys are left out: they are unlike all others, and never looked up by their shadows.
    """

    def __init__(self, route: AttentionRoute, *, first: int, report: Callable[[int, KeyMoments], None]) -> None:
        self.route = route
        self.first = first
        self.report = report

    def attend(
        self,
        layer_idx: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        softmax_scale: float,
        soft_cap: float | None,
    ) -> Tensor:
        """See `AttentionRoute.attend`."""
        self.report(layer_idx, key_moments(query[self.first :], key[self.first :]))
        return self.route.attend(layer_idx, query, key, value, softmax_scale=softmax_scale, soft_cap=soft_cap)


class _ScreeningRoute(AttentionRoute):
    """Shows sampled rows of every layer to `screen`, and hands on what another route makes of them."""

    def __init__(
        self,
        route: AttentionRoute,
        lengths: Tensor,
        thresholds: Tensor,
        *,
        dense_length: int,
        projections: Sequence[KeyProjection],
        always_read: AlwaysRead,
        screen: Screen,
    ) -> None:
        self.route = route
        self.lengths = lengths
        self.thresholds = thresholds
        self.dense_length = dense_length
        self.projections = projections
        self.always_read = always_read
        self.screen = screen

    def attend(
        self,
        layer_idx: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        softmax_scale: float,
        soft_cap: float | None,
    ) -> Tensor:
        """See `AttentionRoute.attend`."""
        projection = self.projections[layer_idx]
        rows = ScreenedRows(
            query,
            key,
            self.lengths,
            self.thresholds[:, layer_idx].to(query.device),
            dense_length=self.dense_length,
            projection=KeyProjection(
                *(tensor.to(query.device) for tensor in (projection.encoder, projection.decoder, projection.key_mean))
            ),
            always_read=self.always_read,
            softmax_scale=softmax_scale,
            soft_cap=soft_cap,
        )
        self.screen(layer_idx, rows)
        return self.route.attend(layer_idx, query, key, value, softmax_scale=softmax_scale, soft_cap=soft_cap)
