"""A tiny model's directory and thresholds, and vLLM configurations made from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from tests import store_factory
from tests.shadow_store import make_shadow_store

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 576,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOPTHETA_THRESHOLDS", raising=False)
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "1")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A model directory without weights."""
    folder = tmp_path / "models" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


STORED: dict[str, Any] = {
    "coefficients": [0.4, 0.1, 0.0],
    "num_layers": 4,
    "num_heads": 9,
    "num_kv_heads": 3,
    "head_size": 64,
    "target_ks": (8, 128),
    "max_length": 4096,
}


@pytest.fixture
def thresholds_folder(tmp_path: Path) -> Path:
    """Thresholds for that model, theta = 0.4 + 0.1 ln n in every head; layer 0 is dense."""
    folder = tmp_path / "thresholds" / "acme--tiny"
    store_factory.make_store(folder, **STORED)
    return folder


@pytest.fixture
def shadow_folder(tmp_path: Path) -> Path:
    """The same thresholds with shadow keys of 32 channels."""
    folder = tmp_path / "shadow" / "acme--tiny"
    make_shadow_store(folder, **STORED)
    return folder


@pytest.fixture
def calibrated(thresholds_folder: Path) -> dict[str, Any]:
    """Options of calibrated thresholds."""
    return {"thresholds": str(thresholds_folder), "target": "k:128"}


@pytest.fixture
def make_config(model_folder: Path) -> Callable[..., VllmConfig]:
    """A vLLM configuration for the tiny model on TOPTHETA."""

    def make(options: dict[str, Any] | None = None, **engine: Any) -> VllmConfig:
        arguments = {
            "model": str(model_folder),
            "skip_tokenizer_init": True,
            "attention_backend": "toptheta",
            "dtype": "float32",
            "max_model_len": 8192,
            "enforce_eager": True,
            "additional_config": {"toptheta": options or {}},
            **engine,
        }
        return EngineArgs(**arguments).create_engine_config()

    return make
