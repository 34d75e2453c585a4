"""A model's directory without weights, and thresholds that fit it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.store_factory import make_store

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TOPTHETA_THRESHOLDS", "TOPTHETA_WEIGHT_FLOOR", "VLLM_PLUGINS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture
def thresholds(tmp_path: Path) -> Path:
    make_store(tmp_path / "stores" / "acme--tiny")
    return tmp_path / "stores"
