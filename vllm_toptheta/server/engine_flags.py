"""What vLLM's flags say of the engine and of how the model is read, as far as an answer of `--check` depends on it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_toptheta.server import flags
from vllm_toptheta.server.flags import Flag
from vllm_toptheta.store import Serving
from vllm_toptheta.support import (
    Connector,
    Device,
    Draft,
    Engine,
    drafts_on_v2,
    has_nixl,
    has_torchvision,
    splits_pages,
    wakes_up_whole,
)

_DTYPES = {"auto": None, "half": "float16", "float": "float32"}  # vLLM's other names
_LENGTH = re.compile(r"(\d+)([kKmM]?)")
_UNITS = {"": 1, "k": 1000, "K": 1 << 10, "m": 10**6, "M": 1 << 20}


@dataclass(frozen=True)
class EngineFlags:
    """What flags say.

    Attributes:
        revision: Of the hub's repository; None for its main branch.
        config_path: Where config.json lies instead.
        overrides: What is changed in config.json.
        has_dummy_weights: Whether the weights are made up.
        serving: How the model is served, for what was measured of it.
        engine: Of the engine, its device left out.
        limits: How many images and the like a prompt may hold, where flags say so.
        is_text_alone: Whether no prompt may hold any.
        takes_embeddings: Whether prompts may hold what an encoder made of them.
    """

    revision: str | None = None
    config_path: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    has_dummy_weights: bool = False
    serving: Serving = Serving()
    engine: Mapping[str, Any] = field(default_factory=dict)
    limits: Mapping[str, Any] = field(default_factory=dict)
    is_text_alone: bool = False
    takes_embeddings: bool = False

    @classmethod
    def read(cls, given: list[Flag]) -> EngineFlags:
        """Read vLLM's flags.

        Raises:
            SettingsError: One holds no number or no JSON object where it has to.
        """
        dtype = flags.value_of(given, "--dtype")
        dtype = None if dtype is None else _DTYPES.get(dtype, dtype)
        cache_dtype = flags.value_of(given, "--kv-cache-dtype")
        context_ranks = ("--decode-context-parallel-size", "-dcp"), ("--prefill-context-parallel-size", "-pcp")
        return cls(
            revision=flags.value_of(given, "--revision"),
            config_path=flags.value_of(given, "--hf-config-path"),
            overrides=flags.json_object(given, "--hf-overrides"),
            has_dummy_weights=flags.value_of(given, "--load-format") == "dummy",
            serving=Serving(
                dtype=dtype,
                quantization=flags.value_of(given, "--quantization", "-q"),
                cache_dtype=cache_dtype,
                max_length=_length(flags.value_of(given, "--max-model-len")),
            ),
            engine={
                "cache_dtype": cache_dtype or "auto",
                "dtype": dtype,
                "block_size": flags.integer(given, "--block-size"),
                "num_ranks": 1 if (ranks := flags.integer(given, "--tensor-parallel-size", "-tp")) is None else ranks,
                "num_context_ranks": max(flags.integer(given, *names) or 1 for names in context_ranks),
                "generates": flags.value_of(given, "--runner") in (None, "auto", "generate")
                and flags.value_of(given, "--convert") in (None, "auto", "none"),
                "connector": Connector.of(
                    flags.json_object(given, "--kv-transfer-config"),
                    offloads=flags.find(given, "--kv-offloading-size") is not None,
                    offloading_backend=flags.value_of(given, "--kv-offloading-backend"),
                ),
                "skips_rows": flags.is_on(given, "--kv-sharing-fast-prefill"),
                "caches_prefixes": flags.is_on(given, "--enable-prefix-caching", by_itself=True),
                "sleeps": flags.is_on(given, "--enable-sleep-mode"),
                "draft": Draft.of(_draft_fields(given)),
                "num_stages": flags.integer(given, "--pipeline-parallel-size", "-pp") or 1,
                "adapts": flags.is_on(given, "--enable-lora"),
                "num_replicas": flags.integer(given, "--data-parallel-size", "-dp") or 1,
            },
            limits=flags.json_object(given, "--limit-mm-per-prompt"),
            is_text_alone=flags.is_on(given, "--language-model-only"),
            takes_embeddings=flags.is_on(given, "--enable-mm-embeds"),
        )

    def leaves_out(self, modalities: Iterable[str]) -> bool:
        """Whether no prompt can hold any of these."""
        counts = (self.limits.get(modality) for modality in modalities)
        are_none = all((count.get("count") if isinstance(count, Mapping) else count) == 0 for count in counts)
        return (self.is_text_alone or are_none) and not self.takes_embeddings

    def on(self, device: Device, *, drafts_itself: bool = False) -> Engine:
        """The engine on a device."""
        return Engine(
            device=device,
            drafts_itself=drafts_itself,
            runs_on_v2=drafts_on_v2() and os.environ.get("VLLM_USE_V2_MODEL_RUNNER") != "0",
            wakes_up_whole=wakes_up_whole(),
            splits_pages=splits_pages(),
            has_nixl=has_nixl(),
            has_torchvision=has_torchvision(),
            **self.engine,
        )


def _draft_fields(given: list[Flag]) -> dict[str, Any]:
    """Fields of vLLM's speculative configuration."""
    config = flags.json_object(given, "--speculative-config", "-sc")
    named = {name: flags.value_of(given, f"--spec-{name}") for name in ("method", "model")}
    return {**config, **{name: value for name, value in named.items() if value is not None}}


def _length(value: str | None) -> int | None:
    """Tokens; None where vLLM decides, or cannot read it."""
    found = _LENGTH.fullmatch(value or "")
    return int(found[1]) * _UNITS[found[2]] if found else None
