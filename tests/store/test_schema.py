"""The manifest's schema and the architecture fingerprint."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from pydantic import ValidationError
from transformers import Gemma4TextConfig, NemotronHConfig

from tests.store_factory import make_draft
from vllm_toptheta.errors import FingerprintMismatch, ModelConfigError
from vllm_toptheta.store import Architecture, Manifest, ManifestDraft, strict_yaml

LLAMA = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}
LLAMA3_SCALING = {
    "factor": 8,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def rope(**config: Any) -> dict[str, Any]:
    return Architecture.from_hf_config({**LLAMA, **config}).rope


def test_reads_a_llama_config() -> None:
    architecture = Architecture.from_hf_config({**LLAMA, "rope_theta": 100000, "rope_scaling": None, "head_dim": None})
    assert architecture == Architecture(
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_size=64,
        rope={"rope_theta": 100000.0, "rope_type": "default"},
    )


def test_fills_in_what_old_configs_leave_out() -> None:
    architecture = Architecture.from_hf_config({"num_hidden_layers": 2, "num_attention_heads": 8, "hidden_size": 64})
    assert (architecture.num_kv_heads, architecture.head_size) == (8, 8)
    assert architecture.rope == {"rope_theta": 10000.0, "rope_type": "default"}


def test_reads_the_text_config_of_a_multimodal_model() -> None:
    assert Architecture.from_hf_config({"text_config": {**LLAMA, "head_dim": 128}, "hidden_size": 1}).head_size == 128


GEMMA_4 = {
    **LLAMA,
    "model_type": "gemma4_text",
    "head_dim": 64,
    "num_key_value_heads": 3,
    "layer_types": ["sliding_attention", "full_attention"] * 15,
}


@pytest.mark.parametrize(
    ("own", "heads"),
    [
        ({}, (3, 512)),
        ({"global_head_dim": 128}, (3, 128)),
        ({"global_head_dim": 128, "num_global_key_value_heads": 1}, (3, 128)),
        ({"global_head_dim": 128, "num_global_key_value_heads": 1, "attention_k_eq_v": True}, (1, 128)),
        ({"global_head_dim": 128, "num_global_key_value_heads": None, "attention_k_eq_v": True}, (3, 128)),
        ({"model_type": "llama", "global_head_dim": 128}, (3, 64)),
    ],
)
def test_heads_are_those_of_layers_without_a_window(own: dict[str, Any], heads: tuple[int, int]) -> None:
    """As released, within a multimodal model too, and as transformers writes what it has made of it."""
    config = {**GEMMA_4, **own}
    made = Architecture.from_hf_config(config)
    assert (made.num_kv_heads, made.head_size) == heads
    assert Architecture.from_hf_config({"model_type": "gemma4", "text_config": config}) == made
    if config["model_type"] == "gemma4_text":
        nameless = {field: value for field, value in config.items() if field != "model_type"}
        assert Architecture.from_hf_config({"model_type": "gemma4", "text_config": nameless}) == made
        written = Gemma4TextConfig(**config).to_dict()
        assert "global_head_dim" not in written
        for again in (written, json.loads(json.dumps(written))):
            read = Architecture.from_hf_config(again)
            assert (read.num_kv_heads, read.head_size) == heads


def test_layers_without_a_window_have_one_kind_of_heads() -> None:
    own = {str(layer): {"head_dim": 128 if layer < 9 else 256} for layer in range(30)}
    with pytest.raises(ModelConfigError, match="per_layer_config: layers that attend to all tokens have other heads"):
        Architecture.from_hf_config({**GEMMA_4, "per_layer_config": own})
    only_windows = {layer: heads for layer, heads in own.items() if int(layer) % 2 == 0}
    assert Architecture.from_hf_config({**GEMMA_4, "per_layer_config": only_windows}).head_size == 64


def test_layers_are_counted_where_only_their_kinds_are_named() -> None:
    """As transformers 5 writes a Nemotron-H."""
    kinds = ["mamba", "moe", "attention"]
    unnumbered = {name: value for name, value in LLAMA.items() if name != "num_hidden_layers"}
    assert Architecture.from_hf_config({**unnumbered, "layers_block_type": kinds}).num_layers == 3
    assert Architecture.from_hf_config({**LLAMA, "layers_block_type": kinds}).num_layers == LLAMA["num_hidden_layers"]
    with pytest.raises(ModelConfigError, match="num_hidden_layers"):
        Architecture.from_hf_config({**unnumbered, "layers_block_type": "MEM*"})
    config = NemotronHConfig()
    assert Architecture.from_hf_config(config.to_dict()).num_layers == len(config.layers_block_type)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 1e6}, {"rope_parameters": {"rope_theta": 1000000, "rope_type": "default", "factor": None}}),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3_SCALING}},
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3_SCALING}},
        ),
        (
            {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}},
        ),
        (
            {"rope_theta": 1e4},
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}, "partial_rotary_factor": 1.0},
        ),
        (
            {"rotary_emb_base": 1e4, "rotary_pct": 0.25},
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.25}},
        ),
        (  # yarn without its training length: transformers 5 takes the model's
            {"rope_theta": 1e4, "rope_scaling": {"type": "yarn", "factor": 4.0}, "max_position_embeddings": 32768},
            {
                "rope_parameters": {
                    "rope_theta": 1e4,
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 32768,
                },
                "max_position_embeddings": 32768,
            },
        ),
        (  # phi 3 keeps the training length outside
            {
                "rope_scaling": {"type": "su", "long_factor": [1, 2.5], "short_factor": [1.0, 1.0]},
                "original_max_position_embeddings": 4096,
            },
            {
                "rope_parameters": {
                    "rope_theta": 1e4,
                    "rope_type": "longrope",
                    "type": "longrope",
                    "long_factor": [1.0, 2.5],
                    "short_factor": [1, 1],
                    "original_max_position_embeddings": 4096,
                }
            },
        ),
        (  # gemma 3
            {
                "rope_theta": 1e6,
                "rope_local_base_freq": 1e4,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            },
            {
                "rope_parameters": {
                    "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
                    "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
                }
            },
        ),
    ],
)
def test_old_and_new_spelling_of_a_rope_are_equal(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert rope(**old) == rope(**new)


def test_rope_per_layer_type_is_flat() -> None:
    nested = rope(rope_parameters={"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}})
    assert nested == {
        "full_attention.rope_theta": 1e6,
        "full_attention.rope_type": "default",
        "sliding_attention.rope_theta": 1e4,
        "sliding_attention.rope_type": "default",
    }


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({}, "num_hidden_layers"),
        ({**LLAMA, "num_hidden_layers": 0}, "num_hidden_layers"),
        ({**LLAMA, "num_hidden_layers": "30"}, "num_hidden_layers"),
        ({"text_config": {**LLAMA, "num_hidden_layers": "30"}}, "text_config.num_hidden_layers"),
        ({**LLAMA, "num_attention_heads": None}, "num_attention_heads"),
        ({**LLAMA, "num_attention_heads": 0}, "num_attention_heads"),
        ({**LLAMA, "num_key_value_heads": -1}, "num_key_value_heads"),
        ({**LLAMA, "head_dim": 1 << 40}, "head_dim"),
        ({**LLAMA, "num_key_value_heads": 7}, "num_key_value_heads"),
        ({**LLAMA, "head_dim": None, "hidden_size": 577}, "hidden_size"),
        ({**LLAMA, "rope_theta": float("nan")}, "rope_theta"),
        ({**LLAMA, "rope_theta": "10000"}, "rope_theta"),
        ({**LLAMA, "rope_theta": True}, "rope_theta"),
        ({**LLAMA, "rope_theta": 10**400}, "rope_theta"),
        ({**LLAMA, "rope_theta": {"a": {"b": 1}}}, "rope_theta"),
        ({**LLAMA, "rope_parameters": [1]}, "rope_parameters"),
        ({**LLAMA, "rope_parameters": "default"}, "rope_parameters"),
        ({**LLAMA, "rope_parameters": {"rope_type": ["default"]}}, "rope_parameters.rope_type"),
        ({**LLAMA, "rope_parameters": {"rope_theta": 0}}, "rope_parameters.rope_theta"),
        (
            {**LLAMA, "rope_parameters": {"full_attention": {"rope_theta": -1}}},
            "rope_parameters.full_attention.rope_theta",
        ),
        ({**LLAMA, "rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling.factor"),
        ({**LLAMA, "rope_scaling": {"type": "longrope", "long_factor": [1, "2"]}}, "rope_scaling.long_factor"),
        ({**LLAMA, "rope_scaling": {"factors": [[1.0]]}}, "rope_parameters"),
    ],
)
def test_refuses_an_unusable_config_by_its_own_field(config: dict[str, Any], field: str) -> None:
    with pytest.raises(ModelConfigError) as caught:
        Architecture.from_hf_config(config)
    assert caught.value.field == field
    assert caught.value.remedy
    assert not re.search("num_layers|num_heads|num_kv_heads|head_size", str(caught.value))


def test_refuses_a_head_group_that_does_not_divide() -> None:
    with pytest.raises(ModelConfigError, match="num_attention_heads 9 is not a multiple of num_key_value_heads 2"):
        Architecture.from_hf_config({**LLAMA, "num_key_value_heads": 2})


def test_architecture_survives_yaml() -> None:
    architecture = Architecture.from_hf_config(
        {**LLAMA, "rope_scaling": {"type": "su", "long_factor": [1, 2.5, 1e-7], "truncate": False}}
    )
    assert Architecture.model_validate(strict_yaml.parse(strict_yaml.dump(architecture.model_dump()))) == architecture


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"num_layers": 4}, "architecture.num_layers"),
        ({"num_kv_heads": 4, "head_size": 32}, "architecture.num_kv_heads"),
        ({"rope": {"rope_theta": 5.0, "rope_type": "default"}}, "architecture.rope.rope_theta"),
        ({"rope": {"rope_theta": 10000.0}}, "architecture.rope.rope_type"),
        ({"rope": {"rope_theta": 10000.0, "rope_type": "default", "factor": 2.0}}, "architecture.rope.factor"),
    ],
)
def test_fingerprint_names_the_first_difference(change: dict[str, Any], field: str) -> None:
    architecture = make_draft().architecture
    architecture.check(architecture.model_copy())
    with pytest.raises(FingerprintMismatch, match=r"Calibrate this model") as caught:
        architecture.check(architecture.model_copy(update=change))
    assert caught.value.field == field


def edited(*, num_channels: int | None = None, **changes: Any) -> dict[str, Any]:
    """Return a draft's fields, those at `a__b` replaced."""
    fields = make_draft(num_channels=num_channels).model_dump()
    for path, value in changes.items():
        *parents, last = path.split("__")
        place: Any = fields
        for parent in parents:
            place = place[parent]
        place[last] = value
    return fields


