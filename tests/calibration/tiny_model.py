"""Tiny random models, a byte tokenizer and texts, so that no test needs a download."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from vllm_toptheta.store import Architecture

NUM_LAYERS = 4
NUM_HEADS = 4
NUM_KV_HEADS = 2


def tiny_config(**overrides: Any) -> LlamaConfig:
    options = {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "initializer_range": 0.3,  # wide enough for attention that is far from uniform
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return LlamaConfig(**{**options, **overrides})


def tiny_model(config: Any = None, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config or tiny_config(), dtype=torch.float32).eval()
    set_sinks(model)
    return model


def set_sinks(model: Any) -> None:
    """Have attention sinks differ by head, where a model has any: some outweigh most keys together."""
    for name, parameter in model.named_parameters():
        if name.endswith(".sinks"):
            parameter.data = torch.linspace(-2.0, 5.0, len(parameter), dtype=parameter.dtype)


def architecture(model: Any) -> Architecture:
    return Architecture.from_hf_config(model.config.to_dict())


def random_tokens(length: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, length))


def save_model_dir(folder: Path, model: Any = None) -> Path:
    (model or tiny_model()).save_pretrained(folder)
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def write_text(file: Path, num_words: int, seed: int = 0) -> Path:
    generator = np.random.default_rng(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(generator.choice(list(letters), generator.integers(1, 9))) for _ in range(num_words)]
    file.write_text(" ".join(words), encoding="utf-8")
    return file
