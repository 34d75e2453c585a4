"""Which drafts are served, on which devices, and what flags or vLLM's configuration say of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from vllm_toptheta.support import Draft, Engine, engine_reasons

CPU, GPU = Engine("cpu"), Engine("gpu", runs_on_v2=True)
LLAMA = {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4}
BY_MODELS = ("draft_model", "eagle", "eagle3")
FULL = {"layer_types": ["full_attention"] * 2}


@pytest.mark.parametrize(
    ("fields", "method"),
    [
        ({"method": "ngram"}, "ngram"),
        ({"model": "[ngram]"}, "ngram"),
        ({"method": "ngram_gpu", "model": None}, "ngram_gpu"),
        ({"model": "acme/small"}, "draft_model"),
        ({"method": "draft_model", "model": "acme/small"}, "draft_model"),
        # vLLM goes by the name
        ({"method": "draft_model", "model": "acme/EAGLE-small"}, "eagle"),
        ({"model": "acme/small-EAGLE3"}, "eagle3"),
        ({"model": "acme/dflash"}, "dflash"),
        ({"method": "eagle", "model": "acme/small"}, "eagle"),
        ({"method": "mimo_mtp"}, "mtp"),
        ({"method": "medusa"}, "medusa"),
        ({"model": "package.Proposer"}, "custom_class"),
        ({"num_speculative_tokens": 2}, "draft_model"),
    ],
)
def test_methods_are_told_as_vllm_tells_them(fields: dict[str, Any], method: str) -> None:
    draft = Draft.of(fields)
    assert draft is not None
    assert draft.method == method


def test_nothing_is_asked_for() -> None:
    assert Draft.of({}) is None


@pytest.mark.parametrize(
    ("config", "method"),
    [(LLAMA, "draft_model"), ({"model_type": "medusa"}, "medusa"), ({"model_type": "ernie_mtp"}, "mtp")],
)
def test_a_type_may_be_a_method(config: dict[str, Any], method: str) -> None:
    assert Draft("draft_model").of_checkpoint(config).method == method
    assert Draft("eagle").of_checkpoint(config).method == "eagle"


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (LLAMA, None),
        (LLAMA | {"architectures": ["LlamaForCausalLMEagle3"]}, None),
        # as vLLM's configuration has it
        ({"model_type": "eagle", "model": LLAMA}, None),
        ({"model_type": "eagle", "model": LLAMA | {"kv_lora_rank": 64}}, "kv_lora_rank"),
        (LLAMA | {"sliding_window": 64}, "sliding_window"),
        (LLAMA | {"sliding_window": 64, "use_sliding_window": False}, None),
        (LLAMA | {"sliding_window": 64, "use_sliding_window": True}, "sliding_window"),
        (LLAMA | {"sliding_window": 64, "model_type": "qwen2"}, None),
        (LLAMA | {"sliding_window": 64, "use_sliding_window": True, "model_type": "qwen2"}, "sliding_window"),
        (LLAMA | {"sliding_window": 64} | FULL, None),
        (LLAMA | {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_window"),
        (LLAMA | {"attention_chunk_size": 64}, "attention_chunk_size"),
        ({"model_type": "qwen3_next"} | FULL, "model_type"),
        ({"model_type": "gemma3n_text"} | FULL, "num_kv_shared_layers 15"),
        ({"model_type": "gpt_oss"} | FULL, "model_type gpt_oss"),
        (LLAMA | {"vision_config": {"depth": 1}}, "vision_config"),
    ],
)
def test_layers_of_another_kind_do_not_draft(config: dict[str, Any], field: str | None) -> None:
    draft = Draft("draft_model").of_checkpoint(config)
    assert draft.unserved == field
    reasons = [str(reason) for reason in engine_reasons(replace(CPU, draft=draft))]
    words = f"--speculative-config draft_model: {field}: no layers of that kind have drafted yet"
    assert reasons == ([] if field is None else [words])


@pytest.mark.parametrize("method", [*BY_MODELS, "mtp"])
def test_models_draft(method: str) -> None:
    draft = Draft(method)
    assert engine_reasons(replace(CPU, draft=draft)) == []
    tried = [str(reason) for reason in engine_reasons(replace(GPU, draft=draft))]
    # there it would have the served model's attention, whatever is asked for
    words = "--speculative-config draft_model: vLLM's V2 model runner would have it draft with"
    assert [reason[: len(words)] for reason in tried] == ([words] if method == "draft_model" else [])
    assert engine_reasons(replace(GPU, draft=draft, runs_on_v2=False)) == []
    assert engine_reasons(replace(CPU, draft=draft, splits_pages=False)) == []
    (reason,) = engine_reasons(replace(GPU, draft=draft, runs_on_v2=False, splits_pages=False))
    assert str(reason).endswith("on GPUs models have drafted with newer versions of vLLM only")


@pytest.mark.parametrize("method", ["medusa", "mlp_speculator", "dflash", "dspark", "custom_class", "peagle"])
def test_other_methods_are_refused_by_name(method: str) -> None:
    for engine in (CPU, GPU):
        (reason,) = engine_reasons(replace(engine, draft=Draft(method)))
        assert str(reason).startswith(f"--speculative-config {method}: beside thresholds only ngram, ngram_gpu, suffix")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"parallel_drafting": True}, "eagle parallel_drafting: no model has drafted in that way"),
        ({"draft_sample_method": "probabilistic"}, "eagle draft_sample_method: no model"),
        ({"kv_cache_dtype": "fp8"}, "eagle kv_cache_dtype: no model"),
        ({"attention_backend": "toptheta"}, "eagle attention_backend: layers that draft have no thresholds"),
        ({"parallel_drafting": False, "attention_backend": "CPU_ATTN", "rejection_sample_method": "standard"}, None),
        ({"kv_cache_dtype": None, "attention_backend": "auto"}, None),
    ],
)
def test_options_that_nobody_has_run(fields: dict[str, Any], words: str | None) -> None:
    draft = Draft.of({"method": "eagle", "model": "acme/small", **fields})
    reasons = [str(reason) for reason in engine_reasons(replace(CPU, draft=draft))]
    if words is None:
        assert reasons == []
    else:
        (reason,) = reasons
        assert reason.startswith(f"--speculative-config {words}")
    # they are vLLM's own affair where no layer drafts
    assert engine_reasons(replace(CPU, draft=Draft.of({**fields, "method": "ngram"}))) == []


@pytest.mark.parametrize(
    "asked",
    [
        {"num_ranks": 2},
        {"num_stages": 2},
        {"num_replicas": 2},
        {"adapts": True},
        {"sees": True},
        {"sharing": "num_kv_shared_layers 4"},
        {"mixed": "model_type gemma4_text"},
        {"hybrid": "qwen3_next", "caches_prefixes": False},
        {"block_size": 16},
        {"block_size": 48},
        {"drafts_itself": True},
    ],
    ids=str,
)
def test_engines_for_which_no_model_has_drafted(asked: dict[str, Any]) -> None:
    assert all(engine_reasons(replace(CPU, **asked, draft=Draft(method))) for method in BY_MODELS)


def test_pages_that_vllm_reads_too() -> None:
    assert engine_reasons(replace(CPU, draft=Draft("eagle"), block_size=64)) == []
    (reason,) = engine_reasons(replace(CPU, draft=Draft("eagle"), block_size=48))
    assert str(reason).startswith("--block-size 48: layers that draft have vLLM's own attention")
    assert reason.remedy == "Give a multiple of 32, or leave it out"


@pytest.mark.parametrize("method", [*BY_MODELS, "mtp"])
def test_no_model_drafts_beside_layers_with_windows(method: str) -> None:
    config = {"architectures": ["MiMoForCausalLM"], "layer_types": ["full_attention", "sliding_attention"]}
    (reason,) = engine_reasons(replace(CPU, draft=Draft(method)).of_checkpoint(config))
    assert str(reason).startswith(f"--speculative-config {method}: sliding_window: vLLM has models draft on pages of")
    assert engine_reasons(replace(CPU, draft=Draft("ngram")).of_checkpoint(config)) == []


def test_of_models_with_layers_that_draft_one_was_run() -> None:
    engine = replace(CPU, draft=Draft("mtp"))
    assert engine_reasons(engine.of_checkpoint({"architectures": ["MiMoForCausalLM"]})) == []
    (reason,) = engine_reasons(engine.of_checkpoint({"architectures": ["Glm4MoeForCausalLM"]}))
    assert str(reason) == "--speculative-config mtp: architectures: no layers of that kind have drafted yet"
