"""Models whose prompts may hold images that attend to themselves in both directions: their text alone is served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_toptheta.support.installed import serves_text_alone
from vllm_toptheta.support.refusal import Reason

# by model_type, as vLLM knows them (`ModelArchConfigConvertorBase.is_mm_prefix_lm`), and what their prompts may hold
_MODALITIES = {
    "bagel": ("image",),
    "gemma3": ("image",),
    "molmo2": ("image", "video"),
    "moondream3": ("image",),
    "paligemma": ("image",),
}


def image_modalities(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What a model's prompts may hold beside text that attends to itself in both directions; nothing of most models.

    Args:
        config: config.json as a dict, or `PretrainedConfig.to_dict()`. Of any content.
    """
    model_type = config.get("model_type")
    known = _MODALITIES.get(model_type, ()) if isinstance(model_type, str) else ()
    text = config.get("text_config")
    if model_type == "gemma4" and isinstance(text, Mapping) and text.get("use_bidirectional_attention") == "vision":
        known = ("image", "video", "audio") if config.get("audio_config") else ("image", "video")
    states = config.get("is_mm_prefix_lm")
    if states is None:
        return known
    return (known or ("image",)) if states else ()


def image_reason(modalities: Sequence[str]) -> Reason:
    """Why a model is not served whose prompts may hold these.

    Args:
        modalities: At least one, as vLLM names them.
    """
    limits = ", ".join(f'"{modality}": 0' for modality in modalities)
    remedy = f"Give --limit-mm-per-prompt '{{{limits}}}' to serve its text alone"
    if not serves_text_alone():
        remedy = f"Install vLLM 0.32 or 0.33, which can leave them out, then g{remedy[1:]}"
    text = f"tokens of one {modalities[0]} see each other, and kernels show a token what comes before it only"
    return Reason("--limit-mm-per-prompt", text, remedy)
