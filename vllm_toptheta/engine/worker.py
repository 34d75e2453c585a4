"""Runs on every rank: the engine's own model on tokens of ours, with the attention that is evaluated.

vLLM adds `MeasuringWorker` to its worker class (`--worker-extension-cls`), and `collective_rpc` calls its method on all
ranks at once. Neither the scheduler nor the paged cache takes part: a prefix lies in tensors of its own, in the dtype
of the model, and the model is called as a function of tokens and positions, which is the same in vLLM 0.26 to 0.33.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_layers_from_vllm_config
from vllm.distributed import get_tp_group
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform

from vllm_toptheta.calibration.override import AttentionCall
from vllm_toptheta.evaluation.measuring import SequenceJob, WindowResult, measure_sequence
from vllm_toptheta.evaluation.sparse import SparseAttention
from vllm_toptheta.evaluation.window import PREFIX_ROWS, Observer, attend_rows

__all__ = ["MeasuringWorker", "WorkerDecoder"]


class MeasuringWorker:
    """What a worker can do besides."""

    def toptheta_measure(self, job: SequenceJob, advance: Callable[[int], object] | None) -> list[WindowResult]:
        """See `measuring.measure_sequence`; this rank's heads, and losses of the whole model.

        Args:
            job: What to measure.
            advance: Told how many rows went through the model; None where it cannot be reached from here.
        """
        decoder = WorkerDecoder(self)
        with decoder.attending():
            return measure_sequence(decoder, job, {}, advance=advance or (lambda rows: None))


@dataclass(frozen=True)
class Cache:
    """Keys and values of a sequence, by the name of the layer.

    Attributes:
        length: Tokens.
        layers: Each two of `[length, num_kv_heads, head_size]`, of this rank's heads.
    """

    length: int = 0
    layers: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass
class _Pass:
    """One call of the model: what is attended to, and the cache that it makes."""

    cache: Cache
    attention: SparseAttention | None
    observe: Observer
    layers: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


class WorkerDecoder:
    """This rank's part of the engine's model, a `measuring.Decoder`.

    Args:
        worker: vLLM's worker.
    """

    def __init__(self, worker: Any) -> None:
        self._model = worker.get_model()
        self._config = worker.vllm_config
        self._positions = 3 if self._config.model_config.uses_mrope else 1
        self._pass: _Pass | None = None
        self.device = torch.device(worker.device)

    @contextmanager
    def attending(self) -> Iterator[None]:
        """Has all attention layers ask here, and then their backend again."""
        layers = get_layers_from_vllm_config(self._config, Attention)
        for layer in layers.values():
            layer.impl.forward = self._attend
        try:
            yield
        finally:
            for layer in layers.values():
                del layer.impl.forward

    @torch.inference_mode()
    def head(self, states: Tensor) -> Tensor:
        """Hidden states `[num_rows, hidden_size]` to logits `[num_rows, vocab_size]` float32, on all ranks."""
        logits: Tensor | None = self._model.compute_logits(states)
        group = get_tp_group()
        if group.world_size > 1 and not current_platform.use_all_gather():
            # only the first rank has them
            logits = group.broadcast_tensor_dict(None if logits is None else {"logits": logits}, src=0)["logits"]
        assert logits is not None  # noqa: S101 - see above
        return logits.float()

    def read_prefix(self, token_ids: Tensor, cache: Cache | None = None, *, on_rows: Callable[[int], object]) -> Cache:
        """See `window.read_prefix`."""
        cache = cache or Cache()
        for rows in token_ids.split(PREFIX_ROWS):
            _, cache = self._run(rows, _Pass(cache, None, lambda call, result: None))
            on_rows(len(rows))
        return cache

    def read_window(
        self, cache: Cache, token_ids: Tensor, attention: SparseAttention | None = None, *, observe: Observer
    ) -> Tensor:
        """See `window.read_window`."""
        states, _ = self._run(token_ids, _Pass(cache, attention, observe))
        return states

    @torch.inference_mode()
    def _run(self, token_ids: Tensor, this: _Pass) -> tuple[Tensor, Cache]:
        self._pass = this
        begin, end = this.cache.length, this.cache.length + len(token_ids)
        positions = torch.arange(begin, end, device=self.device)
        if self._positions > 1:  # of text, all of them are the same
            positions = positions.expand(self._positions, -1)
        with set_forward_context(None, self._config, num_tokens=len(token_ids)):
            states = self._model(input_ids=token_ids.to(self.device, torch.int32), positions=positions)
        self._pass = None
        return states, Cache(end, this.layers)

    def _attend(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *_: Any,
        **__: Any,
    ) -> Tensor:
        """`forward` of an implementation of attention; tensors are `[num_tokens, num_heads, head_size]`."""
        this = self._pass
        assert this is not None  # noqa: S101 - the layers ask here while the model runs
        before = this.cache.layers.get(layer.layer_name)
        if before is not None:
            key, value = (torch.cat(pair) for pair in zip(before, (key, value), strict=True))
        this.layers[layer.layer_name] = (key, value)
        call = AttentionCall(
            extract_layer_index(layer.layer_name),
            query.float(),
            key.float(),
            value.float(),
            layer.impl.scale,
            layer.impl.logits_soft_cap or None,
            getattr(layer.impl, "sinks", None),  # not every backend knows them
        )
        found = attend_rows(call, this.attention, sliding_window=layer.sliding_window, observe=this.observe)
        output.copy_(found.view_as(output))
        return output
