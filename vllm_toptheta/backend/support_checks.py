"""What the backend refuses at start-up, and why: better no server than a wrong answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import vllm
from vllm.platforms import current_platform

from vllm_toptheta.backend.capabilities import CACHE_DTYPES, FLOAT8_CACHE_DTYPES, NAME
from vllm_toptheta.backend.versions import check_version
from vllm_toptheta.errors import UnsupportedError
from vllm_toptheta.limits import gpus_lack
from vllm_toptheta.settings import Settings
from vllm_toptheta.store import Architecture

if TYPE_CHECKING:
    from vllm.v1.attention.backend import AttentionBackend

MODELLESS_DRAFTS = ("ngram", "ngram_gpu", "suffix")  # guess tokens from the text itself
_REMEDY = "Remove --attention-backend toptheta, or what is named here"


def is_selected(vllm_config: Any) -> bool:
    """Whether any layer kind of `vllm_config` is to run on our backend."""
    config = vllm_config.attention_config
    backends = (config.backend, *(getattr(config, "backend_per_kind", None) or {}).values())
    return vllm_config.model_config is not None and any(getattr(one, "name", None) == NAME for one in backends)


def check_engine(vllm_config: Any) -> None:
    """Refuse features of the engine that would break the page tails or bypass the thresholds.

    Raises:
        UnsupportedError: Names every feature concerned.
    """
    check_version(vllm.__version__)
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    speculative = vllm_config.speculative_config
    dtypes = (*CACHE_DTYPES, *FLOAT8_CACHE_DTYPES) if current_platform.is_cuda() else CACHE_DTYPES
    reasons = {
        "multi-head latent attention (MLA) has no per-head values to skip": model.use_mla,
        "hybrid state-space models have pages of their own": model.is_hybrid or model.is_attention_free,
        "encoder-decoder models are not supported": model.is_encoder_decoder,
        "only generation is supported, not pooling": model.runner_type != "generate",
        f"--kv-cache-dtype {cache.cache_dtype} is not supported, only {', '.join(dtypes)}": (
            cache.cache_dtype not in dtypes
        ),
        "KV connectors and offloading move pages without their tails": vllm_config.kv_transfer_config is not None,
        "--enable-sleep-mode frees the thresholds together with the KV cache": model.enable_sleep_mode,
        f"speculative decoding is supported with {' and '.join(MODELLESS_DRAFTS)} only; other methods have layers of "
        "their own, for which there are no thresholds": (
            speculative is not None and speculative.method not in MODELLESS_DRAFTS
        ),
        "context parallelism splits a sequence's scores over ranks": (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1
        ),
    }
    _refuse([reason for reason, applies in reasons.items() if applies])


def check_settings(settings: Settings, vllm_config: Any) -> None:
    """Refuse options that the platform's backend does not have, or not with this engine.

    Raises:
        UnsupportedError: Names the option.
    """
    cache_dtype = vllm_config.cache_config.cache_dtype
    if settings.mode == "shadow" and cache_dtype in FLOAT8_CACHE_DTYPES:
        raise UnsupportedError(
            f"mode shadow is not supported with --kv-cache-dtype {cache_dtype}, only with 16-bit keys and values",
            field="mode",
            remedy="Leave --kv-cache-dtype out, or serve in mode values",
        )


def check_kernels(architecture: Architecture, *, has_copies: bool = False) -> None:
    """Refuse thresholds for a model that the platform has no decode kernels for.

    Args:
        architecture: The model's heads over all ranks.
        has_copies: Whether there are copies of keys and values.

    Raises:
        UnsupportedError: Says what GPUs do have kernels for.
    """
    heads = architecture.head_size, architecture.num_heads, architecture.num_kv_heads
    missing = gpus_lack(*heads, has_copies=has_copies)
    if missing and not current_platform.is_cpu():
        remedy = _REMEDY if gpus_lack(*heads) else "Serve in mode values, or with shadow_values off"
        raise UnsupportedError(f"attention backend toptheta: {missing}", remedy=remedy)


def check_layer(backend: type[AttentionBackend], attn_selector_config: Any) -> None:
    """Refuse what one attention layer asks for, by the backend's own declarations.

    vLLM's GPU platforms make this check themselves; its CPU platform does not.

    Args:
        backend: Ours for the platform.
        attn_selector_config: vLLM's `AttentionSelectorConfig` of the layer.

    Raises:
        UnsupportedError: Names every reason.
    """
    _refuse(backend.validate_configuration(device_capability=None, **attn_selector_config._asdict()))


def _refuse(reasons: list[str]) -> None:
    if reasons:
        raise UnsupportedError(f"attention backend toptheta: {'; '.join(reasons)}", remedy=_REMEDY)
