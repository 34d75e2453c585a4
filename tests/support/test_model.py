"""Which models are refused, by the fields of config.json that say so, whatever else stands there."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_toptheta.errors import UnsupportedError
from vllm_toptheta.support import (
    Reason,
    image_modalities,
    model_reasons,
    override_reasons,
    refuse,
    sharing_field,
    sinks_field,
)
from vllm_toptheta.support.model import _REFUSED_FIELDS

OTHERS = [
    "architectures",
    "layer_types",
    "num_hidden_layers",
    "global_head_dim",
    "head_dim",
    "model_type",
    "hidden_size",
]
READ = st.sampled_from([*_REFUSED_FIELDS, *OTHERS, "text_config", "rope_parameters", "rope_theta"])
TYPES = ["falcon_h1", "gemma3n_text", "gemma4_text", "LlamaModel"]
VALUES = st.sampled_from([None, True, 0, -1, 7, 1.5, float("nan"), float("inf"), "x", "mamba", *TYPES, [], {}])
SIX = {"num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3}
ANY_JSON = VALUES | st.lists(VALUES, max_size=2) | st.dictionaries(READ, VALUES, max_size=3)


@pytest.mark.parametrize("field", _REFUSED_FIELDS)
def test_fields_that_change_attention_are_refused_where_they_are_set(field: str) -> None:
    for config in ({field: 4}, {"text_config": {field: 4}}):
        assert [reason.field for reason in model_reasons(config)] == [field]
    for nothing in (None, 0, False, [], {}):
        assert model_reasons({field: nothing}) == []


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"head_dim": 64, "global_head_dim": 64}, ""),
        ({"head_dim": 64, "v_head_dim": 128}, "v_head_dim 128"),
        ({"model_type": "gpt_oss"}, ""),
        ({"model_type": "granite_swa"}, ""),
        ({"model_type": "gemma3n", "text_config": {"model_type": "gemma3n_text"}}, ""),
        ({"model_type": "gemma3n_text", "num_kv_shared_layers": 2, **SIX}, ""),
        ({"model_type": "gemma3n", "text_config": {"num_kv_shared_layers": 2, **SIX}}, ""),
        ({"model_type": "gemma3n_text", "num_kv_shared_layers": 3, **SIX}, "num_kv_shared_layers 3"),
        ({"model_type": "gemma3n_text", "num_kv_shared_layers": 5, **SIX}, "num_kv_shared_layers 5"),
        ({"model_type": "gemma3n_text", "num_kv_shared_layers": 6, **SIX}, "num_kv_shared_layers 6"),
        ({"model_type": "gemma4_text", "num_kv_shared_layers": 3, "num_global_key_value_heads": 1, **SIX}, ""),
        ({"model_type": "gemma4", "text_config": {"global_head_dim": 256, "head_dim": 128}}, ""),
        ({"model_type": "gemma4_text", "per_layer_config": {"1": {"head_dim": 512}}, **SIX}, ""),
        ({"model_type": "gemma4_text", "num_kv_shared_layers": 5, **SIX}, "num_kv_shared_layers 5"),
        ({"model_type": "gemma4_text", "num_kv_shared_layers": 7, **SIX}, "num_kv_shared_layers 7"),
        ({"model_type": "gemma4", "text_config": {"use_bidirectional_attention": "vision"}}, ""),
        (
            {"model_type": "gemma4", "text_config": {"use_bidirectional_attention": "all"}},
            "use_bidirectional_attention",
        ),
        (
            {"model_type": "gemma4", "is_mm_prefix_lm": True, "text_config": {"use_bidirectional_attention": "all"}},
            "use_bidirectional_attention",
        ),
        ({"model_type": "gemma4_text", "use_bidirectional_attention": "vision"}, "use_bidirectional_attention"),
        ({"model_type": "gemma4_unified_text"}, "global_head_dim 512"),
        ({"model_type": "step3p7", "per_layer_config": {"1": {"head_dim": 512}}}, "per_layer_config"),
        ({"is_encoder_decoder": True, "text_config": {"head_dim": 64}}, "is_encoder_decoder"),
        ({"architectures": ["LlamaModel"]}, "architectures LlamaModel"),
        ({"architectures": ["LlamaModel", "LlamaForCausalLM"]}, ""),
        ({"architectures": ["InternVLChatModel"]}, ""),
        ({"architectures": ["QWenLMHeadModel"]}, ""),
        ({"architectures": ["ChatGLMModel"]}, ""),
        ({"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2}, ""),
        ({"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 3}, "layer_types"),
        ({"layer_types": ["mamba"]}, "layer_types mamba"),
        ({"layer_types": ["mamba", "attention"], "model_type": "bamba"}, "layer_types attention"),
        ({"layer_types": ["mamba", "attention"], "model_type": "granitemoehybrid", "mamba_d_state": 128}, ""),
        ({"layer_types": ["linear_attention", "full_attention"], "model_type": "qwen3_next"}, ""),
        ({"text_config": {"layer_types": ["linear_attention"], "model_type": "qwen3_5_text"}}, ""),
        ({"full_attention_interval": 4, "linear_num_value_heads": 32, "model_type": "qwen3_5_moe_text"}, ""),
        ({"layer_types": ["conv", "full_attention"], "text_config": {"model_type": "lfm2"}}, ""),
        ({"layers_block_type": ["mamba", "attention"], "model_type": "nemotron_h", "ssm_state_size": 128}, ""),
        ({"hybrid_override_pattern": "M*-", "model_type": "nemotron_h"}, ""),
        ({"model_type": "falcon_h1", "mamba_d_state": 256, "alibi": True}, "alibi"),
        (
            {"layer_types": ["mamba", "chunked_attention"], "model_type": "granitemoehybrid"},
            "layer_types chunked_attention",
        ),
    ],
)
def test_values_that_matter(config: dict[str, Any], field: str) -> None:
    assert [reason.field for reason in model_reasons(config)] == ([field] if field else [])


@given(st.dictionaries(READ, ANY_JSON, max_size=5))
def test_nothing_that_json_can_say_is_a_surprise(config: dict[str, Any]) -> None:
    assert all(str(reason) for reason in [*model_reasons(config), *override_reasons(config)])


@pytest.mark.parametrize(
    ("overrides", "fields"),
    [
        ({"num_hidden_layers": 2}, []),
        ({"hidden_size": 64}, ["hidden_size"]),
        ({"hidden_size": 64, "head_dim": 16}, []),
        ({"text_config": {"rope_scaling": {}}}, ["rope_scaling"]),
        ({"global_head_dim": 256, "text_config": {"per_layer_config": {}}}, ["global_head_dim", "per_layer_config"]),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["rope_parameters"]),
        ({"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1.0}}}, []),
    ],
)
def test_overrides_must_not_depend_on_the_class(overrides: dict[str, Any], fields: list[str]) -> None:
    found = override_reasons(overrides)
    assert [reason.field for reason in found] == [f"--hf-overrides {field}" for field in fields]
    assert all(reason.remedy for reason in found)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"model_type": "llama"}, None),
        ({"model_type": ["gpt_oss"], "attention_sinks": False}, None),
        ({"model_type": "gpt_oss"}, "model_type gpt_oss"),
        ({"text_config": {"model_type": "granitemoe_swa"}}, "model_type granitemoe_swa"),
        ({"model_type": "granite", "attention_sinks": True}, "attention_sinks"),
        ({"swa_attention_sink_enabled": True}, "swa_attention_sink_enabled"),
    ],
)
def test_what_says_that_layers_have_sinks(config: dict[str, Any], field: str | None) -> None:
    assert sinks_field(config) == field


@pytest.mark.parametrize(
    ("config", "modalities"),
    [
        ({"model_type": "gemma4", "text_config": {}}, ()),
        ({"model_type": "gemma4", "text_config": {"use_bidirectional_attention": "all"}}, ()),
        ({"model_type": "gemma4", "text_config": {"use_bidirectional_attention": "vision"}}, ("image", "video")),
        (
            {
                "model_type": "gemma4",
                "audio_config": {"hidden_size": 8},
                "text_config": {"use_bidirectional_attention": "vision"},
            },
            ("image", "video", "audio"),
        ),
    ],
)
def test_what_a_gemma_4_reads_in_both_directions(config: dict[str, Any], modalities: tuple[str, ...]) -> None:
    assert image_modalities(config) == modalities


def test_every_reason_is_named_at_once_with_a_remedy() -> None:
    refuse([])
    with pytest.raises(UnsupportedError) as caught:
        refuse([Reason("one", "because"), Reason("other", "for that", "Leave both")])
    assert str(caught.value).startswith("one: because; other: for that. Change that, or start `vllm serve` without")


def test_layers_share_where_config_json_says_so_or_its_class() -> None:
    assert sharing_field({"model_type": "gemma3n_text"}) == "num_kv_shared_layers 15"
    assert sharing_field({"model_type": "gemma3n", "text_config": {"num_kv_shared_layers": 2}}) == (
        "num_kv_shared_layers 2"
    )
    assert sharing_field({"model_type": "gemma3n_text", "num_kv_shared_layers": 0}) is None
    assert sharing_field({"model_type": "gemma4_text"}) is None
    assert sharing_field({"model_type": "gemma4_text", "num_kv_shared_layers": 2}) == "num_kv_shared_layers 2"
    assert sharing_field({"model_type": "llama", "num_kv_shared_layers": 2}) is None
