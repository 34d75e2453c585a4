"""A model of a given shape with random weights, and thresholds that keep a given number of its keys.

The scores of random weights are all next to zero, and so alike that every key has the average weight: thresholds
relative to the row keep all keys or none. So the thresholds are set on the running engine: the counters tell how many
value rows a kv head reads, and its threshold is bisected until it reads what is wanted. In mode `shadow`, what keys are
projected on comes from the engine's own pages, and the margins, likewise by bisection, from the number of keys that are
to be read. With copies of keys and values, no key but anchors is heavy, and the threshold decides which are light.

vLLM makes a worker's tensors in inference mode, where alone they may be written, and calls functions that are sent to
it outside of that.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
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
BISECTIONS = 16
SAMPLED_PAGES = 64  # keys of so many are projected on their principal components
SMALLEST, LARGEST = 1e-16, 1e4  # between these lies every threshold above zero that random weights need


def write_model(folder: Path, *, name: str = "dummy", max_length: int = 131072) -> tuple[Path, Path]:
    """Write a model directory of Llama-3.1-8B's shape, without weights, and a store of shadow keys for it, all zeros.

    Args:
        folder: Where to.
        name: The model's name.
        max_length: Of the store, tokens.

    Returns:
        The model's directory, and the directory of its store.
    """
    model = folder / name
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(LLAMA_8B))
    architecture = store.Architecture.from_hf_config(LLAMA_8B)
    draft = store.ManifestDraft(
        model=store.ModelIdentity(id=name),
        architecture=architecture,
        shadow=store.ShadowSection(
            num_channels=architecture.head_size // 2,
            weight_floor=1.0,
            min_length=1,
            max_length=max_length,
            block_size=16,
            candidate_mass=1.0,
            candidate_share=1.0,
        ),
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
    per_head = (architecture.num_layers, architecture.num_heads)
    per_kv_head = (architecture.num_layers, architecture.num_kv_heads)
    sizes = architecture.head_size, architecture.head_size // 2
    arrays: dict[str, NDArray[Any]] = {
        "shadow_encoder": np.zeros((*per_kv_head, *sizes), np.float32),
        "shadow_decoder": np.zeros((*per_kv_head, *reversed(sizes)), np.float32),
        "shadow_key_mean": np.zeros((*per_kv_head, architecture.head_size), np.float32),
        "shadow_margin": np.zeros(per_head, np.float32),
        "shadow_scale_coefficients": np.zeros((*per_head, 2), np.float32),
        "shadow_candidate_share": np.ones(per_kv_head, np.float32),
    }
    store.save(folder / "thresholds" / name, draft, arrays)
    return model, folder / "thresholds"


def accept(share: float) -> None:
    """Have engines that are made from now on in this process accept each draft with a probability of `share`.

    What random weights draft says nothing of what a model does, and it is rejected where a model's would not be.
    """
    from vllm import EngineArgs

    create = EngineArgs.create_speculative_config

    def create_accepting(args: Any, *arguments: Any, **named: Any) -> Any:
        config = create(args, *arguments, **named)
        if config is not None:
            config.rejection_sample_method = "synthetic"
            # of each position, that all drafts up to it are accepted
            config.synthetic_acceptance_rates = [share ** (step + 1) for step in range(config.num_speculative_tokens)]
        return config

    EngineArgs.create_speculative_config = create_accepting


def keep(
    engine: Any, decode: Callable[[], object], *, rows: float, keys: float | None = None, are_copies: bool = False
) -> None:
    """Set a running engine's thresholds so that each kv head reads about so many value rows and keys per token.

    Args:
        engine: A `vllm.LLM` with thresholds; functions are sent to its workers, so the environment needs
            `VLLM_ALLOW_INSECURE_SERIALIZATION=1`.
        decode: Computes the sequences to be measured, unless they are in the prefix cache, and decodes a few tokens.
        rows: Value rows wanted.
        keys: Keys wanted, more than `rows`, with calibrated shadow keys; None without.
        are_copies: Whether the value rows are read as copies.
    """
    floors = None
    if keys is not None:
        decode()
        engine.collective_rpc(_fit_projections)
        # pages are encoded when they are filled
        engine.reset_prefix_cache()
        decode()
        floors = _bisect(engine, decode, "keys_read", keys, lambda thetas: (thetas, np.zeros_like(thetas)))
    _bisect(
        engine,
        decode,
        "copies_read" if are_copies else "value_rows_read",
        rows,
        lambda thetas: (thetas, None if floors is None else np.maximum(thetas - floors, 0)),
    )


def _bisect(
    engine: Any,
    decode: Callable[[], object],
    counter: str,
    wanted: float,
    numbers: Callable[[NDArray[Any]], tuple[NDArray[Any], NDArray[Any] | None]],
) -> NDArray[Any]:
    """Return the threshold of each layer and kv head with which `counter` grows by `wanted` per token.

    `numbers` makes thresholds and margins of what is bisected.
    """
    read = np.array(engine.collective_rpc(_take, args=(counter,))[0])
    low, high = np.full(read.shape, np.log(SMALLEST)), np.full(read.shape, np.log(LARGEST))
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        thetas, margins = numbers(np.exp(middle))
        engine.collective_rpc(_set_numbers, args=(thetas.tolist(), None if margins is None else margins.tolist()))
        engine.collective_rpc(_take, args=(counter,))
        decode()
        read = np.array(engine.collective_rpc(_take, args=(counter,))[0])
        low, high = np.where(read > wanted, middle, low), np.where(read > wanted, high, middle)
    return thetas


def _sparse_layers(worker: Any) -> list[Any]:
    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    return [layer for layer in layers if getattr(getattr(layer, "impl", None), "layer_plan", None) is not None]


@torch.inference_mode()
def _take(worker: Any, counter: str) -> list[list[float]]:
    """By how much a counter of each layer's kv heads has grown per token since the last call."""
    taken = []
    for layer in _sparse_layers(worker):
        counters = layer.impl.layer_plan.counters
        counted = counters.settled()
        tokens = max(1, int(counted.totals[0]))
        taken.append([count / tokens for count in getattr(counted, counter).tolist()])
        counters.zero_()
    return taken


