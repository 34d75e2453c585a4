"""Models as GGUF files: what comes out is the model that went in, and what is not all there is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config

from tests.gguf_file import CONTROL, TOKENS, VOCAB_SIZE, tensors_of, write_gguf
from vllm_toptheta.errors import ConversionError
from vllm_toptheta.gguf_model import convert

SHAPES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "max_position_embeddings": 128, "vocab_size": VOCAB_SIZE}  # fmt: skip
FAMILIES = {
    "llama, tied": LlamaConfig(**SHAPES, tie_word_embeddings=True),
    "llama": LlamaConfig(**SHAPES, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**SHAPES, tie_word_embeddings=False),
    "qwen2, tied": Qwen2Config(**SHAPES, tie_word_embeddings=True),
}


def random_model(config: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # biases too, which are zero in a new model; exact in bfloat16
            parameter.copy_(torch.randn_like(parameter).bfloat16())
    return model.eval()


@pytest.fixture(scope="module")
def qwen() -> Any:
    return random_model(FAMILIES["qwen2"])


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Any:
    return FAMILIES[request.param]


def test_the_model_comes_back(family: Any, tmp_path: Path) -> None:
    model = random_model(family)
    (folder := tmp_path / "model").mkdir()
    convert(write_gguf(tmp_path / "model.gguf", model), folder)
    loaded, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values())
    assert loaded.config.tie_word_embeddings == family.tie_word_embeddings
    assert loaded.dtype == torch.bfloat16
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name].float(), tensor, rtol=0, atol=0, msg=name)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(loaded.float()(ids).logits, model(ids).logits, rtol=0, atol=0)


def test_the_tokenizer_comes_back(qwen: Any, tmp_path: Path) -> None:
    (folder := tmp_path / "model").mkdir()
    convert(write_gguf(tmp_path / "model.gguf", qwen), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "<|im_start|>hi 12<tool_call>"
    ids = tokenizer(text)["input_ids"]
    assert [TOKENS[id_] for id_ in ids] == ["<|im_start|>", "hi", "Ġ", "1", "2", "<tool_call>"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hi 12<tool_call>"
    assert len(tokenizer) == len(TOKENS) - 2  # the padding is no text
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (CONTROL[2], CONTROL[0], None)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == (
        "<|im_start|>hi<|im_end|>"
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"blk.1.attn_q.bias": None}, "lacks.*: blk.1.attn_q.bias"),
        ({"output.weight": None}, ""),  # is what a tied model looks like
        ({"rope_freqs.weight": torch.ones(4)}, "architecture has not: rope_freqs.weight"),
        ({"blk.2.attn_q.bias": torch.ones(32)}, "architecture has not: blk.2.attn_q.bias"),
        ({"blk.0.attn_k.weight": torch.ones(32, 32)}, r"other shapes.*: blk.0.attn_k.weight \[32, 32\]"),
    ],
)
def test_tensors_are_those_of_the_architecture(
    change: dict[str, torch.Tensor | None], said: str, qwen: Any, tmp_path: Path
) -> None:
    tensors = {name: tensor for name, tensor in (tensors_of(qwen) | change).items() if tensor is not None}
    weights = write_gguf(tmp_path / "model.gguf", qwen, tensors=tensors)
    (folder := tmp_path / "model").mkdir()
    if not said:
        convert(weights, folder)
        return
    with pytest.raises(ConversionError, match=said) as caught:
        convert(weights, folder)
    assert caught.value.file == weights
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("unknown", "field", "known"),
    [
        ({"architecture": "mamba"}, "general.architecture", "llama, qwen2"),
        ({"words": "tekken"}, "tokenizer.ggml.pre", "smollm, qwen2"),
    ],
)
def test_what_is_not_supported_is_named(
    unknown: dict[str, str], field: str, known: str, qwen: Any, tmp_path: Path
) -> None:
    weights = write_gguf(tmp_path / "model.gguf", qwen, **unknown)
    with pytest.raises(ConversionError, match=f"{field}: '.*' is not supported. Known are {known}"):
        convert(weights, tmp_path)


def test_another_file_is_refused(tmp_path: Path) -> None:
    (weights := tmp_path / "model.gguf").write_bytes(b"<html>not found</html>" * 100)
    with pytest.raises(ConversionError, match="model.gguf: it cannot be read as a GGUF file"):
        convert(weights, tmp_path)
