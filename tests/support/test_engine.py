"""Which engines are refused, and on which devices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from vllm_toptheta.support import Connector, Device, Draft, Engine, engine_reasons, kernel_reasons

CPU, GPU = Engine("cpu"), Engine("gpu")
NGRAM = Draft("ngram")
FILES = Connector.of({"kv_connector": "ExampleConnector"})
HOST = Connector.of({}, offloads=True)
NIXL = Connector.of({"kv_connector": "NixlConnector"})


@pytest.mark.parametrize("engine", [CPU, GPU], ids=["cpu", "gpu"])
def test_a_plain_engine(engine: Engine) -> None:
    assert engine_reasons(engine) == []


@pytest.mark.parametrize(
    ("asked", "devices"),
    [
        ({"cache_dtype": "fp8_e4m3"}, ["gpu"]),
        ({"cache_dtype": "bfloat16"}, ["cpu", "gpu"]),
        ({"cache_dtype": "turboquant_4bit_nc"}, []),
        ({"dtype": "float32"}, ["cpu"]),
        ({"block_size": 16}, ["cpu", "gpu"]),
        ({"block_size": 8}, []),
        ({"draft": NGRAM}, ["cpu", "gpu"]),
        ({"draft": Draft("suffix")}, ["cpu", "gpu"]),
        ({"drafts_itself": True}, ["cpu", "gpu"]),
        *(
            ({"drafts_itself": True, **asked}, ["cpu"])
            for asked in ({"runs_on_v2": False}, {"sees": True}, {"num_replicas": 2})
        ),
        ({"runs_on_v2": False, "sees": True, "num_replicas": 2}, ["cpu", "gpu"]),
        ({"drafts_itself": True, "draft": NGRAM}, []),
        ({"drafts_itself": True, "num_stages": 2}, []),
        ({"drafts_itself": True, "adapts": True}, []),
        ({"drafts_itself": True, "sleeps": True}, []),
        ({"num_stages": 2, "adapts": True}, ["cpu", "gpu"]),
        ({"connector": FILES}, ["cpu"]),
        ({"connector": HOST}, ["gpu"]),
        ({"connector": Connector.of({}, offloads=True, offloading_backend="lmcache")}, []),
        ({"connector": NIXL}, ["cpu"]),
        ({"connector": NIXL, "has_nixl": False}, []),
        ({"has_nixl": False}, ["cpu", "gpu"]),
        ({"connector": NIXL, "num_ranks": 2}, ["cpu"]),
        ({"connector": NIXL, "num_ranks": 2, "num_replicas": 2}, []),
        *(({"connector": connector, "num_ranks": 2}, []) for connector in (FILES, HOST)),
        ({"connector": Connector.of({"kv_connector": "LMCacheConnectorV1"})}, []),
        ({"connector": Connector.of({"kv_connector": "ExampleConnector", "kv_connector_module_path": "mine"})}, []),
        *(
            ({"connector": connector, **asked}, [])
            for connector in (FILES, NIXL)
            for asked in (
                {"num_stages": 2},
                {"num_replicas": 2},
                {"draft": NGRAM},
                {"drafts_itself": True},
                {"adapts": True},
                {"hybrid": "qwen3_next"},
                {"sharing": "num_kv_shared_layers 4"},
            )
        ),
        ({"sleeps": True}, ["gpu"]),
        ({"sleeps": True, "wakes_up_whole": False}, []),
        ({"wakes_up_whole": False}, ["cpu", "gpu"]),
        ({"generates": False}, []),
        ({"num_context_ranks": 2}, []),
        ({"sinks": "model_type gpt_oss"}, ["cpu", "gpu"]),
        ({"sinks": "model_type gpt_oss", "dtype": "bfloat16"}, ["cpu", "gpu"]),
        ({"sinks": "model_type gpt_oss", "dtype": "float16"}, ["cpu"]),
        ({"sharing": "num_kv_shared_layers 15"}, ["cpu", "gpu"]),
        ({"sharing": "num_kv_shared_layers 15", "num_ranks": 2}, []),
        ({"sharing": "num_kv_shared_layers 15", "drafts_itself": True}, ["cpu"]),
        ({"mixed": "model_type gemma4_text", "drafts_itself": True}, ["cpu"]),
        ({"sharing": "num_kv_shared_layers 15", "draft": NGRAM}, ["cpu", "gpu"]),
        ({"sharing": "num_kv_shared_layers 15", "splits_pages": False}, ["cpu"]),
        ({"mixed": "model_type gemma4_text", "splits_pages": False}, ["cpu"]),
        ({"splits_pages": False}, ["cpu", "gpu"]),
        ({"mixed": "model_type gemma4_text", "num_ranks": 2}, ["cpu", "gpu"]),
        ({"mixed": "model_type gemma4_text", "window_head_size": 256}, ["cpu", "gpu"]),
        ({"mixed": "model_type gemma4_text", "window_head_size": 32}, ["cpu"]),
        ({"skips_rows": True}, []),
        ({"hybrid": "qwen3_next"}, ["cpu", "gpu"]),
        ({"hybrid": "qwen3_next", "dtype": "bfloat16"}, ["cpu", "gpu"]),
        ({"hybrid": "qwen3_next", "dtype": "float16"}, ["gpu"]),
        ({"hybrid": "falcon_h1"}, ["gpu"]),
        ({"hybrid": "falcon_h1", "caches_prefixes": False}, ["cpu", "gpu"]),
        ({"hybrid": "lfm2", "caches_prefixes": False}, ["gpu"]),
        ({"hybrid": "qwen3_5_text"}, ["cpu", "gpu"]),
        ({"hybrid": "qwen3_5_text", "has_torchvision": False}, ["gpu"]),
        ({"hybrid": "qwen3_next", "has_torchvision": False}, ["cpu", "gpu"]),
        ({"hybrid": "qwen3_next", "draft": NGRAM}, []),
        ({"hybrid": "qwen3_next", "drafts_itself": True}, []),
        ({"hybrid": "qwen3_next", "splits_pages": False}, ["cpu"]),
    ],
)
def test_devices_that_serve_it(asked: dict[str, Any], devices: list[Device]) -> None:
    assert [engine.device for engine in (CPU, GPU) if not engine_reasons(replace(engine, **asked))] == devices


def test_a_checkpoint_says_whether_there_are_sinks() -> None:
    config = {"model_type": "gpt_oss"}
    for engine in (CPU, GPU):
        assert engine.of_checkpoint(config).sinks == "model_type gpt_oss"
        assert engine.of_checkpoint({"model_type": "llama"}).sinks is None
    (reason,) = engine_reasons(replace(GPU, dtype="float16").of_checkpoint(config))
    assert str(reason) == "model_type gpt_oss: FlashAttention takes attention sinks in bfloat16 only"
    assert reason.remedy == "Give --dtype bfloat16"


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({}, ""),
        ({"splits_pages": False}, "model_type lfm2: this vLLM cannot split its pages"),
        ({"cache_dtype": "fp8"}, "--kv-cache-dtype fp8: pages of a lfm2 have room for sums of 16-bit values only"),
        ({"draft": NGRAM}, "--speculative-config: drafts were never tried"),
    ],
)
def test_hybrids_on_gpus(asked: dict[str, Any], words: str) -> None:
    reasons = engine_reasons(replace(GPU, **asked).of_checkpoint({"text_config": {"model_type": "lfm2"}}))
    assert [str(reason)[: len(words)] for reason in reasons] == ([words] if words else [])


@pytest.mark.parametrize(
    ("engine", "mode", "served"), [(GPU, "values", True), (GPU, "shadow", False), (CPU, "shadow", True)]
)
def test_gpus_have_no_copies_of_hybrids(engine: Engine, mode: str, served: bool) -> None:
    heads = {"head_size": 64, "num_heads": 4, "num_kv_heads": 2, "is_sparse": True, "has_copies": mode == "shadow"}
    assert kernel_reasons(engine, mode=mode, **heads) == []
    reasons = kernel_reasons(replace(engine, hybrid="lfm2"), mode=mode, **heads)
    assert (reasons == []) == served


def test_a_checkpoint_says_what_heads_layers_with_a_window_have() -> None:
    for model_type in ("gemma3n_text", "gemma4_text"):
        assert engine_reasons(GPU.of_checkpoint({"text_config": {"model_type": model_type}})) == []
    mixed = GPU.of_checkpoint({"model_type": "gemma4", "text_config": {"head_dim": 32}})
    (reason,) = engine_reasons(mixed)
    assert str(reason) == "head_dim 32: on GPUs, layers with a window have heads of 64, 80, 96, 128, 256 only"
    # of other models it is the size of all heads
    assert engine_reasons(GPU.of_checkpoint({"model_type": "llama", "head_dim": 32})) == []


@pytest.mark.parametrize(
    ("mode", "is_sparse", "has_copies", "served"),
    [("values", True, False, True), ("shadow", True, True, True), ("shadow", True, False, False)],
)
def test_layers_that_share_have_copies_and_no_shadow_keys(
    mode: str, is_sparse: bool, has_copies: bool, served: bool
) -> None:
    options = {"mode": mode, "is_sparse": is_sparse, "has_copies": has_copies}
    heads = {"head_size": 64, "num_heads": 4, "num_kv_heads": 2}
    assert kernel_reasons(CPU, **heads, **options) == []
    assert (kernel_reasons(replace(CPU, sharing="num_kv_shared_layers 15"), **heads, **options) == []) == served


def test_a_checkpoint_says_what_the_model_takes() -> None:
    assert not CPU.of_checkpoint({"vision_config": None}).sees
    assert CPU.of_checkpoint({"vision_config": {"depth": 1}, "quantization_config": None}).sees
    quantized = {
        "audio_config": {"depth": 1},
        "quantization_config": {"quant_method": "fp8", "kv_cache_scheme": {"num_bits": 8}},
    }
    assert CPU.of_checkpoint(quantized).sees


@pytest.mark.parametrize(
    ("ranks", "num_heads", "num_kv_heads", "served"),
    [(2, 4, 2, True), (4, 4, 2, True), (3, 6, 2, False), (3, 4, 2, False), (0, 4, 2, False), (6, 12, 4, False)],
)
def test_ranks_share_heads_evenly(ranks: int, num_heads: int, num_kv_heads: int, served: bool) -> None:
    heads = {"head_size": 64, "num_heads": num_heads, "num_kv_heads": num_kv_heads}
    options = {"mode": "values", "is_sparse": True, "has_copies": False}
    assert (kernel_reasons(replace(CPU, num_ranks=ranks), **heads, **options) == []) == served


@pytest.mark.parametrize(
    ("quantization", "dtype"),
    [
        (None, "auto"),
        ("fp8", "auto"),
        ({"quant_method": "awq", "kv_cache_scheme": {}}, "auto"),
        ({"quant_method": "compressed-tensors", "kv_cache_scheme": None}, "auto"),
        ({"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8}}, "fp8"),
        ({"quant_method": "modelopt", "kv_cache_quant_algo": "FP8"}, "fp8_e4m3"),
        ({"quant_method": "modelopt_fp4", "quantization": {"kv_cache_quant_algo": "NVFP4"}}, "nvfp4"),
        ({"quant_method": "modelopt", "kv_cache_scheme": {"num_bits": 8, "type": "float"}}, "fp8_e4m3"),
        ({"quant_method": "modelopt", "kv_cache_scheme": {"num_bits": 8, "type": "int"}}, "auto"),
    ],
)
def test_a_checkpoint_may_say_what_the_cache_holds(quantization: Any, dtype: str) -> None:
    config = {"quantization_config": quantization}
    assert CPU.of_checkpoint(config).cache_dtype == dtype
    assert replace(CPU, cache_dtype="bfloat16").of_checkpoint(config).cache_dtype == "bfloat16"
