"""What is refused, before anything is loaded, and with which words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import FalconH1Config, Gemma3nTextConfig
from vllm.config import KVTransferConfig, VllmConfig

from vllm_toptheta import errors
from vllm_toptheta.backend import plugin, support_checks
from vllm_toptheta.backend.cpu import CpuTopThetaBackend, CpuTopThetaImpl
from vllm_toptheta.backend.plan import Plan
from vllm_toptheta.store import Architecture

MakeConfig = Callable[..., VllmConfig]


@pytest.fixture(autouse=True)
def _registered() -> None:
    plugin.register()


def test_the_plain_configuration_is_accepted(make_config: MakeConfig) -> None:
    assert make_config().attention_config.backend.name == "TOPTHETA"


@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8"),
        (
            {"kv_transfer_config": KVTransferConfig(kv_connector="NixlPushConnector", kv_role="kv_both")},
            "^--kv-transfer-config NixlPushConnector: only ExampleConnector",
        ),
        ({"runner": "pooling"}, "only generation"),
        ({"kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_engine_features(make_config: MakeConfig, engine: dict[str, Any], reason: str) -> None:
    with pytest.raises(errors.UnsupportedError, match=reason):
        make_config(**engine)


def test_speculation_without_a_draft_model_is_accepted(make_config: MakeConfig) -> None:
    config = make_config(speculative_config={"method": "ngram", "num_speculative_tokens": 2})
    assert config.speculative_config is not None


@pytest.mark.parametrize("dtype", ["fp8", "fp8_e4m3", "fp8_e5m2"])
def test_float8_pages_are_for_gpus(monkeypatch: pytest.MonkeyPatch, make_config: MakeConfig, dtype: str) -> None:
    config = make_config(dtype="bfloat16")
    config.cache_config.cache_dtype = dtype
    with pytest.raises(errors.UnsupportedError, match=r"only auto, float16, bfloat16\."):
        support_checks.check_engine(config)
    monkeypatch.setattr(type(support_checks.current_platform), "is_cpu", lambda self: False)
    if dtype == "fp8_e5m2":
        with pytest.raises(errors.UnsupportedError, match="fp8_e5m2: not supported, only .*, fp8, fp8_e4m3"):
            support_checks.check_engine(config)
    else:
        support_checks.check_engine(config)


def check_plan(config: VllmConfig, architecture: Architecture | None = None, **options: Any) -> None:
    plan = Plan.resolve(config)
    plan = replace(plan, architecture=architecture or plan.architecture, **options)
    support_checks.check_plan(plan, config)


def test_float8_pages_with_copies_are_for_gpus(monkeypatch: pytest.MonkeyPatch, make_config: MakeConfig) -> None:
    config = make_config({"mode": "shadow"}, dtype="bfloat16")
    config.cache_config.cache_dtype = "fp8_e4m3"
    with pytest.raises(errors.UnsupportedError, match=r"fp8_e4m3: not supported, only auto, float16, bfloat16\."):
        support_checks.check_engine(config)
    monkeypatch.setattr(type(support_checks.current_platform), "is_cpu", lambda self: False)
    support_checks.check_engine(config)
    heads = Architecture(num_layers=1, num_heads=4, num_kv_heads=2, head_size=128, rope={})
    check_plan(config, heads)
    with pytest.raises(errors.UnsupportedError, match="no GPU kernels for copies of heads of 80"):
        check_plan(config, heads.model_copy(update={"head_size": 80}))


def test_sleep_is_for_gpus_that_wake_up_whole(monkeypatch: pytest.MonkeyPatch, make_config: MakeConfig) -> None:
    config = make_config(dtype="bfloat16")
    config.model_config.enable_sleep_mode = True
    with pytest.raises(errors.UnsupportedError, match="--enable-sleep-mode: vLLM has no sleep mode on CPUs"):
        support_checks.check_engine(config)
    monkeypatch.setattr(type(support_checks.current_platform), "is_cpu", lambda self: False)
    support_checks.check_engine(config)
    monkeypatch.setattr(support_checks, "wakes_up_whole", lambda: False)
    with pytest.raises(errors.UnsupportedError, match="--enable-sleep-mode: this vLLM throws the thresholds away"):
        support_checks.check_engine(config)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sinks_of_float16_are_for_cpus(monkeypatch: pytest.MonkeyPatch, make_config: MakeConfig, dtype: str) -> None:
    config = make_config(dtype=dtype)
    config.model_config.hf_config.attention_sinks = True
    support_checks.check_engine(config)
    monkeypatch.setattr(type(support_checks.current_platform), "is_cpu", lambda self: False)
    if dtype == "bfloat16":
        support_checks.check_engine(config)
        return
    words = "attention_sinks: FlashAttention takes attention sinks in bfloat16 only. Give --dtype bfloat16"
    with pytest.raises(errors.UnsupportedError, match=words):
        support_checks.check_engine(config)


def test_a_gpu_layer_with_sinks_needs_a_flash_attention_that_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

    from vllm_toptheta.backend.gpu import GpuTopThetaBackend

    for has_them in (True, False):
        monkeypatch.setattr(FlashAttentionBackend, "supports_sink", classmethod(lambda cls, found=has_them: found))
        assert GpuTopThetaBackend.supports_sink() == has_them


def test_heads_without_gpu_kernels_are_for_cpus(monkeypatch: pytest.MonkeyPatch, make_config: MakeConfig) -> None:
    config = make_config(dtype="bfloat16")
    wide = Architecture(num_layers=1, num_heads=34, num_kv_heads=2, head_size=72, rope={})
    check_plan(config, wide)
    monkeypatch.setattr(type(support_checks.current_platform), "is_cpu", lambda self: False)
    check_plan(config, Architecture(num_layers=1, num_heads=32, num_kv_heads=2, head_size=80, rope={}))
    words = "no GPU kernels for heads of 72, only of 64, .* and 17 query heads per kv head, only for up to 16"
    with pytest.raises(errors.UnsupportedError, match=words):
        check_plan(config, wide)


def test_groups_of_any_size_are_dense_on_gpus_and_heads_are_not(
    monkeypatch: pytest.MonkeyPatch, make_config: MakeConfig
) -> None:
    config = make_config({"weight_floor": 0}, dtype="bfloat16")
    monkeypatch.setattr(type(support_checks.current_platform), "is_cpu", lambda self: False)
    check_plan(config, Architecture(num_layers=1, num_heads=34, num_kv_heads=2, head_size=64, rope={}))
    with pytest.raises(errors.UnsupportedError, match="^head_dim 72: there are no GPU kernels for heads of 72, only"):
        check_plan(config, Architecture(num_layers=1, num_heads=4, num_kv_heads=2, head_size=72, rope={}))


def test_what_a_class_is_counts_beside_what_its_fields_say(
    monkeypatch: pytest.MonkeyPatch, make_config: MakeConfig
) -> None:
    config = make_config()
    monkeypatch.setattr(type(config.model_config), "is_hybrid", True)
    with pytest.raises(errors.UnsupportedError, match=r"config\.json: architectures: layers with a state of their own"):
        support_checks.check_engine(config)


def test_hybrids_are_for_cpus_without_prefixes(monkeypatch: pytest.MonkeyPatch, make_config: MakeConfig) -> None:
    config = make_config(dtype="bfloat16")
    monkeypatch.setattr(type(config.model_config), "is_hybrid", True)
    config.model_config.hf_config = config.model_config.hf_text_config = FalconH1Config()
    with pytest.raises(errors.UnsupportedError, match="--enable-prefix-caching: on CPUs.*Give --no-enable-prefix"):
        support_checks.check_engine(config)
    config.cache_config.enable_prefix_caching = False
    support_checks.check_engine(config)
    monkeypatch.setattr(type(support_checks.current_platform), "is_cpu", lambda self: False)
    config.cache_config.enable_prefix_caching = True
    support_checks.check_engine(config)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("use_mla", True, "MLA"),
        ("attn_type", "encoder_only", "attention type"),
        ("use_non_causal", True, "non-causal"),
        ("kv_cache_dtype", "fp8_e4m3", "kv_cache_dtype"),
        ("block_size", 24, "block_size"),
        ("dtype", torch.float64, "dtype"),
    ],
)
def test_layer_features(field: str, value: Any, reason: str) -> None:
    from vllm.v1.attention.selector import AttentionSelectorConfig

    plain = AttentionSelectorConfig(head_size=64, dtype=torch.bfloat16, kv_cache_dtype="auto", block_size=16)
    support_checks.check_layer(CpuTopThetaBackend, plain)
    with pytest.raises(errors.UnsupportedError, match=reason):
        support_checks.check_layer(CpuTopThetaBackend, plain._replace(**{field: value}))


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ({"alibi_slopes": [0.5, 0.25]}, "ALiBi"),
        ({"k_bias": torch.zeros(2)}, "layer option k_bias"),
    ],
)
def test_layer_options(option: dict[str, Any], reason: str) -> None:
    with pytest.raises(errors.UnsupportedError, match=reason):
        CpuTopThetaImpl(2, 64, 0.125, 2, **option)


@pytest.mark.parametrize("known", [True, False])
def test_layers_share_in_models_that_are_known_for_it(make_config: MakeConfig, known: bool) -> None:
    config = make_config()
    layers = {
        f"model.layers.{index}.self_attn.attn": SimpleNamespace(kv_sharing_target_layer_name=target)
        for index, target in enumerate([None, "model.layers.0.self_attn.attn"])
    }
    if known:
        config.model_config.hf_text_config = Gemma3nTextConfig(num_kv_shared_layers=15)
        support_checks.check_sharing(layers, config)
        return
    support_checks.check_sharing({name: layer for name, layer in layers.items() if ".0." in name}, config)
    with pytest.raises(errors.UnsupportedError, match=r"layer model\.layers\.1\.self_attn\.attn: KV sharing"):
        support_checks.check_sharing(layers, config)


def test_another_backend_is_left_alone(make_config: MakeConfig) -> None:
    config = make_config(attention_backend=None, kv_cache_dtype="fp8", options={"unknown": 1})
    assert config.attention_config.backend is None
