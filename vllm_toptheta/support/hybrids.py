"""Hybrids: models some of whose layers keep a state of their own in place of keys and values.

Thresholds are for the other layers. vLLM gives layers of both kinds pages of one size, so that pages of keys and values
are as long as states, mostly hundreds of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

State = Literal["mamba2", "delta", "conv"]

# those that may be served, by model_type: what their states are, on which it depends where
STATES: dict[str, State] = {
    "falcon_h1": "mamba2",
    "granitemoehybrid": "mamba2",
    "lfm2": "conv",
    "nemotron_h": "mamba2",
    "qwen3_5_moe_text": "delta",
    "qwen3_5_text": "delta",
    "qwen3_next": "delta",
}
# those whose file in vLLM imports what reads images
NEED_TORCHVISION = {"qwen3_5_moe_text", "qwen3_5_text"}
# fields of config.json that say that a model is one
HYBRID_FIELDS = (
    "layers_block_type",
    "hybrid_override_pattern",
    "linear_attn_config",
    "ssm_cfg",
    "mamba_d_state",
    "ssm_state_size",
    "full_attention_interval",
    "linear_num_value_heads",
    "conv_L_cache",
)
# names in layer_types beside those of other models, in files of transformers 4 and 5
HYBRID_LAYERS = {"attention", "conv", "linear_attention", "mamba"}


def hybrid_type(text: Mapping[str, Any]) -> str | None:
    """The model_type of a hybrid that is served, one of `STATES`; None of all other models.

    Args:
        text: The part of config.json that describes the decoder. Of any content.
    """
    model_type = text.get("model_type")
    return model_type if isinstance(model_type, str) and model_type in STATES else None
