"""What transformers asks of an attention function, as one record, and how such a function is made known to it.

`AttentionInterface` is its public way to replace attention
(https://huggingface.co/docs/transformers/attention_interface); nothing is patched.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from transformers import AttentionInterface

from vllm_toptheta.calibration.override import AttentionCall
from vllm_toptheta.errors import CalibrationError

__all__ = ["LayerAttention", "check_call", "register_attention", "sinks_of"]


class LayerAttention(NamedTuple):
    """What transformers asks of an attention function."""

    layer: Any  # the module, which knows its number and its config
    query: Tensor  # [num_sequences, num_heads, num_queries, head_size]
    key: Tensor  # [num_sequences, num_kv_heads, seq_len, head_size], likewise the value
    value: Tensor
    mask: Tensor | None
    softmax_scale: float
    soft_cap: float | None
    sliding_window: int | None
    sinks: Tensor | None  # [num_heads] float32

    @property
    def layer_idx(self) -> int:
        return int(self.layer.layer_idx)

    def of_one_sequence(self) -> AttentionCall:
        """The same for our own functions, of the only sequence."""
        query, key, value = (tensor[0].transpose(0, 1) for tensor in (self.query, self.key, self.value))
        return AttentionCall(self.layer_idx, query, key, value, self.softmax_scale, self.soft_cap, self.sinks)


def check_call(asked: LayerAttention) -> None:
    """Refuses a layer that a server would compute otherwise, and one whose numbers are none.

    Raises:
        CalibrationError: vLLM gives the layer a window, or a number is NaN or infinite.
    """
    module = asked.layer
    config = getattr(module, "config", None)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    kind = kinds[module.layer_idx] if kinds else "sliding_attention"
    # some models of transformers pass over these fields, and vLLM reads them of every model
    if asked.sliding_window is None and window and kind == "sliding_attention":
        raise CalibrationError(
            f"layer {module.layer_idx} of {type(module).__name__} is computed without the window of {window} tokens "
            "that config.json gives it, and vLLM serves it with one",
            field="layer_types" if kinds else "sliding_window",
            remedy="Correct config.json if the model was trained with full attention",
        )
    if not (asked.query.isfinite().all() and asked.key.isfinite().all()):
        raise CalibrationError(
            f"queries or keys of layer {module.layer_idx} are NaN or infinite",
            remedy="Check the weights and config.json, and try --dtype float32",
        )


def sinks_of(module: Any, num_heads: int, options: Mapping[str, Any]) -> Tensor | None:
    """Returns the attention sinks that a layer passes on to its attention function, `[num_heads]` float32; or None.

    Args:
        module: the layer's attention.
        num_heads: its query heads.
        options: what it passes on besides.

    Raises:
        CalibrationError: they are not one logit per head.
    """
    sinks = options.get("s_aux")
    if sinks is None:
        return None
    if tuple(sinks.shape) != (num_heads,):
        raise CalibrationError(
            f"attention sinks of layer {module.layer_idx} have the shape {list(sinks.shape)}, and kernels add one to "
            f"each of {num_heads} heads"
        )
    return sinks.detach().float()


def register_attention(name: str, attend: Callable[[LayerAttention], Tensor]) -> None:
    """Makes an attention function known to transformers.

    Args:
        name: by which `attending` asks for it.
        attend: returns `[num_sequences, num_queries, num_heads, head_size]` of any dtype.
    """

    def as_transformers_calls_it(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        sinks = sinks_of(module, query.shape[1], options)
        asked = LayerAttention(module, query, key, value, attention_mask, scale, softcap, sliding_window, sinks)
        return attend(asked).to(query.dtype), None

    AttentionInterface.register(name, as_transformers_calls_it)
