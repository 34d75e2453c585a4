"""A model's config.json as vLLM will read it, overrides applied."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_toptheta.server.config_fields import check_fields, check_numbers, check_rope, rope_of_layers
from vllm_toptheta.store import Architecture, Serving, read_config
from vllm_toptheta.support import Reason, model_reasons, override_reasons, refuse, text_config

MAX_TOKENS = 1 << 40  # more than any model takes
_ALLOW_LONGER = "VLLM_ALLOW_LONG_MAX_MODEL_LEN"
_NESTED = "_config"  # the end of the names of configs within one
_NO_CONFIGS = ("quantization_config", "dual_chunk_attention_config", "linear_attn_config")  # dicts, whatever their name
# types that vLLM refuses in float16, and serves in another dtype by itself
_NO_FLOAT16 = {"gemma2", "gemma3", "gemma3_text", "glm4"}
# rope_types whose max_position_embeddings is the length that they scale to
_SCALED_ALREADY = ("llama3", "yarn", "longrope")


@dataclass(frozen=True)
class ServedConfig:
    """What is known of a model that is served.

    Attributes:
        fields: All that config.json says, overrides applied.
        architecture: Its heads, layers and positions.
        model_type: As config.json names it.
        dtype: What vLLM serves it in by itself; None where that depends on the device.
        max_length: Tokens of the longest sequence that it is made for; None where config.json does not say.
    """

    fields: Mapping[str, Any]
    architecture: Architecture
    model_type: str
    dtype: str | None
    max_length: int | None

    @classmethod
    def read(cls, folder: Path, overrides: Mapping[str, Any], *, has_dummy_weights: bool = False) -> ServedConfig:
        """Read the config.json in a directory, and see that a model like this is served.

        Args:
            folder: A Hugging Face model directory.
            overrides: vLLM's --hf-overrides.
            has_dummy_weights: Whether weights are made up, so that they fit whatever overrides say.

        Raises:
            ModelConfigError: There is no usable config.json.
            UnsupportedError: The model is of a kind that is not served, or what overrides come to cannot be foreseen.
        """
        file = folder / "config.json"
        config = read_config(folder)
        check_fields(config, file)
        check_numbers(config, file)
        refuse(override_reasons(overrides))
        served = _overridden(config, overrides)
        if overrides:
            check_fields(served, None)
        refuse(model_reasons(served), file=file)
        before = Architecture.from_hf_config(config, file=file)
        architecture = Architecture.from_hf_config(served, file=file) if overrides else before
        if "rope_parameters" in overrides:
            check_rope(architecture, None, place="--hf-overrides rope_parameters")
        else:
            check_rope(architecture, file)
        if not has_dummy_weights:
            refuse(_weight_reasons(config, served, before, architecture))
        text = text_config(served)
        dtypes = [part.get(name) for part in (text, served) for name in ("dtype", "torch_dtype")]
        return cls(
            served,
            architecture,
            str(text.get("model_type")),
            # in float16 some classes are not served, and float32 becomes bfloat16
            "bfloat16" if next(filter(None, dtypes), None) in ("bfloat16", "float32") else None,
            _max_length(folder, text, architecture),
        )

    def reasons(self, serving: Serving) -> list[Reason]:
        """Why vLLM refuses to serve the model as flags say.

        Args:
            serving: What they say; None where they say nothing.
        """
        reasons = []
        if serving.dtype == "float16" and self.model_type in _NO_FLOAT16:
            text = f"vLLM does not serve models of type {self.model_type} in it"
            reasons.append(Reason("--dtype float16", text, "Choose bfloat16"))
        longest, asked = self.max_length, serving.max_length
        if longest is not None and asked is not None and asked > longest and not os.environ.get(_ALLOW_LONGER):
            remedy = f"Give {longest} or less, or give rope_parameters for longer texts in --hf-overrides"
            reasons.append(Reason(f"--max-model-len {asked}", f"the model is made for {longest} tokens", remedy))
        return reasons

    def completed(self, serving: Serving) -> Serving:
        """How the model is served, with what follows from its config.json where flags say nothing."""
        return replace(serving, dtype=serving.dtype or self.dtype, max_length=serving.max_length or self.max_length)


def _weight_reasons(
    config: Mapping[str, Any], served: Mapping[str, Any], before: Architecture, after: Architecture
) -> list[Reason]:
    """Why weights would not fit what overrides make of a model; vLLM finds out when it loads them."""
    text, changed = text_config(config), text_config(served)
    pairs = {
        "num_hidden_layers": (before.num_layers, after.num_layers),
        "num_attention_heads": (before.num_heads, after.num_heads),
        "num_key_value_heads": (before.num_kv_heads, after.num_kv_heads),
        "head_dim": (before.head_size, after.head_size),
        **{
            field: (text.get(field), changed.get(field)) for field in ("hidden_size", "intermediate_size", "vocab_size")
        },
    }
    return [
        Reason(
            f"--hf-overrides {field} {now}",
            f"the weights are those of a model with {then}",
            "Leave it out, or make weights up with --load-format dummy",
        )
        for field, (then, now) in pairs.items()
        if now != then
    ]


def _max_length(folder: Path, text: Mapping[str, Any], architecture: Architecture) -> int | None:
    """Tokens of the longest sequence, as vLLM reckons; None where config.json does not say."""
    length = text.get("max_position_embeddings")
    if length is None:
        return None
    factors = [
        rope.get("factor", 1.0)
        for rope in rope_of_layers(architecture).values()
        if rope["rope_type"] not in _SCALED_ALREADY and "gemma3" not in str(text.get("model_type"))
    ]
    length = int(min(length * max(factors, default=1.0), MAX_TOKENS))
    # a file that is damaged is for those to name who need it
    with suppress(OSError, ValueError, AttributeError):
        limit = json.loads((folder / "tokenizer_config.json").read_text()).get("model_max_length")
        # tokenizers without a limit say 1e30
        length = int(min(length, limit)) if isinstance(limit, int | float) else length
    return length


def _overridden(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What vLLM makes of --hf-overrides: mappings change the configs within, and replace everything else.

    Raises:
        UnsupportedError: There is no such config.
    """
    changed = dict(config)
    for name, value in overrides.items():
        if isinstance(value, Mapping) and name.endswith(_NESTED) and name not in _NO_CONFIGS:
            inside = config.get(name)
            if not isinstance(inside, Mapping):
                refuse([Reason(f"--hf-overrides {name}", "the model's config.json has none", "Override what it has")])
            else:
                value = _overridden(inside, value)
        changed[name] = value
    return changed
