"""Layers that draft never have the served model's thresholds, whichever runner builds them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_toptheta.backend.hooks import config_check, page_tails
from vllm_toptheta.backend.plan import Plan
from vllm_toptheta.errors import UnsupportedError

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 256,
    "rope_theta": 10000.0,
}
SPEC = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)


def config_of(method: str, backend: Any = None) -> Any:
    hf_config = SimpleNamespace(to_dict=lambda: LLAMA)
    speculative = SimpleNamespace(
        method=method,
        model="acme/small",
        attention_backend=backend,
        draft_model_config=SimpleNamespace(hf_config=hf_config),
    )
    return SimpleNamespace(
        speculative_config=speculative,
        attention_config=SimpleNamespace(backend=SimpleNamespace(name="TOPTHETA")),
        model_config=SimpleNamespace(hf_text_config=hf_config, is_hybrid=False),
        kv_transfer_config=None,
    )


@pytest.mark.parametrize(
    ("method", "on_cpu", "asked", "expected"),
    [
        ("eagle", False, None, AttentionBackendEnum.FLASH_ATTN),
        ("mtp", False, None, AttentionBackendEnum.FLASH_ATTN),
        ("eagle", False, AttentionBackendEnum.TRITON_ATTN, AttentionBackendEnum.TRITON_ATTN),
        ("ngram", False, None, None),
        # whose V1 runner chooses by itself
        ("eagle", True, None, None),
    ],
)
def test_layers_that_draft_have_flash_attention_on_gpus(
    monkeypatch: pytest.MonkeyPatch, method: str, on_cpu: bool, asked: Any, expected: Any
) -> None:
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: on_cpu)
    config = config_of(method, asked)
    config_check._leave_drafts_alone(config)
    assert config.speculative_config.attention_backend is expected


@pytest.mark.parametrize(
    ("name", "is_marked", "is_refused"),
    [
        ("model.layers.3.self_attn.attn", False, False),
        ("draft_model.model.layers.0.self_attn.attn", False, True),
        ("model.layers.4.self_attn.attn", False, True),
        ("model.layers.0.self_attn.attn", True, True),
    ],
)
def test_a_layer_that_drafts_with_our_backend_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, is_marked: bool, is_refused: bool
) -> None:
    monkeypatch.setattr(Plan, "code_bytes_of", lambda config: 0)
    layer = SimpleNamespace(
        layer_name=name, is_draft_layer=is_marked, attn_backend=SimpleNamespace(get_name=lambda: "TOPTHETA")
    )
    pad = page_tails._padding(lambda layer, config: SPEC)
    if not is_refused:
        assert pad(layer, config_of("eagle")).page_size_padded
        return
    with pytest.raises(UnsupportedError, match=f"layer {name}: it drafts, and layers that draft have no thresholds"):
        pad(layer, config_of("eagle"))
    # vLLM's own pages are as they were
    layer.attn_backend.get_name = lambda: "CPU_ATTN"
    assert pad(layer, config_of("eagle")) is SPEC