@torch.inference_mode()
def _set_numbers(worker: Any, thetas: list[list[float]], margins: list[list[float]] | None) -> None:
    """One threshold, and one margin, for each layer and kv head, written where the captured graphs read them.

    Relative thresholds lose their slope by that, but anchors are scored as ever.
    """
    for index, layer in enumerate(_sparse_layers(worker)):
        plan = layer.impl.layer_plan
        group = plan.counters.num_queries_per_kv
        coefficients = plan.thresholds.coefficients
        coefficients.zero_()
        coefficients[:, 0].copy_(coefficients.new_tensor(thetas[index]).repeat_interleave(group))
        if margins is not None:
            plan.shadow.margin.copy_(coefficients.new_tensor(margins[index]).repeat_interleave(group))


@torch.inference_mode()
def _fit_projections(worker: Any) -> None:
    """Project keys on their principal components, written where the captured graphs read them."""
    from vllm_toptheta.kernels.codec import ShadowCodec
    from vllm_toptheta.reference import fit_projection

    for layer in _sparse_layers(worker):
        served = layer.impl.layer_plan.shadow.codec
        num_kv_heads, head_size, num_channels = served.encoder.shape
        # block 0 is nobody's, and the first sequence has the next ones
        pages = layer.kv_cache[1 : 1 + SAMPLED_PAGES, ..., :head_size].double()
        keys = pages.transpose(0, 1).flatten(1, 2)
        fitted = fit_projection(
            keys.mean(dim=1),
            torch.stack([head.T.cov() for head in keys]),
            torch.eye(head_size, device=keys.device).expand(num_kv_heads, -1, -1),
            num_channels=num_channels,
        )
        codec = ShadowCodec.build(fitted.encoder, fitted.decoder, fitted.key_mean)
        for target, tensor in zip(served, codec, strict=True):
            target.copy_(tensor)
