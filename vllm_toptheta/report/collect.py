"""Counts what thresholds keep of a text, by layer and head: how many keys, where they sit, which rows a group reads."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_toptheta.calibration.model import hidden_states, overriding_attention
from vllm_toptheta.calibration.sampling import length_buckets
from vllm_toptheta.evaluation.sparse import SparseAttention
from vllm_toptheta.evaluation.sparse_override import SparseOverride
from vllm_toptheta.reference import AttentionResult
from vllm_toptheta.store import Architecture

__all__ = ["NUM_BUCKETS", "RECENT_TOKENS", "SINK_TOKENS", "SurvivorCounts", "collect"]

NUM_BUCKETS = 6
SINK_TOKENS = 4  # the first tokens of a sequence, which many heads attend to whatever they look for
RECENT_TOKENS = 256


class SurvivorCounts:
    """What the thresholded rows of the sparse layers keep, read and lose; dense layers stay at zero.

    Args:
        architecture: that of the model.
        dense_length: rows of at most this many tokens are not thresholded.
        max_length: tokens of the longest row, more than `dense_length`.

    Attributes:
        bucket_edges: `[num_buckets + 1]` int32, tokens; bucket b holds rows of edges[b] <= n < edges[b + 1].
        rows: `[num_layers]` int64, thresholded rows.
        rows_by_survivors: `[num_layers, num_heads, max_length + 1]` int32, rows by the number of keys they keep.
        survivors_by_position: `[num_layers, num_heads, 3]` int64, survivors among the first `SINK_TOKENS`, in the
            middle, and among the last `RECENT_TOKENS`; a key that is first and recent counts as first.
        keys_by_position: `[num_layers, 3]` int64, keys that a head could have kept there, summed over rows.
        lost_mass: `[num_layers, num_heads]` float64, summed over rows.
        value_rows_read: `[num_layers, num_kv_heads, num_buckets]` int64, summed over rows.
        value_rows_cached: `[num_layers, num_buckets]` int64, of one kv head, summed over rows.
    """

    def __init__(self, architecture: Architecture, *, dense_length: int, max_length: int) -> None:
        num_layers, num_heads = architecture.num_layers, architecture.num_heads
        self.bucket_edges = length_buckets(dense_length + 1, max_length, NUM_BUCKETS)
        num_buckets = len(self.bucket_edges) - 1
        self.rows = np.zeros(num_layers, np.int64)
        self.rows_by_survivors = np.zeros((num_layers, num_heads, max_length + 1), np.int32)
        self.survivors_by_position = np.zeros((num_layers, num_heads, 3), np.int64)
        self.keys_by_position = np.zeros((num_layers, 3), np.int64)
        self.lost_mass = np.zeros((num_layers, num_heads))
        self.value_rows_read = np.zeros((num_layers, architecture.num_kv_heads, num_buckets), np.int64)
        self.value_rows_cached = np.zeros((num_layers, num_buckets), np.int64)

    def add(self, layer_idx: int, result: AttentionResult, *, start: int) -> None:
        """See `RowCounts.add`."""
        if result.survivors is None:
            raise ValueError("result: has no survivors, so their positions cannot be counted")
        if not bool(result.thresholded.any()):
            return
        lengths = torch.arange(start + 1, start + 1 + len(result.thresholded), device=result.thresholded.device)
        lengths = lengths[result.thresholded]
        survivors = result.survivors[result.thresholded]
        num_survivors = result.num_survivors[result.thresholded]

        self.rows[layer_idx] += len(lengths)
        histograms = self.rows_by_survivors[layer_idx]
        for head, counts in enumerate(num_survivors.T):
            histograms[head] += np.bincount(counts.cpu().numpy(), minlength=histograms.shape[1]).astype(np.int32)
        self.lost_mass[layer_idx] += result.lost_mass[result.thresholded].double().sum(dim=0).cpu().numpy()

        positions = torch.arange(survivors.shape[-1], device=survivors.device)
        is_recent = (positions >= lengths[:, None] - RECENT_TOKENS) & (positions >= SINK_TOKENS)
        sink = survivors[..., :SINK_TOKENS].sum(dim=(0, 2))
        recent = (survivors & is_recent[:, None]).sum(dim=(0, 2))
        middle = num_survivors.sum(dim=0) - sink - recent
        self.survivors_by_position[layer_idx] += torch.stack([sink, middle, recent], dim=-1).cpu().numpy()
        num_sink = lengths.clamp(max=SINK_TOKENS)
        num_recent = (lengths - num_sink).clamp(max=RECENT_TOKENS)
        num_keys = torch.stack([num_sink, lengths - num_sink - num_recent, num_recent], dim=-1)
        self.keys_by_position[layer_idx] += num_keys.sum(dim=0).cpu().numpy()

        lengths_seen = lengths.cpu().numpy()
        bucket = np.searchsorted(self.bucket_edges, lengths_seen, side="right") - 1
        membership = bucket[:, None] == np.arange(len(self.bucket_edges) - 1)
        rows_read = result.value_rows_read[result.thresholded].cpu().numpy()
        self.value_rows_read[layer_idx] += rows_read.T @ membership
        self.value_rows_cached[layer_idx] += lengths_seen @ membership


def collect(
    model: Any,
    sequences: Sequence[Tensor],
    attention: SparseAttention,
    *,
    architecture: Architecture,
    on_sequence: Callable[[], object] = lambda: None,
) -> SurvivorCounts:
    """Runs the model over token sequences with thresholds applied, every row as a decode step of its length.

    Args:
        model: a transformers causal language model.
        sequences: tensors `[seq_len]` int64, of one length, more than the thresholds keep dense.
        attention: the thresholds, made for rows of that length.
        architecture: that of the model.
        on_sequence: called after each sequence.

    Raises:
        CalibrationError: the model is not supported.
    """
    counts = SurvivorCounts(architecture, dense_length=attention.dense_length, max_length=len(sequences[0]))
    with overriding_attention(model, SparseOverride(attention, counts=counts)):
        for sequence in sequences:
            hidden_states(model, sequence)
            on_sequence()
    return counts
