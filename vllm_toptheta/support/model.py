"""Which models are served, read off config.json: the fields by which one says that its attention is of another kind."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vllm_toptheta.support.hybrids import HYBRID_FIELDS, HYBRID_LAYERS, hybrid_type
from vllm_toptheta.support.images import image_modalities
from vllm_toptheta.support.refusal import Reason

MLA = "multi-head latent attention (MLA) has no per-head values to skip"
NO_GENERATION = "only generation is supported, not pooling"
_PER_LAYER = "layers whose heads differ in number or size are not supported"
CHUNKED = "layers that attend within chunks are not supported, because chunks are no sequences of their own"
NOT_THIS_HYBRID = "layers with a state of their own, which is no keys and values, are not supported in this model"
KV_SHARING = "KV sharing between layers is not supported in this model"
_OTHER_SCORES = "positions that change scores after q . k are not supported"

# field -> why a model is refused that sets it to anything but null, false, 0 or nothing
_REFUSED_FIELDS = {
    "kv_lora_rank": MLA,
    "is_encoder_decoder": "encoder-decoder models are not supported",
    "block_configs": _PER_LAYER,
    "num_key_value_heads_per_layer": _PER_LAYER,
    "num_attention_heads_per_layer": _PER_LAYER,
    "num_global_key_value_heads": _PER_LAYER,
    "per_layer_config": _PER_LAYER,
    "swa_num_attention_heads": _PER_LAYER,
    "swa_num_key_value_heads": _PER_LAYER,
    "swa_head_dim": _PER_LAYER,
    "use_bidirectional_attention": "decoded tokens see what comes before them only",
    "attention_chunk_size": CHUNKED,
    "dual_chunk_attention_config": "dual chunk attention scores a key by how far away it is",
    "index_topk": "an indexer of the model chooses the keys, so there is nothing to skip",
    "num_kv_shared_layers": KV_SHARING,
    "use_cla": KV_SHARING,
    "alibi": f"{_OTHER_SCORES} (ALiBi)",
    **dict.fromkeys(HYBRID_FIELDS, NOT_THIS_HYBRID),
}
# field -> why a model is refused in which it is another number than head_dim
_HEAD_SIZES = {
    "global_head_dim": _PER_LAYER,
    "v_head_dim": "values of another size than keys are not supported",
}
# whose layers with a window may have other heads than the rest, and the fields that say so
_MIXED_TYPES = {"gemma4_text"}
_MIXED_FIELDS = ("num_global_key_value_heads", "per_layer_config", "global_head_dim")
# which --hf-overrides do not reach, because the config of each layer is made of them before
_BEFORE_OVERRIDES = (*_MIXED_FIELDS, "attention_k_eq_v")
# whose last layers may read the keys and values of earlier ones
_SHARING_TYPES = {"gemma3n_text", "gemma4_text"}
# which layers vLLM has them share with in a Gemma 3n, counted from the first that shares
_SHARED_BY_KIND = {"sliding_attention": -2, "full_attention": -1}
# whose layers have attention sinks, and fields by which others say so
_SINK_TYPES = {"gpt_oss", "granite_swa", "granitemoe_swa"}
_SINK_FIELDS = ("attention_sinks", "swa_attention_sink_enabled", "add_swa_attention_sink_bias")
# what a class of transformers takes for a field that config.json leaves out
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama4_text": {"attention_chunk_size": 8192},
    "gemma3n_text": {"num_kv_shared_layers": 15},
    "gemma4_unified_text": {"global_head_dim": 512},
}
_LAYER_TYPES = {"full_attention", "sliding_attention"}
# as vLLM tells by the ends of names, whose chat models end like its embedding models
_POOLING = re.compile(
    r"(ForTextEncoding|EmbeddingModel|For(Sequence|Token|Audio|Image|Video)Classification|ClassificationModel"
    r"|ForRewardModeling|RewardModel|(?<!Chat)(?<!LMHead)(?<!ChatGLM)Model)$"
)
_ROPE_FIELDS = ("rope_theta", "rope_scaling", "partial_rotary_factor", "rotary_pct", "rotary_emb_base")


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of config.json that describes the decoder: all of it, or `text_config` in a multimodal one."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else config


def model_reasons(config: Mapping[str, Any]) -> list[Reason]:
    """Why a model is not served; nothing if it is.

    Args:
        config: config.json as a dict, or `PretrainedConfig.to_dict()`, overrides applied. Of any content.
    """
    text = _with_defaults(config)
    reasons = []
    if config.get("is_encoder_decoder"):
        text["is_encoder_decoder"] = True
    served: tuple[str, ...] = HYBRID_FIELDS if hybrid_type(text) else ()
    if sharing_field(config) is not None:
        served += ("num_kv_shared_layers",)
        reasons += _sharing_reasons(text)
    if mixed_field(config) is not None:
        served += _MIXED_FIELDS
        if text.get("use_bidirectional_attention") == "vision" and image_modalities(config):
            # of images alone, which are left out
            served += ("use_bidirectional_attention",)
    reasons += [Reason(field, why) for field, why in _REFUSED_FIELDS.items() if text.get(field) and field not in served]
    head_size = text.get("head_dim")
    reasons += [
        Reason(f"{field} {text[field]}", why)
        for field, why in _HEAD_SIZES.items()
        if text.get(field) and text[field] != head_size and field not in served
    ]
    architectures = config.get("architectures")
    if isinstance(architectures, list) and architectures and all(_pools(name) for name in architectures):
        reasons.append(Reason(f"architectures {architectures[0]}", NO_GENERATION))
    return reasons + _layer_type_reasons(text, _LAYER_TYPES | HYBRID_LAYERS if hybrid_type(text) else _LAYER_TYPES)


def sinks_field(config: Mapping[str, Any]) -> str | None:
    """What says that layers have attention sinks: the field, with its value if that says more; None of most models.

    Args:
        config: As for `model_reasons`.
    """
    text = text_config(config)
    model_type = text.get("model_type")
    if isinstance(model_type, str) and model_type in _SINK_TYPES:
        return f"model_type {model_type}"
    return next((field for field in _SINK_FIELDS if text.get(field)), None)


def sharing_field(config: Mapping[str, Any]) -> str | None:
    """What says that layers read the keys and values of others, where such a model is served; None of most models.

    Args:
        config: As for `model_reasons`.
    """
    text = _with_defaults(config)
    number = text.get("num_kv_shared_layers")
    return f"num_kv_shared_layers {number}" if number and text["model_type"] in _SHARING_TYPES else None


def mixed_field(config: Mapping[str, Any]) -> str | None:
    """What says that layers with a window have other heads than the rest, in a model that may be served; None of most.

    Args:
        config: As for `model_reasons`.
    """
    model_type = _with_defaults(config)["model_type"]
    return f"model_type {model_type}" if model_type in _MIXED_TYPES else None


def window_head_size(config: Mapping[str, Any]) -> int | None:
    """Numbers of a key in layers with a window, where these have other heads than the rest; None of most models.

    Args:
        config: As for `model_reasons`.
    """
    return None if mixed_field(config) is None else _with_defaults(config).get("head_dim")


def _with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """The decoder's part with its type, and with the fields that config.json leaves out."""
    text = text_config(config)
    model_type = text.get("model_type") or f"{config.get('model_type')}_text"
    model_type = model_type if isinstance(model_type, str) else None
    return {**_DEFAULTS.get(str(model_type), {}), **text, "model_type": model_type}


