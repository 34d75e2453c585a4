"""A GGUF file as a Hugging Face directory.

A serving engine wants safetensors, a config and a tokenizer; Python packages that carry models carry GGUF files. Every
tensor is dequantised to bfloat16. Which tensor is which comes from the names of the `gguf` library and from the model
that transformers builds, so that a file which lacks a tensor, or has one too many, is refused.

    GGUF                        Hugging Face                           note
    blk.N.attn_q, blk.N.attn_k  model.layers.N.self_attn.{q,k}_proj    llama: llama.cpp's order of rotary rows is undone
    output.weight               lm_head.weight                         absent where tied with the embeddings
    everything else             likewise                               renamed only

May import `errors`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from gguf import MODEL_ARCH, GGUFReader, TokenType, get_tensor_name_map
from gguf.quants import dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from vllm_toptheta.errors import ConversionError


class _Architecture(NamedTuple):
    """What GGUF's name of an architecture, which is transformers' model type too, does not say."""

    model_class: str
    # llama.cpp pairs rotary rows (0, 1), (2, 3), ...; transformers pairs row i with row i + head_size / 2
    pairs_neighbours: bool


class _Words(NamedTuple):
    """How a text is cut before byte pairs are merged."""

    normalizer: Any
    pre_tokenizer: Any


_ARCHITECTURES = {
    "llama": _Architecture("LlamaForCausalLM", pairs_neighbours=True),
    "qwen2": _Architecture("Qwen2ForCausalLM", pairs_neighbours=False),
}
# by tokenizer.ggml.pre, as in the models' own tokenizer.json; both have every digit as a word
_WORDS = {
    "smollm": _Words(
        None,
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
    ),
    "qwen2": _Words(
        normalizers.NFC(),
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(
                    Regex(
                        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
                        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
                    ),
                    behavior="isolated",
                ),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
    ),
}
_SPECIAL_TOKENS = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


def convert(weights: Path, folder: Path) -> None:
    """Write a model directory that transformers and vLLM load.

    Args:
        weights: A GGUF file of architecture llama or qwen2 with a byte-level tokenizer, in any quantisation.
        folder: An empty directory; gets config.json, generation_config.json, the tokenizer and model.safetensors.

    Raises:
        ConversionError: It is no GGUF file, not of a known architecture or tokenizer, or its tensors are not those that
            its architecture has.
    """
    try:
        file = _File(weights, GGUFReader(weights))
    except (OSError, ValueError) as error:
        raise ConversionError(f"it cannot be read as a GGUF file: {error}", file=weights) from error
    name = file.chosen("general.architecture", _ARCHITECTURES)
    config = _config(file, name)
    tokenizer = _tokenizer(file, config)
    tensors = _tensors(file, config, get_tensor_name_map(MODEL_ARCH[name.upper()], config.num_hidden_layers))
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


class _File(NamedTuple):
    """A GGUF file's fields by name."""

    path: Path
    reader: GGUFReader

    def find(self, key: str) -> Any:
        """A field's value; None if it is absent."""
        field = self.reader.get_field(key)
        return None if field is None else field.contents()

    def get(self, key: str) -> Any:
        """A field's value.

        Raises:
            ConversionError: It is absent.
        """
        if (value := self.find(key)) is None:
            raise ConversionError("the field is missing", file=self.path, field=key)
        return value

    def chosen(self, key: str, known: dict[str, Any]) -> str:
        """A field's value, one of those `known`.

        Raises:
            ConversionError: It is absent, or another one.
        """
        if (value := self.get(key)) not in known:
            raise ConversionError(
                f"{value!r} is not supported", file=self.path, field=key, remedy=f"Known are {', '.join(known)}"
            )
        return str(value)


