"""Measures one sequence: windows of it, densely and with every variant, each behind a prefix that was read densely.

The prefix of a window begins with those of shorter ones, so that all of them together are read once.

What runs the model is a `Decoder`: transformers here (`TransformersDecoder`), or an engine's workers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from vllm_toptheta.calibration.override import AttentionCall
from vllm_toptheta.errors import EvaluationError
from vllm_toptheta.evaluation.losses import Head, Losses, compare_predictions, head_of
from vllm_toptheta.evaluation.sparse import SparseAttention
from vllm_toptheta.evaluation.variants import Variant, store_of
from vllm_toptheta.evaluation.window import Observer, read_prefix, read_window
from vllm_toptheta.evaluation.window_reads import EqualRows, WindowReads, WindowRecorder
from vllm_toptheta.reference import AttentionResult
from vllm_toptheta.store import ThresholdStore

__all__ = ["Decoder", "SequenceJob", "TransformersDecoder", "WindowResult", "check_variant", "measure_sequence"]


class Decoder(Protocol):
    """A model that reads the prefix of a sequence once, and what follows any number of times."""

    @property
    def device(self) -> torch.device:
        """Where queries, keys and values are."""

    @property
    def head(self) -> Head:
        """Makes logits of hidden states."""

    def read_prefix(self, token_ids: Tensor, cache: Any = None, *, on_rows: Callable[[int], object]) -> Any:
        """See `window.read_prefix`."""

    def read_window(
        self, cache: Any, token_ids: Tensor, attention: SparseAttention | None = None, *, observe: Observer
    ) -> Tensor:
        """See `window.read_window`."""


class TransformersDecoder:
    """A model that transformers runs.

    Args:
        model: a transformers causal language model.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    @property
    def device(self) -> torch.device:
        """See `Decoder`."""
        return torch.device(self._model.device)

    @cached_property
    def head(self) -> Head:
        """See `Decoder`.

        Raises:
            EvaluationError: see `losses.head_of`.
        """
        return head_of(self._model, torch.arange(8) % self._model.config.get_text_config().vocab_size)

    def read_prefix(self, token_ids: Tensor, cache: Any = None, *, on_rows: Callable[[int], object]) -> Any:
        """See `window.read_prefix`."""
        return read_prefix(self._model, token_ids, cache, on_rows=on_rows)

    def read_window(
        self, cache: Any, token_ids: Tensor, attention: SparseAttention | None = None, *, observe: Observer
    ) -> Tensor:
        """See `window.read_window`."""
        return read_window(self._model, cache, token_ids, attention, observe=observe)


@dataclass(frozen=True)
class SequenceJob:
    """What to measure of one sequence.

    Attributes:
        token_ids: `[max_length]` int64.
        window: tokens of a window.
        variants: what to compare with dense attention.
        equal_rows: by the length at which a window ends, ascending: by the target of a weight floor, the exact top-k
            that reads as many value rows there; None where it is to be found on this sequence.
    """

    token_ids: Tensor
    window: int
    variants: tuple[Variant, ...]
    equal_rows: Mapping[int, Mapping[str, Variant | None]]

    @property
    def num_rows(self) -> int:
        """Rows that go through the model."""
        num_windows = sum(1 + len(self.variants) + len(of_length) for of_length in self.equal_rows.values())
        return max(self.equal_rows) - self.window + self.window * num_windows


@dataclass(frozen=True)
class WindowResult:
    """What one window gave.

    Attributes:
        equal_rows: the exact top-k compared with a weight floor, by the floor's target.
        losses: of each variant that was asked for, and then of those of `equal_rows`.
        reads: of the same.
    """

    equal_rows: Mapping[str, Variant]
    losses: tuple[Losses, ...]
    reads: tuple[WindowReads, ...]


def check_variant(
    variant: Variant, stores: Mapping[str, ThresholdStore], *, length: int, window: int, device: torch.device
) -> SparseAttention:
    """Returns the attention of a variant, which has to decide on every row of the window.

    Args:
        variant: what is compared.
        stores: by the labels that variants name.
        length: tokens of the sequence.
        window: tokens at its end that are decoded.
        device: of the queries.

    Raises:
        EvaluationError: it keeps every key of some rows.
        StoreError: a store lacks what the variant needs.
    """
    attention = SparseAttention(variant, store_of(variant, stores), max_length=length, device=device)
    if attention.dense_length > length - window:
        raise EvaluationError(
            f"{variant.name} keeps every key of rows of up to {attention.dense_length}, and the window of a sequence "
            f"of {length} begins after {length - window}",
            field="lengths",
            remedy="Ask for longer sequences, a smaller window or a smaller target",
        )
    return attention


def measure_sequence(
    decoder: Decoder,
    job: SequenceJob,
    stores: Mapping[str, ThresholdStore],
    *,
    advance: Callable[[int], object] = lambda rows: None,
) -> list[WindowResult]:
    """Returns what every variant changes and reads, at each length.

    Args:
        decoder: runs the model.
        job: what to measure.
        stores: by the labels that variants name.
        advance: told how many rows went through the model, now and then.

    Raises:
        CalibrationError: the model is not supported.
        EvaluationError: likewise, or a variant keeps every key.
        StoreError: a store lacks what a variant needs.
    """
    results, cache, num_read = [], None, 0
    for length, equal_rows in job.equal_rows.items():
        begin = length - job.window
        cache = decoder.read_prefix(job.token_ids[num_read:begin], cache, on_rows=advance)
        num_read = begin
        results.append(_measure_window(decoder, cache, job, stores, length, equal_rows, advance))
    return results


def _measure_window(
    decoder: Decoder,
    cache: Any,
    job: SequenceJob,
    stores: Mapping[str, ThresholdStore],
    length: int,
    known: Mapping[str, Variant | None],
    advance: Callable[[int], object],
) -> WindowResult:
    """What the variants change and read in the window that ends at a length; `cache` is of all tokens before it."""
    window = job.token_ids[length - job.window : length]

    def ready(variant: Variant) -> SparseAttention:
        return check_variant(variant, stores, length=length, window=job.window, device=decoder.device)

    finders = {
        label: EqualRows(ready(Variant(target=label)), max_length=length)
        for label, found in known.items()
        if found is None
    }

    def observe(call: AttentionCall, result: AttentionResult | None) -> None:
        for finder in finders.values():
            finder(call, result)

    dense = decoder.read_window(cache, window, observe=observe)
    advance(len(window))
    equal_rows = {
        label: found or Variant(method="top_k", target=f"k:{finders[label].target_k}", dense_layers=())
        for label, found in known.items()
    }
    states, reads = [], []
    for variant in (*job.variants, *equal_rows.values()):
        recorder = WindowRecorder()
        states.append(decoder.read_window(cache, window, ready(variant), observe=recorder))
        reads.append(recorder.reads(range(length - job.window + 1, length + 1)))
        advance(len(window))
    losses = compare_predictions(decoder.head, window, dense, states)
    return WindowResult(equal_rows=equal_rows, losses=tuple(losses), reads=tuple(reads))
