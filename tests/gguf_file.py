"""A GGUF file of a small random model, as llama.cpp's converter would write it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from gguf import GGUFWriter, TokenType
from tokenizers.pre_tokenizers import ByteLevel

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# every byte, one merge, one token that is no special one, and the rows that a vocabulary is padded with
TOKENS = [*sorted(ByteLevel.alphabet()), "hi", *CONTROL, "<tool_call>", "[PAD1]", "[PAD2]"]
VOCAB_SIZE = len(TOKENS)
_KINDS = {**dict.fromkeys(CONTROL, TokenType.CONTROL), "<tool_call>": TokenType.USER_DEFINED}
_KINDS |= dict.fromkeys(["[PAD1]", "[PAD2]"], TokenType.UNUSED)

_OUTSIDE = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_IN_LAYERS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tensors_of(model: Any) -> dict[str, torch.Tensor]:
    """A model's tensors by GGUF's names, llama's rotary rows in llama.cpp's order."""
    found = {}
    for name, tensor in model.state_dict().items():
        module, suffix = name.rsplit(".", 1)
        if module.startswith("model.layers."):
            layer, module = module.removeprefix("model.layers.").split(".", 1)
            if model.config.model_type == "llama" and module in ("self_attn.q_proj", "self_attn.k_proj"):
                halves = tensor.view(-1, 2, model.config.head_dim // 2, *tensor.shape[1:])
                tensor = halves.transpose(1, 2).reshape(tensor.shape)
            found[f"blk.{layer}.{_IN_LAYERS[module]}.{suffix}"] = tensor
        elif not (module == "lm_head" and model.config.tie_word_embeddings):
            found[f"{_OUTSIDE[module]}.{suffix}"] = tensor
    return found


def write_gguf(
    path: Path,
    model: Any,
    *,
    tensors: dict[str, torch.Tensor] | None = None,
    architecture: str | None = None,
    words: str | None = None,
) -> Path:
    """Write a model with the tokenizer TOKENS.

    Args:
        path: The file.
        model: A transformers model of type llama or qwen2 with VOCAB_SIZE tokens.
        tensors: In place of `tensors_of(model)`.
        architecture: In place of the model's type.
        words: tokenizer.ggml.pre, in place of the one that belongs to the model's type.
    """
    config = model.config
    writer = GGUFWriter(path, architecture or config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words or {"llama": "smollm", "qwen2": "qwen2"}[config.model_type])
    writer.add_token_list(TOKENS)
    writer.add_token_types([_KINDS.get(token, TokenType.NORMAL) for token in TOKENS])
    writer.add_token_merges(["h i"])
    writer.add_eos_token_id(TOKENS.index("<|im_end|>"))
    writer.add_pad_token_id(TOKENS.index("<|endoftext|>"))
    writer.add_chat_template("{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}")
    for name, tensor in (tensors or tensors_of(model)).items():
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
