"""A model of a given shape with random weights, and thresholds that keep a given share of its keys.

Random weights give random scores, for which no calibration on texts exists. So the thresholds are set on the running
engine: the counters tell how many value rows a kv head reads, and its threshold is bisected until it reads what is
wanted.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_toptheta import store

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "vocab_size": 128256,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "tie_word_embeddings": False,
}
TARGET_K = 1  # of the store: every sequence of more tokens is thresholded
BISECTIONS = 16
SMALLEST, LARGEST = 1e-16, 1e4  # between these lies every threshold above zero that random weights need


def write_model(folder: Path, *, name: str = "dummy", max_length: int = 131072) -> tuple[Path, Path]:
    """Write a model directory of Llama-3.1-8B's shape, without weights, and a store of zero thresholds for it.

    Args:
        folder: Where to.
        name: The model's name.
        max_length: Of the thresholds, tokens.

    Returns:
        The model's directory, and the directory of its store.
    """
    model = folder / name
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(LLAMA_8B))
    architecture = store.Architecture.from_hf_config(LLAMA_8B)
    target = store.Target(k=TARGET_K, min_length=TARGET_K + 1, max_length=max_length)
    draft = store.ManifestDraft(
        model=store.ModelIdentity(id=name),
        architecture=architecture,
        targets=(target,),
        dense_layers=(),
        placement="pre_softmax",
        degree=0,
        num_buckets=1,
        calibration=store.Provenance(
            text=(store.TextSource(name="random", sha256="0" * 64, num_characters=1),),
            num_sequences=1,
            max_length=max_length,
            seed=0,
            top_k_at_calibration=False,
            beta=0.0,
            versions={},
            command="set on the running engine",
            date=datetime.datetime.now(datetime.UTC).date(),
        ),
    )
    per_head = (architecture.num_layers, architecture.num_heads, 1, 1)
    arrays: dict[str, NDArray[Any]] = {
        "coefficients": np.zeros(per_head, np.float32),
        "bucket_edges": np.array([TARGET_K + 1, max_length + 1], np.int32),
        "row_count": np.ones((1, 1), np.int64),
        "score_mean": np.zeros(per_head, np.float32),
        "score_std": np.zeros(per_head, np.float32),
    }
    store.save(folder / "thresholds" / name, draft, arrays)
    return model, folder / "thresholds"


def keep_rows(engine: Any, decode: Callable[[], object], rows: float) -> float:
    """Set a running engine's thresholds so that each kv head reads about `rows` value rows per token.

    Args:
        engine: A `vllm.LLM` whose thresholds are constants; functions are sent to its workers, so the environment needs
            `VLLM_ALLOW_INSECURE_SERIALIZATION=1`.
        decode: Decodes a few tokens of the sequences to be measured.
        rows: Value rows wanted.

    Returns:
        Value rows that a kv head reads per token in the end, the mean over layers and heads.
    """
    read = np.array(engine.collective_rpc(_take_rows_read)[0])
    low, high = np.full(read.shape, np.log(SMALLEST)), np.full(read.shape, np.log(LARGEST))
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        engine.collective_rpc(_set_thresholds, args=(np.exp(middle).tolist(),))
        engine.collective_rpc(_take_rows_read)
        decode()
        read = np.array(engine.collective_rpc(_take_rows_read)[0])
        low, high = np.where(read > rows, middle, low), np.where(read > rows, high, middle)
    return float(read.mean())


def _sparse_layers(worker: Any) -> list[Any]:
    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    plans = [getattr(layer.impl, "layer_plan", None) for layer in layers if hasattr(layer, "impl")]
    return [plan for plan in plans if plan is not None]


def _take_rows_read(worker: Any) -> list[list[float]]:
    """Value rows read per token by each layer's kv heads since the last call."""
    rows = []
    for plan in _sparse_layers(worker):
        counters = plan.counters
        tokens = max(1, int(counters.totals[0]))
        rows.append([count / tokens for count in counters.rows_read.tolist()])
        counters.zero_()
    return rows


def _set_thresholds(worker: Any, thetas: list[list[float]]) -> None:
    """One threshold for each layer and kv head, written where the captured graphs read it."""
    for plan, per_kv_head in zip(_sparse_layers(worker), thetas, strict=True):
        group = plan.counters.num_queries_per_kv
        values = plan.coefficients.new_tensor(per_kv_head).repeat_interleave(group)
        plan.coefficients[0, :, 0].copy_(values)
