"""Random models that draft for a random model, some of which guess right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config

from tests.e2e.conftest import TINY, write_model

HIDDEN = TINY["hidden_size"]
ONE_LAYER = LlamaConfig(**{**TINY, "num_hidden_layers": 1})


class Models(NamedTuple):
    """A model that is served, and what drafts for it.

    Attributes:
        served: Four layers, of which the first one says most.
        other: The same weights and some noise, so that it is often right.
        small: Of other heads and layers, and never right.
        eagle: Like the first layer, and often right.
        eagle3: Never right.
        mimo: A model that is served, with a layer that drafts, which is never right.
    """

    served: Path
    other: Path
    small: Path
    eagle: Path
    eagle3: Path
    mimo: Path


def write_models(folder: Path) -> Models:
    """Write them all."""
    chance = torch.Generator().manual_seed(0)
    served = write_model(LlamaConfig(**TINY), folder / "served")
    weights = load_file(served / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    # an EAGLE does not normalise the embeddings that its layer attends to
    embedding /= embedding.square().mean(dim=1, keepdim=True).sqrt()
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")) and ".layers.0." not in name:
            weight *= 0.3
    save(served, weights)
    noisy = {
        name: weight + 0.02 * weight.std() * torch.randn(weight.shape, generator=chance)
        if name.endswith("proj.weight")
        else weight
        for name, weight in weights.items()
    }
    first = {name.removeprefix("model."): weight for name, weight in weights.items() if ".layers.0." in name}
    del first["layers.0.input_layernorm.weight"]
    taken = torch.cat([torch.eye(HIDDEN), torch.zeros(HIDDEN, HIDDEN)], dim=1)
    ones, wide = torch.ones(HIDDEN), 0.1 * torch.randn(HIDDEN, 3 * HIDDEN, generator=chance)
    third = {name.replace("layers.0.", "midlayer."): weight for name, weight in first.items()}
    for part in ("q_proj", "k_proj", "v_proj"):
        name = f"midlayer.self_attn.{part}.weight"
        third[name] = torch.cat([third[name], third[name]], dim=1)
    third |= {f"midlayer.{name}.weight": ones.clone() for name in ("input_layernorm", "hidden_norm")}
    third |= {"fc.weight": wide, "norm.weight": ones.clone(), "lm_head.weight": weights["lm_head.weight"]}
    small = LlamaConfig(
        **{**TINY, "num_hidden_layers": 2, "num_attention_heads": 1, "num_key_value_heads": 1, "hidden_size": 64}
    )
    return Models(
        served,
        other=save(folder / "other", noisy, LlamaConfig(**TINY)),
        small=write_model(small, folder / "small"),
        eagle=save(folder / "eagle", first | {"fc.weight": taken}, ONE_LAYER),
        # by itself it would look at layers that a model of four does not have
        eagle3=save(
            folder / "eagle3",
            third,
            LlamaConfig(**ONE_LAYER.to_dict() | {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]}),
        ),
        mimo=_write_mimo(folder / "mimo"),
    )


def save(folder: Path, weights: dict[str, Any], config: PreTrainedConfig | None = None) -> Path:
    """Write a model's weights, and its config.json if there is none."""
    folder.mkdir(exist_ok=True)
    save_file({name: weight.clone().contiguous() for name, weight in weights.items()}, folder / "model.safetensors")
    if config is not None:
        fields = {**config.to_dict(), "architectures": ["LlamaForCausalLM"], "dtype": "float32"}
        (folder / "config.json").write_text(json.dumps(fields))
    return folder


def _write_mimo(folder: Path) -> Path:
    model = write_model(Qwen2Config(**TINY), folder)
    weights = load_file(model / "model.safetensors")
    weights |= {
        name.replace(".layers.", ".mtp_layers."): weight for name, weight in weights.items() if ".layers.0." in name
    }
    norms = ("token_layernorm", "hidden_layernorm", "final_layernorm")
    weights |= {f"model.mtp_layers.0.{name}.weight": torch.ones(HIDDEN) for name in norms}
    weights["model.mtp_layers.0.input_proj.weight"] = torch.eye(HIDDEN, 2 * HIDDEN)
    save(model, weights)
    config = json.loads((model / "config.json").read_text())
    own = {"architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
    (model / "config.json").write_text(json.dumps({**config, **own}))
    return model