def _pools(architecture: Any) -> bool:
    return isinstance(architecture, str) and _POOLING.search(architecture) is not None


def _layer_type_reasons(text: Mapping[str, Any], known: set[str]) -> list[Reason]:
    layer_types, num_layers = text.get("layer_types"), text.get("num_hidden_layers")
    if not isinstance(layer_types, list | tuple):
        return []
    others = sorted({str(kind) for kind in layer_types} - known)
    if others:
        return [Reason(f"layer_types {others[0]}", CHUNKED if "chunked" in others[0] else NOT_THIS_HYBRID)]
    if isinstance(num_layers, int) and len(layer_types) < num_layers:
        counted = f"it names {len(layer_types)} layers, and num_hidden_layers is {num_layers}"
        return [Reason("layer_types", counted, "Make both the same")]
    return []


def _sharing_reasons(text: Mapping[str, Any]) -> list[Reason]:
    """Why layers cannot share: vLLM would have them share with layers of another kind, or there is none of theirs."""
    kinds, number, num_layers = (
        text.get(name) for name in ("layer_types", "num_kv_shared_layers", "num_hidden_layers")
    )
    if not (isinstance(kinds, list | tuple) and isinstance(number, int) and isinstance(num_layers, int)):
        return []  # the class's own, which are right
    first = num_layers - number
    before, sharing = kinds[: max(first, 0)], kinds[max(first, 0) :]
    for kind, offset in _SHARED_BY_KIND.items():
        if kind not in sharing:
            continue
        if text["model_type"] != "gemma3n_text":
            # the last one of the same kind
            why = None if kind in before else f"no layer of {kind} is left whose keys and values others could read"
        elif first + offset < 0 or kinds[first + offset] != kind:
            why = f"vLLM has a layer of {kind} share with layer {first + offset}, which is no such layer"
        else:
            why = None
        if why:
            return [Reason(f"num_kv_shared_layers {number}", why)]
    return []


