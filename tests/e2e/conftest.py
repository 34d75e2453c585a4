"""Models and prompts for the engine tests."""

from __future__ import annotations

import inspect
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer, Gemma2Config, LlamaConfig, PreTrainedConfig

from tests import store_factory
from tests.e2e.server import Server, serving
from vllm_toptheta.calibration import CalibrationOptions, calibrate
from vllm_toptheta.calibration.sources import read_file
from vllm_toptheta.demo_model import demo_model
from vllm_toptheta.store import Architecture


@pytest.fixture(scope="session")
def model() -> Path:
    """The demo model, with the thresholds that the package ships."""
    return demo_model()


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for every test here that needs nothing special; it runs until the last of them has ended."""
    with serving(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="session")
def text_ids(model: Path) -> list[int]:
    """Python source, tokenised: a long text that every machine has."""
    return AutoTokenizer.from_pretrained(model)(inspect.getsource(tarfile))["input_ids"]


@pytest.fixture(scope="session")
def measured_thresholds(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thresholds for the demo model calibrated on a little code, with what the guard compares live text with."""
    folder = tmp_path_factory.mktemp("measured")
    code = folder / "code.txt"
    code.write_text(inspect.getsource(tarfile))
    options = CalibrationOptions.create(["k:32"], max_length=640, num_sequences=3)
    return calibrate(model, [read_file(code)], out=folder, options=options)


@pytest.fixture(scope="session")
def low_thresholds(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thresholds for the demo model that every score reaches, so that the sparse path must equal dense attention."""
    folder = tmp_path_factory.mktemp("low") / "HuggingFaceTB--SmolLM2-135M-Instruct"
    architecture = Architecture.from_hf_config(json.loads((model / "config.json").read_text()))
    store_for(architecture, folder, theta=-1e9)
    return folder


def store_for(architecture: Architecture, folder: Path, theta: float) -> None:
    """Write a store whose threshold is `theta` for every head and length; no layer is dense."""
    fields = architecture.model_dump()
    store_factory.make_store(
        folder, coefficients=[theta, 0.0, 0.0], target_ks=(16, 128), max_length=4096, dense_layers=(), **fields
    )


def tiny_model(config: PreTrainedConfig, folder: Path, theta: float) -> dict[str, str]:
    """Write a randomly initialised model and thresholds for it; the engine arguments that name them."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "tiny")
    written = json.loads((folder / "tiny" / "config.json").read_text())
    store_for(Architecture.from_hf_config(written), folder / "thresholds" / "acme--tiny", theta)
    return {"model": str(folder / "tiny"), "thresholds": str(folder / "thresholds")}


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Four query heads on two kv heads, which two tensor-parallel ranks can share; about half of the keys survive."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.1,
    )
    return tiny_model(config, tmp_path_factory.mktemp("llama"), theta=0.0)


@pytest.fixture(scope="session")
def tiny_gemma(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Sliding windows in every other layer and capped scores; every key survives."""
    config = Gemma2Config(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        query_pre_attn_scalar=64,
        sliding_window=48,
        max_position_embeddings=4096,
        attn_logit_softcapping=5.0,
        initializer_range=0.1,
    )
    return tiny_model(config, tmp_path_factory.mktemp("gemma"), theta=-1e9)
