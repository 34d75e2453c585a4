"""One spelling for the rotary embedding of a model, whichever transformers wrote its config.json.

transformers 4 writes `rope_theta` beside `rope_scaling`; transformers 5 writes one `rope_parameters`, nested per layer
type where layers differ; Gemma 3 once wrote `rope_local_base_freq` for its sliding layers; GPT-NeoX has its own names.
All of them become one flat dict without nulls, in which `full_attention.rope_theta` is the base of the full layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

DEFAULT_ROPE_THETA = 10_000.0  # transformers' default where a config names no base

_LEGACY_TYPES = {"su": "longrope", "mrope": "default"}
_SCALED_FROM_TRAINING_LENGTH = {"llama3", "yarn", "longrope"}

_POSITIVE = {
    *("rope_theta", "rotary_emb_base", "rope_local_base_freq", "factor", "original_max_position_embeddings"),
    *("partial_rotary_factor", "rotary_pct", "low_freq_factor", "high_freq_factor"),
}
_NUMBERS = {*_POSITIVE, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"}
_LISTS = {"short_factor", "long_factor"}


def rope_problems(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with the rope parameters of a text config: the field, and a message.

    Args:
        config: A config.json, or its `text_config`, as a dict.
    """
    yield from _problems({name: value for name, value in config.items() if name in _NUMBERS}, "")
    for name in ("rope_parameters", "rope_scaling"):
        parameters = config.get(name)
        if isinstance(parameters, Mapping):
            yield from _problems(parameters, f"{name}.")
        elif parameters:
            yield name, f"expected an object, got {_shown(parameters)}"


def _problems(parameters: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for name, value in parameters.items():
        if value is None:
            continue
        if name in _NUMBERS and not _is_number(value):
            yield f"{prefix}{name}", f"expected a number, got {_shown(value)}"
        elif name in _POSITIVE and value <= 0:
            yield f"{prefix}{name}", f"expected a number above 0, got {_shown(value)}"
        elif name in _LISTS and not (isinstance(value, list | tuple) and all(map(_is_number, value))):
            yield f"{prefix}{name}", f"expected a list of numbers, got {_shown(value)}"
        elif name in ("rope_type", "type") and not isinstance(value, str):
            yield f"{prefix}{name}", f"expected a text, got {_shown(value)}"
        elif isinstance(value, Mapping):
            yield from _problems(value, f"{prefix}{name}.")


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def normalise_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rope parameters of a text config in the one spelling that fingerprints compare.

    Args:
        config: A config.json, or its `text_config`, as a dict.

    Returns:
        Parameter name to float, string, bool or list of floats; names start with `<layer type>.` where layers differ.
    """
    layers = _per_layer_type(config)
    return {
        (f"{layer_type}.{name}" if layer_type else name): _number(value)
        for layer_type, parameters in sorted(layers.items())
        for name, value in sorted(_complete(parameters, config).items())
    }


def _per_layer_type(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Map layer type to its raw parameters; the one key is "" where all layers share them."""
    parameters = config.get("rope_parameters")
    if not parameters:
        parameters = config.get("rope_scaling") or {}
        local_theta = config.get("rope_local_base_freq")
        if local_theta is not None:
            return {"full_attention": parameters, "sliding_attention": {"rope_theta": local_theta}}
    nested = {name: value for name, value in parameters.items() if isinstance(value, Mapping)}
    if not nested:
        return {"": parameters}
    shared = {name: value for name, value in parameters.items() if name not in nested}
    return {layer_type: {**shared, **own} for layer_type, own in nested.items()}


def _complete(parameters: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Add what the config says beside the rope parameters, as transformers 5 does, and drop what says nothing."""
    complete = {name: value for name, value in parameters.items() if value is not None}
    legacy_type = complete.pop("type", "default")
    rope_type = str(complete.get("rope_type", legacy_type))
    complete["rope_type"] = rope_type = _LEGACY_TYPES.get(rope_type, rope_type)
    complete.setdefault("rope_theta", _first(config, "rope_theta", "rotary_emb_base", default=DEFAULT_ROPE_THETA))
    complete.setdefault("partial_rotary_factor", _first(config, "partial_rotary_factor", "rotary_pct", default=1.0))
    if complete["partial_rotary_factor"] == 1.0:
        del complete["partial_rotary_factor"]
    if rope_type in _SCALED_FROM_TRAINING_LENGTH:
        inside = _first(complete, "original_max_position_embeddings", default=config.get("max_position_embeddings"))
        length = _first(config, "original_max_position_embeddings", default=inside)
        if length is not None:
            complete["original_max_position_embeddings"] = length
    return complete


def _first(config: Mapping[str, Any], *names: str, default: Any) -> Any:
    return next((config[name] for name in names if config.get(name) is not None), default)


def _number(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [float(item) if type(item) is int else item for item in value]
    return float(value) if type(value) is int else value