def _config(file: _File, name: str) -> Any:
    optional = {"head_dim": file.find(f"{name}.rope.dimension_count")}
    optional |= {f"{key}_token_id": file.find(f"tokenizer.ggml.{long}_token_id")
                 for key, long in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}  # fmt: skip
    return AutoConfig.for_model(
        name,
        vocab_size=len(file.get("tokenizer.ggml.tokens")),
        hidden_size=file.get(f"{name}.embedding_length"),
        intermediate_size=file.get(f"{name}.feed_forward_length"),
        num_hidden_layers=file.get(f"{name}.block_count"),
        num_attention_heads=file.get(f"{name}.attention.head_count"),
        num_key_value_heads=file.get(f"{name}.attention.head_count_kv"),
        max_position_embeddings=file.get(f"{name}.context_length"),
        rms_norm_eps=round(file.get(f"{name}.attention.layer_norm_rms_epsilon"), 8),
        rope_parameters={"rope_type": "default", "rope_theta": file.get(f"{name}.rope.freq_base")},
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in file.reader.tensors),
        architectures=[_ARCHITECTURES[name].model_class],
        dtype="bfloat16",
        **{key: value for key, value in optional.items() if value is not None},
    )


def _tensors(file: _File, config: Any, names: Any) -> dict[str, torch.Tensor]:
    """The model's tensors in bfloat16, each by the name that transformers gives it."""
    with torch.device("meta"):
        expected = AutoModelForCausalLM.from_config(config).state_dict()
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    found = {tensor.name: tensor for tensor in file.reader.tensors}
    sources = {name: names.get_name(name, (".weight", ".bias")) for name in expected}
    for problem, wrong in (
        ("the file lacks tensors of its architecture", set(sources.values()) - found.keys()),
        ("the file has tensors that its architecture has not", found.keys() - set(sources.values())),
    ):
        if wrong:
            raise ConversionError(f"{problem}: {', '.join(sorted(map(str, wrong)))}", file=file.path)
    # GGUF gives the fastest axis first
    shapes = {name: torch.Size(found[source].shape[::-1].tolist()) for name, source in sources.items()}
    if other := [f"{sources[name]} {list(shapes[name])}" for name in expected if shapes[name] != expected[name].shape]:
        raise ConversionError(f"tensors have other shapes than the fields say: {', '.join(other)}", file=file.path)
    return {name: _dequantised(found[source], config) for name, source in sources.items()}


def _dequantised(tensor: Any, config: Any) -> torch.Tensor:
    weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(tensor.name.split(".")[-2])
    if heads is not None and _ARCHITECTURES[config.model_type].pairs_neighbours:
        weight = weight.view(heads, len(weight) // heads // 2, 2, -1).transpose(1, 2).reshape(weight.shape)
    return weight.to(torch.bfloat16).contiguous()


def _tokenizer(file: _File, config: Any) -> PreTrainedTokenizerFast:
    """The byte-level BPE with its special tokens and chat template."""
    words = _WORDS[file.chosen("tokenizer.ggml.pre", _WORDS)]
    tokens: list[str] = file.get("tokenizer.ggml.tokens")
    kinds: list[int] = file.get("tokenizer.ggml.token_type")
    # the rows that a vocabulary is padded with are no tokens
    vocab = {
        token: id_ for id_, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != TokenType.UNUSED
    }
    merges = [tuple(merge.split(" ")) for merge in file.get("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    if words.normalizer is not None:
        tokenizer.normalizer = words.normalizer
    tokenizer.pre_tokenizer = words.pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    for kind in (TokenType.CONTROL, TokenType.USER_DEFINED):
        tokenizer.add_tokens(
            [
                AddedToken(token, special=kind == TokenType.CONTROL, normalized=False)
                for token, id_ in vocab.items()
                if kinds[id_] == kind
            ]
        )
    ids = {name: file.find(f"tokenizer.ggml.{key}_token_id") for key, name in _SPECIAL_TOKENS.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=config.max_position_embeddings,
        chat_template=file.find("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **{name: tokens[id_] for name, id_ in ids.items() if id_ is not None},
    )
