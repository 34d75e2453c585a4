"""Greedy decoding as a server does it: the prompt in one pass into a KV cache, then one token at a time.

Prompt rows follow the phase of the sparse attention (dense where it is `decode`); every step after them is one row,
thresholded by its own length. What a step computes is what `sparse_override.SparseOverride` computes for that row.
"""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_toptheta.calibration.layer_attention import LayerAttention, register_attention
from vllm_toptheta.calibration.model import attending, overriding_attention
from vllm_toptheta.calibration.override import AttentionCall, DenseOverride
from vllm_toptheta.errors import EvaluationError
from vllm_toptheta.evaluation.sparse import SparseAttention
from vllm_toptheta.evaluation.sparse_override import ReadCounts, SparseOverride
from vllm_toptheta.evaluation.window import fork_cache, new_cache
from vllm_toptheta.reference import dense_attention

__all__ = ["Lane", "Prompt", "decode_greedily", "read_prompt"]

_ATTENTION_NAME = "toptheta_decode"


@dataclass(frozen=True)
class Prompt:
    """A prompt that the model has read.

    Attributes:
        num_tokens: its length.
        cache: keys and values of all layers.
        logits: `[vocab_size]`, of the token after the prompt.
    """

    num_tokens: int
    cache: Any
    logits: Tensor


@dataclass(frozen=True)
class Lane:
    """One of several continuations of a prompt.

    Attributes:
        prompt: what the model has read; it can be continued any number of times.
        attention: applied to every step; None for dense attention.
    """

    prompt: Prompt
    attention: SparseAttention | None = None


_active_lanes: ContextVar[Sequence[Lane]] = ContextVar("active_lanes")


def read_prompt(model: Any, token_ids: Tensor, attention: SparseAttention | None = None) -> Prompt:
    """Runs the model over a prompt.

    Args:
        model: a transformers causal language model.
        token_ids: `[num_tokens]` int64, at least 1.
        attention: thresholds prompt rows if its phase says so; None for dense attention.

    Raises:
        CalibrationError: the model is not supported.
        EvaluationError: see `window.new_cache`.
    """
    override = DenseOverride()
    if attention is not None and attention.phase != "decode":
        counts = ReadCounts(len(token_ids), device=model.device)
        override = SparseOverride(attention, num_prompt_tokens=len(token_ids), counts=counts)
    cache = new_cache(model)
    with overriding_attention(model, override):
        logits = _next_logits(model, token_ids[None], cache)
    return Prompt(len(token_ids), cache, logits[0])


def decode_greedily(
    model: Any,
    lanes: Sequence[Lane],
    *,
    max_new_tokens: int,
    is_complete: Callable[[list[int]], bool] = lambda tokens: False,
) -> list[list[int]]:
    """Returns the most likely continuation of every lane, token by token.

    The lanes advance together, because a step's time is that of reading the weights, however many lanes there are.

    Args:
        model: the model that has read the prompts.
        lanes: at least one; their prompts have one length.
        max_new_tokens: tokens to generate at most, at least 1.
        is_complete: told the tokens of a lane so far; whether they are enough.

    Returns:
        The tokens of each lane, at most `max_new_tokens`.

    Raises:
        EvaluationError: the model is not supported, or the row is longer than an attention is made for.
    """
    cache = _joined_cache([lane.prompt.cache for lane in lanes])
    tokens = [[int(lane.prompt.logits.argmax())] for lane in lanes]
    with attending(model, _ATTENTION_NAME, _active_lanes, lanes):
        for _ in range(max_new_tokens - 1):
            open_lanes = [lane for lane, found in enumerate(tokens) if not is_complete(found)]
            if not open_lanes:
                break
            # lanes that are complete go along with their last token, and what follows is not kept
            logits = _next_logits(model, torch.tensor([[found[-1]] for found in tokens]), cache)
            for lane in open_lanes:
                tokens[lane].append(int(logits[lane].argmax()))
    return tokens


def _joined_cache(caches: Sequence[Any]) -> Any:
    """A cache whose batch is that of all others; they stay as they are, because updates make new tensors."""
    joined = fork_cache(caches[0])
    for index, layer in enumerate(joined.layers):
        layer.keys = torch.cat([cache.layers[index].keys for cache in caches])
        layer.values = torch.cat([cache.layers[index].values for cache in caches])
    return joined


def _next_logits(model: Any, token_ids: Tensor, cache: Any) -> Tensor:
    """Token ids `[num_lanes, num_tokens]` to the logits after each lane's last, `[num_lanes, vocab_size]`."""
    with torch.inference_mode():
        output = model(input_ids=token_ids.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    logits: Tensor = output.logits[:, -1]
    return logits


def _attend_step(asked: LayerAttention) -> Tensor:
    if asked.mask is not None or asked.query.shape[2] != 1:
        raise EvaluationError("decoding takes one token at a time, without mask")
    window = slice(None) if asked.sliding_window is None else slice(-asked.sliding_window, None)
    key, value = asked.key[:, :, window], asked.value[:, :, window]
    outputs = []
    for lane, *tensors in zip(_active_lanes.get(), asked.query, key, value, strict=True):
        step_query, step_key, step_value = (tensor.transpose(0, 1) for tensor in tensors)
        scale, cap, sinks = asked.softmax_scale, asked.soft_cap, asked.sinks
        step = AttentionCall(asked.layer_idx, step_query, step_key, step_value, scale, cap, sinks)
        attention = None if asked.sliding_window is not None else lane.attention
        if attention is None or step.layer_idx in attention.dense_layers:
            result = dense_attention(
                step_query, step_key, step_value, softmax_scale=scale, logits_soft_cap=cap, sinks=sinks
            )
        else:
            result = attention.attend(step, num_prompt_tokens=lane.prompt.num_tokens)
        outputs.append(result.output)
    return torch.stack(outputs)


register_attention(_ATTENTION_NAME, _attend_step)
