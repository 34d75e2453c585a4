"""The last tokens of a sequence as a server decodes them: behind a prefix that was read densely, into a KV cache.

All rows of a window go through the model in one causal pass. That equals one step per token: a row depends on the rows
before it through their keys and values alone, which are in every layer those that the sparse layers below have made,
and each row has the threshold of its own length.
"""

import copy
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache

from vllm_toptheta.calibration.layer_attention import LayerAttention, check_call, register_attention
from vllm_toptheta.calibration.model import attending
from vllm_toptheta.calibration.override import AttentionCall, block_bytes_on, windowed_attention
from vllm_toptheta.errors import EvaluationError
from vllm_toptheta.evaluation.sparse import SparseAttention
from vllm_toptheta.reference import AttentionResult

__all__ = ["PREFIX_ROWS", "Observer", "attend_rows", "fork_cache", "new_cache", "read_prefix", "read_window"]

_ATTENTION_NAME = "toptheta_window"
# rows of a prefix that go through the model at a time
PREFIX_ROWS = 1024
# of scores on a CPU: few enough to stay in its cache, enough for a product to pay on long rows
_BLOCK_BYTES = 8 << 20


Observer = Callable[[AttentionCall, AttentionResult | None], None]


@dataclass(frozen=True)
class _Pass:
    attention: SparseAttention | None
    observe: Observer


_active: ContextVar[_Pass] = ContextVar("active_pass")


def read_prefix(
    model: Any, token_ids: Tensor, cache: Any = None, *, on_rows: Callable[[int], object] = lambda rows: None
) -> Any:
    """Returns the KV cache of a prefix, read with dense attention.

    Args:
        model: a transformers causal language model.
        token_ids: `[num_tokens]` int64, at least 1.
        cache: of the tokens before, which stays as it is; None where these are the first.
        on_rows: told how many rows were read, after each part of the prefix.

    Raises:
        CalibrationError: the model is not supported.
        EvaluationError: see `new_cache`.
    """
    cache = new_cache(model) if cache is None else fork_cache(cache)
    with attending(model, _ATTENTION_NAME, _active, _Pass(None, lambda call, result: None)):
        for rows in token_ids.split(PREFIX_ROWS):
            _states(model, rows, cache)
            on_rows(len(rows))
    return cache


def read_window(
    model: Any,
    cache: Any,
    token_ids: Tensor,
    attention: SparseAttention | None = None,
    *,
    observe: Observer = lambda call, result: None,
) -> Tensor:
    """Returns the hidden states of the tokens behind a prefix.

    Args:
        model: the model that read the prefix.
        cache: from `read_prefix`; it stays as it is, for any number of windows.
        token_ids: `[num_tokens]` int64, the window.
        attention: computes the attention of the layers that have no sliding window and are none of its dense ones;
            None for dense attention.
        observe: told of every layer without a sliding window, block by block of its rows; without a result where the
            layer is dense, and then of all rows at once.

    Returns:
        `[num_tokens, hidden_size]` of the model's dtype, what its head would turn into logits.

    Raises:
        CalibrationError: the model is not supported.
        EvaluationError: a row is longer than the attention is made for.
    """
    with attending(model, _ATTENTION_NAME, _active, _Pass(attention, observe)):
        return _states(model, token_ids, fork_cache(cache))


def new_cache(model: Any) -> Any:
    """Returns an empty KV cache.

    Raises:
        EvaluationError: some layers of the model keep states instead, which no two windows can share.
    """
    cache = DynamicCache(config=model.config)
    if any(hasattr(layer, "update_conv_state") for layer in cache.layers):
        raise EvaluationError(
            "decoding is not evaluated where layers keep states that every token changes",
            field=f"model_type {model.config.model_type}",
            remedy="Measure its perplexity instead (toptheta eval perplexity)",
        )
    return cache


def fork_cache(cache: Any) -> Any:
    """Returns a cache that grows by itself: updates make new tensors, so the two share what they have in common."""
    fork = copy.copy(cache)
    fork.layers = [copy.copy(layer) for layer in cache.layers]
    return fork


def _states(model: Any, token_ids: Tensor, cache: Any) -> Tensor:
    with torch.inference_mode():
        output = model.base_model(input_ids=token_ids[None].to(model.device), past_key_values=cache, use_cache=True)
    states: Tensor = output.last_hidden_state[0]
    return states


def _attend(asked: LayerAttention) -> Tensor:
    if asked.mask is not None or asked.query.shape[0] != 1:
        raise EvaluationError("a window is of one sequence, without padding or mask")
    check_call(asked)
    this = _active.get()
    call = asked.of_one_sequence()
    call = replace(call, query=call.query.float(), key=call.key.float(), value=call.value.float())
    return attend_rows(call, this.attention, sliding_window=asked.sliding_window, observe=this.observe)[None]


def attend_rows(
    call: AttentionCall, attention: SparseAttention | None, *, sliding_window: int | None, observe: Observer
) -> Tensor:
    """Returns the attention of a layer for rows of a prefix or of a window.

    Args:
        call: of the rows.
        attention: see `read_window`.
        sliding_window: keys that a row of the layer sees at most; None for all.
        observe: see `read_window`.

    Returns:
        `[num_queries, num_heads, head_size]` float32.

    Raises:
        EvaluationError: a row is longer than the attention is made for.
    """
    if sliding_window is not None:
        return _dense(call, sliding_window)
    if attention is None or call.layer_idx in attention.dense_layers:
        observe(call, None)
        return _dense(call, len(call.key))
    outputs, encoded = [], attention.encode(call)
    device = call.query.device
    for block in call.blocks(_BLOCK_BYTES if device.type == "cpu" else block_bytes_on(device)):
        result = attention.attend(block, num_prompt_tokens=call.num_before, encoded=encoded)
        observe(block, result)
        outputs.append(result.output)
    return torch.cat(outputs)


def _dense(call: AttentionCall, sliding_window: int) -> Tensor:
    """As `windowed_attention`, by torch's own attention where that can be: it knows no cap or sink, and is faster."""
    if call.soft_cap is not None or call.sinks is not None:
        return windowed_attention(call, sliding_window)
    positions = torch.arange(len(call.key), device=call.key.device)
    behind = positions[-len(call.query) :, None] - positions
    mask = torch.zeros(behind.shape, device=behind.device).masked_fill(
        (behind < 0) | (behind >= sliding_window), -torch.inf
    )
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in (call.query, call.key, call.value))
    output = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=call.softmax_scale, enable_gqa=True)
    return output[0].transpose(0, 1)


register_attention(_ATTENTION_NAME, _attend)
