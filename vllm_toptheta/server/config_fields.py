"""The fields of config.json that nearly every decoder has, checked as vLLM and transformers will check them.

They would say so half a minute later, in their own words; a field that only some models have is left to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from vllm_toptheta.errors import ModelConfigError
from vllm_toptheta.store import Architecture
from vllm_toptheta.store.schema import clip, describe
from vllm_toptheta.support import text_config

_REMEDY = "Take the file that came with the model's weights, or correct the field"

Size = Annotated[int, Field(ge=1, le=1 << 40)]
TokenId = Annotated[int, Field(ge=-(1 << 31), le=1 << 31)]
Number = int | float


def _no_integer(value: Any) -> Any:
    if isinstance(value, int):
        raise ValueError("expected a number with a decimal point")
    return value


Float = Annotated[float, BeforeValidator(_no_integer)]
# types whose classes divide hidden_size by the heads even where head_dim is given
_DIVIDED = {"arcee", "aria_text", "cwm", "gemma2", "gemma3_text", "gemma3n_text", "jais2", "llama", "vaultgemma"}
# fields that stand for another number than the usual one where they are left out, by what names of types start with
_STATED = {
    "head_dim": ("gemma", "qwen3", "ministral", "glm", "llama4"),
    "num_key_value_heads": ("gemma", "qwen", "ministral", "mistral", "mixtral", "glm", "llama4", "exaone4", "ernie4"),
}
# likewise, fields that may be left out, yet not null
_NO_NULL = {"hidden_activation": ("gemma2", "gemma3", "gemma4")}
# by rope_type, the numbers, or lists of them, that positions are made of beside rope_theta
_ROPE: dict[str, tuple[str, ...]] = {
    "default": (),
    "mrope": (),
    "proportional": (),
    "dynamic": (),
    "xdrope": ("alpha",),
    "linear": ("factor",),
    "ntk": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}
_LISTS = ("short_factor", "long_factor")


class _Rope(BaseModel):
    """Of the parameters of positions, those that transformers fills in only where they are left out."""

    model_config = ConfigDict(extra="allow", strict=True)

    rope_type: str = ""
    type: str = ""
    original_max_position_embeddings: Size = 1
    full_attention: dict[str, Any] = Field(default_factory=dict)
    sliding_attention: dict[str, Any] = Field(default_factory=dict)


class _Fields(BaseModel):
    """Fields that nearly every decoder has, of the types that transformers checks; a field may be left out."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    vocab_size: Size = 1
    hidden_size: Size = 1
    intermediate_size: Size | list[Size] = 1
    num_hidden_layers: Size = 1
    num_attention_heads: Size = 1
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    max_position_embeddings: Size = 1
    hidden_act: str = ""
    initializer_range: Annotated[Number, Field(ge=0.0, le=1.0)] = 0.0
    rms_norm_eps: Float = 0.0
    layer_norm_eps: Float = 0.0
    use_cache: bool = True
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    attention_dropout: Number = 0.0
    mlp_bias: bool = False
    pretraining_tp: Size | None = None
    query_pre_attn_scalar: Size = 1
    attn_logit_softcapping: Float | None = None
    final_logit_softcapping: Float | None = None
    hidden_activation: str | None = None
    pad_token_id: TokenId | None = None
    bos_token_id: TokenId | None = None
    eos_token_id: TokenId | list[TokenId] | None = None
    rope_theta: Annotated[Number, Field(gt=0)] | None = None
    rope_scaling: _Rope | None = None
    rope_parameters: _Rope | None = None
    partial_rotary_factor: Annotated[Number, Field(gt=0.0, le=1.0)] | None = None
    original_max_position_embeddings: Size = 1
    embd_pdrop: Number = 0.0
    resid_pdrop: Number = 0.0
    sliding_window: Size | None = None
    use_sliding_window: bool = False
    use_bidirectional_attention: bool | Literal["all", "vision"] | None = None
    is_encoder_decoder: bool = False
    max_window_layers: int = 0
    layer_types: list[str] | None = None
    quantization_config: dict[str, Any] | None = None
    id2label: dict[Annotated[str, Field(pattern=r"^\d+$")], Any] | None = None
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    torch_dtype: Literal["bfloat16", "float16", "float32"] | None = None


class _Root(_Fields):
    model_type: Annotated[str, Field(min_length=1)]
    architectures: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]


