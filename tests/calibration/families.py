"""One tiny random model of each family that calibration is tested with."""

from typing import Any

from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    GraniteSWAConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

SHAPE = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
SLIDING = ["sliding_attention", "full_attention"] * 2


def family_config(name: str) -> Any:
    """The config of a family; those with a window have it in layers 0 and 2."""
    match name:
        case "llama":
            return LlamaConfig(**SHAPE)
        case "mistral":
            return MistralConfig(**SHAPE, sliding_window=None)
        case "qwen2":
            return Qwen2Config(**SHAPE)
        case "qwen3":
            return Qwen3Config(**SHAPE)
        case "gemma2":
            return Gemma2Config(
                **SHAPE, sliding_window=20, query_pre_attn_scalar=16, attn_logit_softcapping=5.0, layer_types=SLIDING
            )
        case "gemma3":
            return Gemma3TextConfig(**SHAPE, sliding_window=20, query_pre_attn_scalar=16, layer_types=SLIDING)
        case "phi3":
            return Phi3Config(**SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
        case "olmo2":
            return Olmo2Config(**SHAPE)
        case "granite_swa":
            return GraniteSWAConfig(**SHAPE, sliding_window=20, attention_multiplier=0.25, layer_types=SLIDING)
        case "gpt_oss":
            experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
            return GptOssConfig(**SHAPE, **experts, sliding_window=20, layer_types=SLIDING)
    raise ValueError(name)


FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "olmo2", "granite_swa", "gpt_oss")
WINDOWED = {"gemma2", "gemma3", "granite_swa", "gpt_oss"}