@pytest.mark.parametrize(
    "changes",
    [
        {"unknown": 1},
        {"schema_version": 3},
        {"thresholds": None},
        {"thresholds__measurement": {"num_sequences": 0}},
        {"model__id": "../up"},
        {"model__id": "a/b/c"},
        {"model__id": ""},
        {"architecture__num_layers": 1025},
        {"architecture__num_layers": True},
        {"architecture__num_layers": 3.0},
        {"architecture__num_kv_heads": 3},
        {"thresholds__targets": []},
        {"thresholds__targets": [{"k": 8, "min_length": 8, "max_length": 9}]},
        {"thresholds__targets": [{"k": 8, "min_length": 10, "max_length": 9}]},
        {
            "thresholds__targets": [
                {"k": 9, "min_length": 10, "max_length": 11},
                {"k": 9, "min_length": 10, "max_length": 11},
            ]
        },
        {
            "thresholds__targets": [
                {"k": 8, "min_length": 9, "max_length": 20},
                {"k": 32, "min_length": 33, "max_length": 99},
            ]
        },
        {"thresholds__targets": [{"min_length": 9, "max_length": 20}]},
        {"thresholds__targets": [{"k": 8, "mass": 0.5, "min_length": 9, "max_length": 20}]},
        {"thresholds__targets": [{"mass": 0.5, "min_length": 9, "max_length": 20}]},
        {"thresholds__dense_layers": [1, 0]},
        {"thresholds__dense_layers": [0, 0]},
        {"thresholds__dense_layers": [3]},
        {"thresholds__dense_layers": [-1]},
        {"thresholds__placement": "post"},
        {"thresholds__degree": 5},
        {"thresholds__num_buckets": 0},
        {"calibration__beta": float("nan")},
        {"calibration__beta": float("inf")},
        {"calibration__text": []},
        {"calibration__top_k_at_calibration": 1},
        {"calibration__date": "2026-01-31"},
        {"calibration__command": "x" * 8193},
        {"calibration__command": "\x1b[2J"},
        {"calibration__versions": {"numpy": 2.0}},
    ],
)
def test_schema_refuses(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ManifestDraft.model_validate(edited(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"shadow__num_channels": 18},
        {"shadow__num_channels": 7},
        {"shadow__num_channels": 0},
        {"shadow__weight_floor": 0.0},
        {"shadow__weight_floor": 1e4},
        {"shadow__min_length": 1025},
        {"shadow__max_length": 1 << 30},
        {"shadow__block_size": 0},
        {"shadow__candidate_mass": 0.0},
        {"shadow__candidate_mass": 1.5},
        {"shadow__candidate_share": (0.5,)},
        {"shadow__candidate_share": 2.0},
        {"shadow__more": 1},
    ],
)
def test_schema_refuses_shadow_keys_that_cannot_be(changes: dict[str, Any]) -> None:
    ManifestDraft.model_validate(edited(num_channels=8))
    with pytest.raises(ValidationError):
        ManifestDraft.model_validate(edited(num_channels=8, **changes))


def test_manifest_digest_covers_every_field() -> None:
    manifest = Manifest.from_draft(make_draft(), tensors_sha256="0" * 64)
    assert manifest.digest() == manifest.content_sha256
    assert manifest.model_copy(update={"shadow": None, "thresholds": None}).digest() != manifest.content_sha256
    assert Manifest.from_draft(manifest, tensors_sha256="1" * 64).content_sha256 != manifest.content_sha256