def check_fields(config: Mapping[str, Any], file: Path | None) -> None:
    """Check the types of fields, in `text_config` too.

    Args:
        config: Of any content.
        file: Where it stands; None of what --hf-overrides make of it.

    Raises:
        ModelConfigError: One is of another type, or no number that it can be.
    """
    nested = config.get("text_config")
    for part, prefix, kind in ((config, "", _Root), (nested, "text_config.", _Fields)):
        if part is None:
            continue
        try:
            kind.model_validate(part)
        except ValidationError as error:
            name, message = describe(error)
            field = f"{prefix}{name}" if file else f"--hf-overrides {prefix}{name}"
            raise ModelConfigError(message, file=file, field=field, remedy=_REMEDY) from None


def check_numbers(config: Mapping[str, Any], file: Path) -> None:
    """Check numbers that belong together.

    Raises:
        ModelConfigError: They do not.
    """
    text = text_config(config)
    model_type = str(text.get("model_type"))
    hidden_size, num_heads = text.get("hidden_size"), text.get("num_attention_heads")
    if model_type in _DIVIDED and hidden_size and num_heads and hidden_size % num_heads:
        message = f"{hidden_size} is not a multiple of num_attention_heads {num_heads}"
        raise ModelConfigError(message, file=file, field="hidden_size", remedy=_REMEDY)
    for field, starts in _STATED.items():
        if model_type.startswith(starts) and not text.get(field):
            message = f"left out, which a model of type {model_type} takes for a number of its own"
            raise ModelConfigError(message, file=file, field=field, remedy=_REMEDY)
    for field, starts in _NO_NULL.items():
        if model_type.startswith(starts) and text.get(field, "") is None:
            raise ModelConfigError("expected a name, got null", file=file, field=field, remedy=_REMEDY)
    layer_types, num_layers = text.get("layer_types"), text.get("num_hidden_layers")
    if layer_types is not None and num_layers is not None and len(layer_types) != num_layers:
        message = f"it names {len(layer_types)} layers, and num_hidden_layers is {num_layers}"
        raise ModelConfigError(message, file=file, field="layer_types", remedy=_REMEDY)


def check_rope(architecture: Architecture, file: Path | None, *, place: str = "rope_parameters") -> None:
    """Check what positions are made of.

    Args:
        architecture: Of the model.
        file: Where it was read; None where overrides say what positions are made of.
        place: What their parameters are called there.

    Raises:
        ModelConfigError: Something is missing, or no number above 0, or halves of heads cannot be turned.
    """
    for layer_type, rope in rope_of_layers(architecture).items():
        kind, share = rope["rope_type"], rope.get("partial_rotary_factor", 1.0)
        group = f"{place}.{layer_type}" if layer_type else place
        problem: tuple[str, str] | None = None
        if layer_type and not layer_type.endswith("_attention"):
            problem = group, "expected a number, got a mapping"
        elif kind not in _ROPE:
            problem = f"{group}.rope_type", f"{clip(kind)} is none of {', '.join(_ROPE)}"
        elif wrong := [field for field in _numbers_of(rope) if not _fits(rope.get(field), field)]:
            expected = "numbers" if wrong[0] in _LISTS else "a number"
            problem = f"{group}.{wrong[0]}", f"expected {expected} above 0, got {clip(rope.get(wrong[0]))}"
        elif not _is_above_0(share) or int(architecture.head_size * share) % 2:
            turned = f"of {architecture.head_size} numbers an odd number is turned by positions, which turn pairs"
            problem = "head_dim", turned
        if problem:
            raise ModelConfigError(problem[1], file=file, field=problem[0], remedy=_REMEDY)


def _numbers_of(rope: dict[str, Any]) -> list[str]:
    """The parameters that must be numbers, or lists of them; a factor counts wherever there is one."""
    return ["rope_theta", *_ROPE[rope["rope_type"]], *rope.keys() & {"factor"}]


def rope_of_layers(architecture: Architecture) -> dict[str, dict[str, Any]]:
    """The parameters of positions by layer type; under "" where all layers share them."""
    layers: dict[str, dict[str, Any]] = {}
    for name, value in architecture.rope.items():
        layer_type, _, parameter = name.rpartition(".")
        layers.setdefault(layer_type, {})[parameter] = value
    return layers


def _fits(value: Any, field: str) -> bool:
    if field in _LISTS:
        return isinstance(value, list | tuple) and len(value) > 0 and all(map(_is_above_0, value))
    return _is_above_0(value)


def _is_above_0(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
