"""One tiny random model of each family that calibration is tested with."""

from typing import Any

from transformers import (
    FalconH1Config,
    Gemma2Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GptOssConfig,
    GraniteMoeHybridConfig,
    GraniteSWAConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    NemotronHConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3NextConfig,
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
LINEAR = ["linear_attention", "full_attention"] * 2
MAMBA_2 = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_chunk_size": 16}

DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}


def family_config(name: str) -> Any:
    """The config of a family; those with a window have it in layers 0 and 2, those with states likewise or in all."""
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
        case "gemma3n":
            own = {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 16, "laurel_rank": 8}
            sizes = {"vocab_size_per_layer_input": 256, "activation_sparsity_pattern": [0.0] * 4}
            return Gemma3nTextConfig(**SHAPE, **own, **sizes, sliding_window=20, layer_types=SLIDING)
        case "gemma4":
            own = {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 256}
            larger = {"global_head_dim": 24, "num_global_key_value_heads": 1, "attention_k_eq_v": True}
            return Gemma4TextConfig(**SHAPE, **own, **larger, sliding_window=20, layer_types=SLIDING)
        case "phi3":
            return Phi3Config(**SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
        case "olmo2":
            return Olmo2Config(**SHAPE)
        case "granite_swa":
            return GraniteSWAConfig(**SHAPE, sliding_window=20, attention_multiplier=0.25, layer_types=SLIDING)
        case "gpt_oss":
            experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
            return GptOssConfig(**SHAPE, **experts, sliding_window=20, layer_types=SLIDING)
        case "granitemoehybrid":
            own = {"num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 96}
            return GraniteMoeHybridConfig(**SHAPE, **MAMBA_2, **own, attention_multiplier=0.25, layer_types=LINEAR)
        case "falcon_h1":
            return FalconH1Config(**SHAPE, **MAMBA_2, mamba_d_ssm=128)
        case "nemotron_h":
            shape = {field: value for field, value in SHAPE.items() if field != "num_hidden_layers"}
            own = {"mamba_num_heads": 4, "mamba_head_dim": 32, "n_groups": 1, "ssm_state_size": 16, "chunk_size": 16}
            return NemotronHConfig(**shape, **own, layers_block_type=["mamba", "attention"] * 2)
        case "lfm2":
            return Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"] * 2, block_auto_adjust_ff_dim=False)
        case "qwen3_next":
            experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
            return Qwen3NextConfig(**SHAPE, **DELTA, **experts, shared_expert_intermediate_size=32, layer_types=LINEAR)
        case "qwen3_5_text":
            return Qwen3_5TextConfig(**SHAPE, **DELTA, layer_types=LINEAR)
    raise ValueError(name)


HYBRIDS = ("granitemoehybrid", "falcon_h1", "nemotron_h", "lfm2", "qwen3_next", "qwen3_5_text")
FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gemma3n", "gemma4", "phi3", "olmo2", "granite_swa"),
    "gpt_oss",
    *HYBRIDS,
)
# that have keys and values of all tokens in layers 1 and 3 only
PARTLY_FULL = {"gemma2", "gemma3", "gemma3n", "gemma4", "granite_swa", "gpt_oss", *HYBRIDS} - {"falcon_h1"}
