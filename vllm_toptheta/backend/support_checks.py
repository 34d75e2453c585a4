"""What the backend refuses at start-up: better no server than a wrong answer.

What is refused, and why, stands in `vllm_toptheta.support`; here is what vLLM's configuration says of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vllm
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform

from vllm_toptheta.backend.capabilities import NAME
from vllm_toptheta.backend.pages import tokens_of_row
from vllm_toptheta.backend.versions import check_version
from vllm_toptheta.settings import Settings
from vllm_toptheta.store import Architecture
from vllm_toptheta.support import (
    CHUNKED,
    KV_SHARING,
    MLA,
    NOT_THIS_HYBRID,
    Connector,
    Draft,
    Engine,
    Reason,
    engine_reasons,
    has_nixl,
    has_torchvision,
    hybrid_type,
    image_modalities,
    image_reason,
    kernel_reasons,
    model_reasons,
    override_reasons,
    refuse,
    sharing_field,
    splits_pages,
    wakes_up_whole,
)

if TYPE_CHECKING:
    from vllm.v1.attention.backend import AttentionBackend

    from vllm_toptheta.backend.plan import Plan


def is_selected(vllm_config: Any) -> bool:
    """Whether any layer kind of `vllm_config` is to run on our backend."""
    backends = (vllm_config.attention_config.backend, *_kinds(vllm_config).values())
    return vllm_config.model_config is not None and any(getattr(one, "name", None) == NAME for one in backends)


def _kinds(vllm_config: Any) -> Mapping[str, Any]:
    """Backends of some kinds of layers."""
    return getattr(vllm_config.attention_config, "backend_per_kind", None) or {}


def check_engine(vllm_config: Any) -> None:
    """Refuse models and features of the engine that would break the page tails or bypass the thresholds.

    Raises:
        UnsupportedError: Names every field or flag concerned.
    """
    check_version(vllm.__version__)
    model = vllm_config.model_config
    # what a class is for its makers, whatever its fields say
    of_class = {
        Reason("architectures", MLA): model.use_mla,
        Reason("architectures", NOT_THIS_HYBRID): (
            model.is_attention_free or (model.is_hybrid and hybrid_type(model.hf_text_config.to_dict()) is None)
        ),
    }
    config = {**model.hf_config.to_dict(), "text_config": model.hf_text_config.to_dict()}
    refuse(
        model_reasons(config) or [reason for reason, applies in of_class.items() if applies],
        file=_file(model),
    )
    if model.is_mm_prefix_lm:
        refuse([image_reason(image_modalities(config) or ("image",))])
    overrides = getattr(model, "hf_overrides", None)
    of_flags = override_reasons(overrides) if isinstance(overrides, Mapping) else []
    refuse([*of_flags, *engine_reasons(_engine(vllm_config))])


def check_plan(plan: Plan, vllm_config: Any) -> None:
    """Refuse a plan that the platform has no kernels for, or not with this engine.

    Raises:
        UnsupportedError: Says what there are kernels for.
    """
    heads = plan.architecture
    refuse(
        kernel_reasons(
            _engine(vllm_config),
            head_size=heads.head_size,
            num_heads=heads.num_heads,
            num_kv_heads=heads.num_kv_heads,
            mode=plan.settings.mode,
            is_sparse=plan.thresholds is not None,
            has_copies=plan.heavy is not None,
        )
    )


def check_no_chunks(layers: Mapping[str, Any]) -> None:
    """Refuse layers that attend within chunks, also those of a model whose config.json does not say so.

    vLLM hands each chunk to a backend as a sequence of its own. Thresholds would go by the length of the chunk, and a
    page's tail would hold sums over more than that.

    Args:
        layers: vLLM's attention layers by name.

    Raises:
        UnsupportedError: Names the first of them.
    """
    for name, layer in layers.items():
        if getattr(layer, "attention_chunk_size", None):
            refuse([Reason(f"layer {name}", CHUNKED, "Serve this model without --attention-backend toptheta")])


def check_no_draft(layer: Any, vllm_config: Any) -> None:
    """Refuse thresholds in a layer that drafts: they would be those of a layer of the served model.

    Args:
        layer: One of vLLM's attention layers with our backend.
        vllm_config: The engine's.

    Raises:
        UnsupportedError: It drafts.
    """
    speculative = vllm_config.speculative_config
    if speculative is None:
        return
    name, served = layer.layer_name, Architecture.from_hf_config(vllm_config.model_config.hf_text_config.to_dict())
    is_draft = getattr(layer, "is_draft_layer", False) or name.startswith("draft_model.")
    if is_draft or extract_layer_index(name) >= served.num_layers:
        why = "it drafts, and layers that draft have no thresholds"
        remedy = "Give attention_backend in --speculative-config, or leave that out"
        refuse([Reason(f"layer {name}", why, remedy)])


def check_sharing(layers: Mapping[str, Any], vllm_config: Any) -> None:
    """Refuse layers that read the keys and values of others in a model that is not known for it.

    Args:
        layers: vLLM's attention layers by name.
        vllm_config: The engine's.

    Raises:
        UnsupportedError: Names the first of them.
    """
    sharing = [name for name, layer in layers.items() if getattr(layer, "kv_sharing_target_layer_name", None)]
    if sharing and sharing_field(vllm_config.model_config.hf_text_config.to_dict()) is None:
        refuse([Reason(f"layer {sharing[0]}", KV_SHARING, "Serve this model without --attention-backend toptheta")])


def check_split(spec: Any) -> None:
    """Refuse long pages that vLLM does not split as their rows of sums ask for.

    Args:
        spec: Of the pages that a backend gets.

    Raises:
        UnsupportedError: It leaves them whole.
    """
    if tokens_of_row(spec) not in (None, spec.block_size):
        why = "layouts with several layers in a block leave pages whole that are too long for kernels"
        refuse([Reason("VLLM_KV_CACHE_LAYOUT", why, "Leave it out, or take LBNHC")])


def check_layer(backend: type[AttentionBackend], attn_selector_config: Any) -> None:
    """Refuse what one attention layer asks for, by the backend's own declarations.

    vLLM's GPU platforms make this check themselves; its CPU platform does not.

    Args:
        backend: Ours for the platform.
        attn_selector_config: vLLM's `AttentionSelectorConfig` of the layer.

    Raises:
        UnsupportedError: Names every reason.
    """
    reasons = backend.validate_configuration(device_capability=None, **attn_selector_config._asdict())
    refuse([Reason("attention layer", reason) for reason in reasons])


def _engine(vllm_config: Any) -> Engine:
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    speculative = vllm_config.speculative_config
    settings = Settings.of_engine(vllm_config)
    drafts_itself = settings.lossless
    # as `hooks.self_drafts` has made it
    is_own = drafts_itself and speculative is not None and speculative.model == model.model
    return Engine(
        device="cpu" if current_platform.is_cpu() else "gpu",
        cache_dtype=cache.cache_dtype,
        dtype=str(model.dtype).removeprefix("torch."),
        block_size=cache.block_size,
        caches_prefixes=bool(cache.enable_prefix_caching),
        skips_rows=bool(cache.kv_sharing_fast_prefill),
        num_ranks=parallel.tensor_parallel_size,
        num_context_ranks=max(parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size),
        generates=model.runner_type == "generate",
        connector=connector_of(vllm_config),
        sleeps=model.enable_sleep_mode,
        wakes_up_whole=wakes_up_whole(),
        splits_pages=splits_pages(),
        has_nixl=has_nixl(),
        has_torchvision=has_torchvision(),
        draft=None if is_own else draft_of(vllm_config),
        drafts_itself=drafts_itself,
        num_stages=parallel.pipeline_parallel_size,
        adapts=vllm_config.lora_config is not None,
        num_replicas=parallel.data_parallel_size,
        runs_on_v2=speculative is None or vllm_config.use_v2_model_runner,
        sees=model.is_multimodal_model,
    ).of_checkpoint(model.hf_config.to_dict())


def draft_of(vllm_config: Any) -> Draft | None:
    """What guesses tokens, as vLLM's configuration says; None where nothing does."""
    speculative = vllm_config.speculative_config
    draft = Draft.of({} if speculative is None else vars(speculative))
    if draft is None or speculative.draft_model_config is None or not draft.is_by_model:
        return draft
    if any(getattr(one, "name", None) == NAME for one in _kinds(vllm_config).values()):
        draft = replace(draft, backend=NAME)  # layers that draft inherit those
    if draft.method == "mtp":
        return draft  # its layers are those of the served model, whose config says of which kind
    return draft.of_checkpoint(speculative.draft_model_config.hf_config.to_dict())


def connector_of(vllm_config: Any) -> Connector | None:
    """What copies pages out of an engine and into it, as vLLM's configuration says; None where nothing does."""
    transfer, cache = vllm_config.kv_transfer_config, vllm_config.cache_config
    # vLLM makes a connector of the size only when the configuration has been checked
    return Connector.of(
        {} if transfer is None else vars(transfer),
        offloads=getattr(cache, "kv_offloading_size", None) is not None,
        offloading_backend=getattr(cache, "kv_offloading_backend", None),
    )


def _file(model_config: Any) -> Path | None:
    """The config.json whose fields are named; None where it is not one on this machine."""
    file = Path(getattr(model_config, "hf_config_path", None) or model_config.model, "config.json")
    return file if file.is_file() else None
