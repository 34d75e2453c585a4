"""What `toptheta serve --check` accepts is started, and what it refuses is not: flags and models, also at random.

The other side is vLLM's own: its parser, its configuration, and the backend's checks of that. tests/e2e starts servers.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import NemotronHConfig

from tests.server.start import refusal
from vllm_toptheta.errors import TopThetaError
from vllm_toptheta.limits import HEAD_SIZES
from vllm_toptheta.server.command import ServeCommand
from vllm_toptheta.server.config import ServerConfig
from vllm_toptheta.support import Device

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 256,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
}
CHUNKED = LLAMA | {
    "architectures": ["Llama4ForCausalLM"],
    "model_type": "llama4_text",
    "head_dim": 64,
    "intermediate_size_mlp": 64,
    "num_local_experts": 2,
}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 2048}


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "1")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # vLLM waits for two seconds before it reads a config again that it could not read
    monkeypatch.setattr("vllm.transformers_utils.repo_utils.time.sleep", lambda seconds: None)


def write(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def build(folder: Path, flags: list[str], **options: Any) -> ServeCommand:
    return ServeCommand.build([str(folder), *flags], options, ServerConfig())


def overrides(**fields: Any) -> list[str]:
    return ["--hf-overrides", json.dumps(fields)]


# checkpoints that come with scales of float8 keys and values
FLOAT8 = {"num_bits": 8, "type": "float", "dynamic": False}
QUANTIZED: dict[str, dict[str, Any]] = {
    "modelopt": {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}},
    "compressed-tensors": {"format": "dense", "config_groups": {}, "kv_cache_scheme": FLOAT8},
}
DUMMY = ["--load-format", "dummy"]
CONNECTOR = ["--kv-transfer-config", '{"kv_connector": "ExampleConnector", "kv_role": "kv_both"}']
SERVED: dict[str, tuple[dict[str, Any], list[str], dict[str, Any]]] = {
    "plain": ({}, [], {}),
    "dense": ({}, [], {"weight_floor": 0}),
    "copies": ({}, [], {"mode": "shadow"}),
    "a connector": ({}, CONNECTOR, {}),
    "copies and a connector": ({}, CONNECTOR, {"mode": "shadow"}),
    "offloading by somebody's spec": (
        {},
        [
            "--kv-transfer-config",
            json.dumps(
                {
                    "kv_connector": "OffloadingConnector",
                    "kv_role": "kv_both",
                    "kv_connector_extra_config": {"spec_name": "Mine", "spec_module_path": "mine"},
                }
            ),
        ],
        {},
    ),
    **{f"heads of {size}": ({"head_dim": size}, [], {}) for size in (8, 72, 112, 192, 512)},
    "copies of heads of 72": ({"head_dim": 72}, [], {"mode": "shadow"}),
    "17 query heads on a kv head": ({"num_attention_heads": 34, "hidden_size": 34 * 64}, [], {}),
    **{f"pages of {size}": ({}, ["--block-size", str(size)], {}) for size in (16, 48, 128, 256)},
    **{f"cache in {dtype}": ({}, [f"--kv-cache-dtype={dtype}"], {}) for dtype in ("auto", "float16", "bfloat16")},
    "as many layers": ({}, overrides(num_hidden_layers=2, head_dim=64), {}),
    "other layers without weights": ({}, [*overrides(num_hidden_layers=3), *DUMMY], {}),
    "other heads without weights": (
        {},
        [*overrides(num_attention_heads=8, num_key_value_heads=1, head_dim=32), *DUMMY],
        {},
    ),
    "other positions": ({}, overrides(rope_parameters=YARN | {"rope_theta": 5e5}), {}),
    "overrides by dots": ({}, ["--hf-overrides.num_hidden_layers", "1", *DUMMY], {}),
    "overrides that win by dots": ({}, [*overrides(num_hidden_layers=9), "--hf_overrides.head_dim=64"], {}),
    "n-grams": ({}, ["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 2}'], {}),
    "n-grams by dots": ({}, ["-sc.method", "ngram", "-sc.num_speculative_tokens", "2"], {}),
    "lossless": ({}, [], {"lossless": True}),
    "lossless by copies": ({}, ["-tp", "2"], {"lossless": True, "draft_tokens": 3, "mode": "shadow"}),
    "no sleep": ({}, ["--no-enable-sleep-mode"], {}),
    "two ranks": ({}, ["-tp", "2"], {}),
    "four ranks": ({}, ["--tensor-parallel-size=4"], {}),
    "a shorter length": ({}, ["--max-model-len", "2k"], {}),
    "float32": ({}, ["--dtype", "float"], {}),
}

REFUSED: dict[str, tuple[dict[str, Any], list[str], dict[str, Any], str]] = {
    "heads by the class": ({}, overrides(num_attention_heads=8), {}, "--hf-overrides num_attention_heads"),
    "heads that do not group": (
        {},
        overrides(num_attention_heads=7, num_key_value_heads=2, head_dim=64),
        {},
        "num_key_value_heads: .* not a multiple",
    ),
    "positions by the version": ({}, overrides(rope_theta=5e5), {}, "--hf-overrides rope_theta"),
    "positions in part": ({}, overrides(rope_parameters=YARN), {}, "--hf-overrides rope_parameters"),
    "positions that are none": (
        {},
        overrides(rope_parameters={"rope_type": "x", "rope_theta": 1.0}),
        {},
        "rope_parameters.rope_type",
    ),
    "lossless and n-grams": (
        {},
        ["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 2}'],
        {"lossless": True},
        "lossless: (the served model drafts|drafts come from the served model)",
    ),
    "lossless in stages": ({}, ["-pp", "2"], {"lossless": True}, "--pipeline-parallel-size: lossless drafts need"),
    "lossless with adapters": ({}, ["--enable-lora"], {"lossless": True}, "--enable-lora: lossless drafts do not know"),
    "a config that there is not": ({}, overrides(text_config={"num_hidden_layers": 1}), {}, "--hf-overrides text_conf"),
    "overrides of another type": ({}, overrides(num_hidden_layers="2"), {}, "--hf-overrides num_hidden_layers"),
    "overrides that are no JSON": ({}, ["--hf-overrides", "{"], {}, "--hf-overrides: not JSON"),
    **{
        f"cache in {' '.join(flag)}": (
            {},
            flag,
            {},
            "^--kv-cache-dtype .*: not supported, only auto, float16, bfloat16",
        )
        for flag in (
            *(["--kv-cache-dtype", dtype] for dtype in ("fp8", "FP8", "fp8_e4m3", "fp8_e5m2", "int8", "nvfp4", "x")),
            *(["--kv_cache_dtype=fp8"], ["--kv-cache-dt", "fp8"]),
        )
    },
    **{
        f"cache by {method}": (
            {"quantization_config": {"quant_method": method, **quantization}},
            [],
            {},
            r"quantization_config fp8\w*: not supported, only .*Give --kv-cache-dtype bfloat16",
        )
        for method, quantization in QUANTIZED.items()
    },
    **{
        f"pages of {size}": (
            {},
            ["--block-size", size],
            {},
            f"^--block-size {size}: not supported, only multiples of 16",
        )
        for size in ("1", "8", "24", "0", "-16")
    },
    "pages of no number": ({}, ["--block-size", "many"], {}, "--block-size: expected an integer, got many"),
    "divided heads": ({"hidden_size": 258}, [], {}, r"config\.json: hidden_size: 258 is not a multiple"),
    "odd heads": ({"head_dim": 65}, [], {}, r"config\.json: head_dim: of 65 numbers an odd"),
    "odd copies": ({"head_dim": 20}, [], {"mode": "shadow"}, "head_dim 20: there are no copies of heads of 20"),
    "blocks": ({"block_configs": [{"attention": {"n_heads_in_group": 2}}] * 2}, [], {}, "block_configs: layers whose"),
    "kv heads by layer": ({"num_key_value_heads_per_layer": [2, 1]}, [], {}, "num_key_value_heads_per_layer: layers"),
    "kv heads in a list": ({"num_key_value_heads": [2, 1]}, [], {}, "num_key_value_heads: .*valid integer"),
    "full layers of other heads": ({"global_head_dim": 128}, [], {}, "global_head_dim 128: layers whose heads differ"),
    "dual chunks": (
        {"dual_chunk_attention_config": {"chunk_size": 1024, "local_size": 64}},
        [],
        {},
        "dual_chunk_attention_config: ",
    ),
    "latent attention": ({"kv_lora_rank": 64}, [], {}, r"config\.json: kv_lora_rank: multi-head latent attention"),
    "encoder": ({"is_encoder_decoder": True}, [], {}, "is_encoder_decoder: encoder-decoder models are not supported"),
    "shared keys": ({"num_kv_shared_layers": 1}, [], {}, "num_kv_shared_layers: KV sharing"),
    "chunks": (CHUNKED, [], {}, "attention_chunk_size: layers that attend within chunks"),
    "states": ({"layer_types": ["linear_attention", "full_attention"]}, [], {}, "layer_types linear_attention: layers"),
    "pooling": ({}, ["--runner", "pooling"], {}, "--runner, --convert: only generation"),
    "converted": ({}, ["--convert", "embed"], {}, "--runner, --convert: only generation"),
    "classes": (
        {"architectures": ["LlamaForSequenceClassification"]},
        [],
        {},
        "architectures Llama.*: only generation",
    ),
    "a draft": ({}, ["--spec-method", "medusa", "--spec-model", "a/b"], {}, "--speculative-config medusa: beside thr"),
    "a connector": (
        {},
        ["--kv-transfer-config", '{"kv_connector": "NixlPushConnector", "kv_role": "kv_both"}'],
        {},
        "^--kv-transfer-config NixlPushConnector: only ExampleConnector, NixlConnector, and OffloadingConnector",
    ),
    "a connector of somebody's": (
        {},
        [
            "--kv-transfer-config",
            '{"kv_connector": "ExampleConnector", "kv_role": "kv_both", "kv_connector_module_path": "tests.server"}',
        ],
        {},
        "^--kv-transfer-config ExampleConnector: only ExampleConnector, NixlConnector, and OffloadingConnector",
    ),
    "a connector without a name": (
        {},
        ["--kv-transfer-config", '{"kv_port": 14580}'],
        {},
        "^--kv-transfer-config: only ExampleConnector, NixlConnector, and OffloadingConnector",
    ),
    "a connector and ranks": (
        {},
        [*CONNECTOR, "-tp", "2"],
        {},
        "connectors other than NIXL were never run on several ranks",
    ),
    "a connector and drafts": ({}, CONNECTOR, {"lossless": True}, "connectors were never run where tokens are drafted"),
    "offloading": ({}, ["--kv-offloading-size", "1"], {}, "^--kv-offloading-size: vLLM offloads pages from GPUs"),
    "offloading to others": (
        {},
        ["--kv-offloading-size", "1", "--kv-offloading-backend", "lmcache"],
        {},
        "^--kv-offloading-size: only ExampleConnector, NixlConnector, and OffloadingConnector",
    ),
    "sleep": ({}, ["--enable-sleep-mode"], {}, "--enable-sleep-mode: vLLM has no sleep mode on CPUs"),
    "three ranks": ({}, ["-tp", "3"], {}, "--tensor-parallel-size 3: ranks cannot share 4 query heads on 2 kv heads"),
    "ranks of a sequence": ({}, ["-tp", "4", "-dcp", "2"], {}, "context parallelism"),
    "too long": ({}, ["--max-model-len", "8192"], {}, "--max-model-len 8192: the model is made for 4096 tokens"),
    "more layers": ({}, overrides(num_hidden_layers=3), {}, "num_hidden_layers 3: the weights are those of .* with 2"),
    "fewer layers": ({}, overrides(num_hidden_layers=1), {}, "num_hidden_layers 1: the weights are those of .* with 2"),
    "other heads": ({}, overrides(head_dim=32), {}, "head_dim 32: the weights are those of a model with 64"),
    "other words": ({}, overrides(vocab_size=64), {}, "vocab_size 64: the weights are those of a model with 128"),
}
# refused when weights are read, which is after the configuration is made
LATER = {"more layers", "fewer layers", "other heads", "other words", "positions that are none"}


@pytest.mark.parametrize("name", SERVED)
def test_what_the_check_accepts_is_started(name: str, tmp_path: Path) -> None:
    change, flags, options = SERVED[name]
    command = build(write(tmp_path / "tiny", LLAMA | change), flags, **options)
    assert command.check("cpu")
    assert refusal(command) == ""


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_check_refuses_is_not(name: str, tmp_path: Path) -> None:
    change, flags, options, words = REFUSED[name]
    folder = write(tmp_path / "tiny", LLAMA | change)
    with pytest.raises(TopThetaError, match=words) as caught:
        build(folder, flags, **options).check("cpu")
    assert caught.value.remedy
    assert "\n" not in str(caught.value)
    if name not in LATER:
        assert refusal(build(folder, flags, **options))


@pytest.mark.parametrize("role", ["kv_producer", "kv_consumer"])
@pytest.mark.parametrize("spec", [ModuleSpec("nixl", None), None], ids=["installed", "not installed"])
def test_nixl_is_served_where_it_is_installed(
    spec: ModuleSpec | None, role: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "nixl", spec and module_from_spec(spec))
    command = build(
        write(tmp_path / "tiny", LLAMA),
        ["--kv-transfer-config", json.dumps({"kv_connector": "NixlConnector", "kv_role": role})],
    )
    if spec is not None:
        assert command.check("cpu")
        assert refusal(command) == ""
        return
    words = "--kv-transfer-config NixlConnector: the package nixl is not installed"
    with pytest.raises(TopThetaError, match=words):
        command.check("cpu")
    assert words in refusal(command)


GPU: dict[str, tuple[dict[str, Any], list[str], dict[str, Any], str]] = {
    **{f"heads of {size}": ({"head_dim": size}, [], {}, "") for size in HEAD_SIZES},
    **{f"heads of {size}": ({"head_dim": size}, [], {}, f"no GPU kernels for heads of {size}") for size in (72, 112)},
    **{f"heads of {size}": ({"head_dim": size}, [], {}, f"no GPU kernels for heads of {size}") for size in (192, 512)},
    "dense heads of 72": ({"head_dim": 72}, [], {"weight_floor": 0}, "no GPU kernels for heads of 72"),
    "17 query heads on a kv head": (
        {"num_attention_heads": 34, "hidden_size": 34 * 64},
        [],
        {},
        "num_attention_heads: there are no GPU kernels for 17 query heads per kv head, only for up to 16",
    ),
    "17 dense query heads": ({"num_attention_heads": 34, "hidden_size": 34 * 64}, [], {"weight_floor": 0}, ""),
    "copies of heads of 80": ({"head_dim": 80}, [], {"mode": "shadow"}, "no GPU kernels for copies of heads of 80"),
    "float8": ({}, ["--kv-cache-dtype", "fp8"], {}, ""),
    "float8 of copies": ({}, ["--kv-cache-dtype", "fp8"], {"mode": "shadow"}, ""),
    "float8 of another kind": ({}, ["--kv-cache-dtype", "fp8_e5m2"], {}, "only auto, float16, bfloat16, fp8, fp8_e4m3"),
    "float32": ({}, ["--dtype", "float32"], {}, "--dtype float32: GPUs take bfloat16 and float16"),
    "sleep": ({}, ["--enable-sleep-mode"], {}, ""),
    "sinks": ({"attention_sinks": True}, [], {}, ""),
    "sinks of float16": ({"attention_sinks": True}, ["--dtype", "half"], {}, "attention_sinks: .* in bfloat16 only"),
    "as many drafts as are fastest": ({}, [], {"lossless": True, "draft_tokens": "auto"}, ""),
    "states": ({"model_type": "falcon_h1"}, [], {}, ""),
    "pages of 8": ({}, ["--block-size", "8"], {}, "--block-size 8: "),
    "a connector": ({}, CONNECTOR, {}, "^--kv-transfer-config ExampleConnector: on GPUs it brings pages without"),
    "pages by NIXL": (
        {},
        ["--kv-transfer-config", '{"kv_connector": "NixlConnector", "kv_role": "kv_consumer"}'],
        {},
        "^--kv-transfer-config NixlConnector: on GPUs it brings pages without",
    ),
    "offloading": ({}, ["--kv-offloading-size", "1"], {}, ""),
    "offloading of copies": (
        {},
        ["--kv-offloading-size", "1"],
        {"mode": "shadow"},
        "mode shadow: on GPUs, pages that a connector copies have no room for shadow keys or copies",
    ),
}


@pytest.mark.parametrize("name", GPU)
def test_the_check_for_another_device(name: str, tmp_path: Path) -> None:
    change, flags, options, words = GPU[name]
    command = build(write(tmp_path / "tiny", LLAMA | change), flags, **options)
    if words:
        with pytest.raises(TopThetaError, match=words):
            command.check("gpu")
    else:
        assert command.check("gpu")


IMAGES = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}


@pytest.mark.parametrize(
    ("flags", "is_served"),
    [
        ([], False),
        (["--limit-mm-per-prompt", '{"image": 0}'], True),
        (["--limit-mm-per-prompt", '{"image": {"count": 0}}'], True),
        (["--limit-mm-per-prompt.image", "0"], True),
        (["--limit-mm-per-prompt", '{"image": 1}'], False),
        (["--limit-mm-per-prompt", '{"video": 0}'], False),
        (["--language-model-only"], True),
        (["--language-model-only", "--enable-mm-embeds"], False),
    ],
    ids=str,
)
def test_text_alone_of_a_model_whose_images_attend_to_themselves(
    flags: list[str], is_served: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = {**LLAMA, "model_type": "gemma3_text", "sliding_window": 48, "head_dim": 64}
    command = build(write(tmp_path / "tiny", IMAGES | {"text_config": text}), flags)
    if is_served:
        assert command.check("gpu").startswith("thresholds floor:2")
        monkeypatch.setattr("vllm_toptheta.server.preflight.serves_text_alone", lambda: False)
        monkeypatch.setattr("vllm_toptheta.support.images.serves_text_alone", lambda: False)
        remedy = (
            """Install vLLM 0.32 or 0.33, which can leave them out, then give --limit-mm-per-prompt '{"image": 0}'"""
        )
    else:
        remedy = """Give --limit-mm-per-prompt '{"image": 0}'"""
    with pytest.raises(TopThetaError, match="--limit-mm-per-prompt: tokens of one image see each other") as caught:
        command.check("gpu")
    assert caught.value.remedy == f"{remedy} to serve its text alone"


def test_a_vllm_that_does_not_wake_up_whole_must_not_sleep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_toptheta.server.engine_flags.wakes_up_whole", lambda: False)
    model = write(tmp_path / "tiny", LLAMA)
    words = "--enable-sleep-mode: this vLLM throws the thresholds away.*install vLLM 0.32 or 0.33"
    with pytest.raises(TopThetaError, match=words):
        build(model, ["--enable-sleep-mode"]).check("gpu")
    assert build(model, []).check("gpu")


@pytest.mark.parametrize(
    ("change", "flags", "device", "told"),
    [
        ({"head_dim": 72}, [], None, "; on CPUs only, because there are no GPU kernels for heads of 72, only of 64"),
        ({"head_dim": 72}, [], "cpu", ""),
        ({}, ["--kv-cache-dtype", "fp8"], None, "; on GPUs only, because not supported, only auto, float16, bfloat16"),
        (
            {"attention_sinks": True},
            ["--dtype", "float16"],
            None,
            "; on CPUs only, because FlashAttention takes attention sinks in bfloat16 only",
        ),
        ({}, [], None, ""),
    ],
)
def test_where_the_device_is_not_known(
    change: dict[str, Any],
    flags: list[str],
    device: Device | None,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vllm_toptheta.server.preflight._vllm_build", lambda: None)
    answer = build(write(tmp_path / "tiny", LLAMA | change), flags).check(device)
    assert told in answer
    assert ("only, because" in answer) == bool(told)


def test_a_model_that_only_names_the_kinds_of_its_layers_is_refused_for_them(tmp_path: Path) -> None:
    config = {**NemotronHConfig().to_dict(), "architectures": ["NemotronHForCausalLM"]}
    assert "num_hidden_layers" not in config
    with pytest.raises(TopThetaError, match="--enable-prefix-caching: on CPUs, vLLM does not keep the states"):
        build(write(tmp_path / "tiny", config), []).check("cpu")
    assert build(write(tmp_path / "tiny", config), []).check("gpu")


def test_llama_4_is_refused_whether_or_not_its_chunks_are_named(tmp_path: Path) -> None:
    whole = {"architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4", "text_config": CHUNKED}
    for config in (
        CHUNKED,
        CHUNKED | {"attention_chunk_size": 8192},
        CHUNKED | {"attention_chunk_size": None, "layer_types": ["chunked_attention", "full_attention"]},
        whole,
        whole | {"text_config": {name: value for name, value in CHUNKED.items() if name != "model_type"}},
    ):
        with pytest.raises(TopThetaError, match="layers that attend within chunks are not supported"):
            build(write(tmp_path / "tiny", config), []).check("cpu")
    build(write(tmp_path / "tiny", CHUNKED | {"attention_chunk_size": None}), []).check("cpu")


BASES = {
    "llama": LLAMA
    | {
        "head_dim": 64,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 2048,
        },
        "tie_word_embeddings": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "pad_token_id": 2,
        "pretraining_tp": 1,
        "use_cache": True,
    },
    "qwen2": LLAMA
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "sliding_window": 1024,
        "use_sliding_window": False,
        "max_window_layers": 21,
    },
    "qwen3": LLAMA
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "head_dim": 64,
        "layer_types": ["full_attention"] * 2,
        "rope_parameters": {"rope_type": "default", "factor": 2.0, "rope_theta": 1e6},
    },
    "gemma2": LLAMA
    | {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "head_dim": 64,
        "query_pre_attn_scalar": 64,
        "sliding_window": 48,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 30.0,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "mistral": LLAMA
    | {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": None,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    },
}
OTHERS: list[Any] = [None, True, "x", 1.5, 7, [], ["x"], {}, {"x": 1}]


def mutations(value: Any) -> Iterator[Any]:
    """Other values of a field: of another type, negative, larger, no number; the name of a model's class stays one."""
    yield from (other for other in OTHERS if type(other) is not type(value))
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield from (
            -value,
            0 * value,
            value + 1,
            3 * value,
            1000 * value,
            value * (1 << 70),
            float("inf"),
            float("nan"),
        )
    if isinstance(value, list):
        yield from (3 * value, [-1], [1.5])
    if isinstance(value, dict):
        for name, inside in value.items():
            yield {other: kept for other, kept in value.items() if other != name}
            yield from (value | {name: changed} for changed in mutations(inside))


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """A model's config.json of which one to three fields are dropped or changed."""
    config = dict(BASES[draw(st.sampled_from(sorted(BASES)))])
    for name in draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=3, unique=True)):
        changed = [*mutations(config[name])]
        index = draw(st.integers(-1, len(changed) - 1))
        if index < 0:
            del config[name]
        else:
            config[name] = changed[index]
    return config


@settings(max_examples=600, derandomize=True, deadline=None, database=None)
@given(config=configs(), device=st.sampled_from(["cpu", "gpu", None]))
def test_configs_at_random(config: dict[str, Any], device: Device | None) -> None:
    with tempfile.TemporaryDirectory() as name:
        command = build(write(Path(name, "tiny"), config), [])
        # anything but an error of ours is one of the check's
        with suppress(TopThetaError):
            command.check(device)
            assert refusal(command) == "", config
