"""How many kv heads of which size layers have that attend to all tokens, where those with a window have others.

transformers 5.19 writes `per_layer_config`, what is different in each layer; released files name `global_head_dim` and
`num_global_key_value_heads`, from which it is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_FULL = "full_attention"
_FIELDS = ("head_dim", "num_key_value_heads")
# by model_type, `global_head_dim` where config.json leaves it out
_GLOBAL_HEAD_DIM = {"gemma4_text": 512}


def heads_of_full_layers(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What stands for `head_dim` and `num_key_value_heads` in layers that attend to all tokens, if they differ there.

    Args:
        config: config.json as a dict, or `PretrainedConfig.to_dict()`. Of any content.

    Returns:
        Each kind of such layers once, as the fields that differ from the model's; [{}] for most models.
    """
    nested = config.get("text_config")
    text = nested if isinstance(nested, Mapping) else config
    per_layer = text.get("per_layer_config")
    if isinstance(per_layer, Mapping) and per_layer:
        kinds = text.get("layer_types")
        layers = [index for index, kind in enumerate(kinds) if kind == _FULL] if isinstance(kinds, list | tuple) else ()
        # as text, layers may have leading zeros
        by_layer = {str(name).lstrip("0") or "0": own for name, own in per_layer.items()}
        found: list[dict[str, Any]] = []
        for layer in layers:
            own = by_layer.get(str(layer))
            heads = {field: own[field] for field in _FIELDS if field in own} if isinstance(own, Mapping) else {}
            found += [] if heads in found else [heads]
        return found or [{}]
    model_type = text.get("model_type") or f"{config.get('model_type')}_text"
    if not isinstance(model_type, str) or model_type not in _GLOBAL_HEAD_DIM:
        return [{}]
    heads = {"head_dim": text.get("global_head_dim", _GLOBAL_HEAD_DIM[model_type])}
    num_kv_heads = text.get("num_global_key_value_heads")
    if num_kv_heads is not None and text.get("attention_k_eq_v"):
        heads["num_key_value_heads"] = num_kv_heads
    return [heads]