def checkpoint_cache_dtype(config: Mapping[str, Any]) -> str | None:
    """What vLLM takes for the KV cache's dtype where no flag says otherwise, because the weights come with its scales.

    Args:
        config: config.json as a dict, or `PretrainedConfig.to_dict()`. Of any content.

    Returns:
        The dtype, as vLLM names it; None where the checkpoint says nothing.
    """
    quantization = config.get("quantization_config")
    if not isinstance(quantization, Mapping):
        return None
    method, inner = str(quantization.get("quant_method")), quantization.get("quantization")
    places = [inner, quantization] if isinstance(inner, Mapping) else [quantization]
    if method == "compressed-tensors":
        return None if quantization.get("kv_cache_scheme") is None else "fp8"
    if not method.startswith("modelopt"):
        return None
    names = ("kv_cache_scheme", "kv_cache_quant_algo")
    found = next((place[name] for name in names for place in places if place.get(name)), None)
    if isinstance(found, Mapping):
        found = {"8": "fp8", "4": "nvfp4"}.get(str(found.get("num_bits"))) if found.get("type") == "float" else None
    return {"fp8": "fp8_e4m3", "nvfp4": "nvfp4"}.get(str(found).lower())


def override_reasons(overrides: Mapping[str, Any]) -> list[Reason]:
    """Why --hf-overrides are refused: what they come to would depend on the model's class, or on vLLM's version.

    vLLM changes a config that has been read already, with everything filled in that follows from other fields.

    Args:
        overrides: The flag's JSON object.
    """
    reasons = []
    nested = overrides.get("text_config")
    for changed in (overrides, nested if isinstance(nested, Mapping) else {}):
        if rope := [field for field in _ROPE_FIELDS if field in changed]:
            remedy = "Give rope_parameters instead, with rope_type, rope_theta and all that belongs to them"
            reasons.append(Reason(f"--hf-overrides {rope[0]}", "vLLM goes by rope_parameters", remedy))
        if heads := [field for field in _BEFORE_OVERRIDES if field in changed]:
            text = "vLLM has read by then which heads each layer has"
            reasons.append(Reason(f"--hf-overrides {heads[0]}", text, "Change it in config.json"))
        parameters = changed.get("rope_parameters")
        if isinstance(parameters, Mapping) and not _has_theta(parameters):
            remedy = "Give rope_parameters with rope_type and rope_theta"
            reasons.append(Reason("--hf-overrides rope_parameters", "it replaces them all, and lacks some", remedy))
        depends = {"hidden_size": ("head_dim",), "num_attention_heads": ("head_dim", "num_key_value_heads")}
        for field, others in depends.items():
            if field in changed and (missing := [other for other in others if other not in changed]):
                text = f"whether it changes {' and '.join(missing)} depends on the model's class"
                reasons.append(Reason(f"--hf-overrides {field}", text, f"Give {' and '.join(missing)} too"))
    return reasons


def _has_theta(parameters: Mapping[str, Any]) -> bool:
    groups = [value for value in parameters.values() if isinstance(value, Mapping)] or [parameters]
    return all("rope_theta" in group and "rope_type" in group for group in groups)
