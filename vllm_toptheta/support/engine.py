"""Which engines are served on which device, and which models there are kernels for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from vllm_toptheta.limits import (
    BLOCK_MULTIPLE,
    CACHE_DTYPES,
    COPY_MULTIPLE,
    FLOAT8_CACHE_DTYPES,
    HEAD_SIZES,
    gpus_lack,
)
from vllm_toptheta.support.connectors import Connector
from vllm_toptheta.support.hybrids import NEED_TORCHVISION, STATES, hybrid_type
from vllm_toptheta.support.model import (
    NO_GENERATION,
    checkpoint_cache_dtype,
    mixed_field,
    sharing_field,
    sinks_field,
    text_config,
    window_head_size,
)
from vllm_toptheta.support.refusal import WITHOUT_US, Reason
from vllm_toptheta.support.speculation import PAGE_MULTIPLE, Draft

Device = Literal["cpu", "gpu"]
_NEWER = "Install vLLM 0.32 or 0.33"
_WITHOUT_COPIES = "Serve in mode values, or with shadow_values off"


@dataclass(frozen=True)
class Engine:
    """What is asked of an engine.

    Attributes:
        device: What it runs on.
        cache_dtype: Of the KV cache, as vLLM names it; auto where neither a flag nor the checkpoint says which.
        cache_dtype_of: The flag or the field that says so.
        dtype: Of weights and activations, as torch names it; None where vLLM chooses.
        block_size: Tokens of a page; None where vLLM chooses.
        num_ranks: GPUs or processes that share a layer's heads.
        num_context_ranks: Those that share a sequence.
        generates: Whether it generates text.
        connector: What copies pages out of it and into it; None where nothing does.
        sleeps: Whether it can give its memory back.
        wakes_up_whole: Whether it then gets back what an attention backend keeps there (`installed.wakes_up_whole`).
        draft: What guesses tokens; None where nothing does, or the served model by thresholds.
        drafts_itself: Whether the served model drafts.
        num_stages: Ranks that share the layers.
        adapts: Whether it loads adapters.
        num_replicas: Ranks that share the requests.
        runs_on_v2: Whether its model runner is vLLM's V2, and that drafts by models (`installed.drafts_on_v2`).
        sees: Whether the model takes images or sounds.
        sinks: What of config.json says that its layers have attention sinks; None where nothing does.
        hybrid: The model_type of a model some of whose layers keep states (`hybrids.STATES`); None of others.
        sharing: What of config.json says that layers read the keys and values of others; None where nothing does.
        mixed: What of config.json says that layers with a window have other heads than the rest; None of most models.
        window_head_size: Numbers of a key there; None likewise.
        skips_rows: Whether prompts leave out rows of layers that share.
        caches_prefixes: Whether what prompts have in common is computed once.
        splits_pages: Whether vLLM can split pages that are as long as states (`installed.splits_pages`). Such a
            version is also new enough for drafts by models, and for layers that share or differ, on GPUs.
        has_nixl: Whether the package nixl is installed (`installed.has_nixl`).
        has_torchvision: Whether vLLM can import models that need it (`installed.has_torchvision`).
    """

    device: Device
    cache_dtype: str = "auto"
    cache_dtype_of: str = "--kv-cache-dtype"
    dtype: str | None = None
    block_size: int | None = None
    num_ranks: int = 1
    num_context_ranks: int = 1
    generates: bool = True
    connector: Connector | None = None
    sleeps: bool = False
    wakes_up_whole: bool = True
    draft: Draft | None = None
    drafts_itself: bool = False
    num_stages: int = 1
    adapts: bool = False
    num_replicas: int = 1
    runs_on_v2: bool = True
    sees: bool = False
    sinks: str | None = None
    hybrid: str | None = None
    sharing: str | None = None
    mixed: str | None = None
    window_head_size: int | None = None
    skips_rows: bool = False
    caches_prefixes: bool = True
    splits_pages: bool = True
    has_nixl: bool = True
    has_torchvision: bool = True

    def of_checkpoint(self, config: Mapping[str, Any]) -> Engine:
        """The same, with what a checkpoint says: what it takes, and the KV cache's dtype where no flag names one.

        Args:
            config: The model's config.json as a dict. Of any content.
        """
        sees = self.sees or any(config.get(name) for name in ("vision_config", "audio_config"))
        engine = replace(
            self,
            sees=sees,
            sinks=sinks_field(config),
            hybrid=hybrid_type(text_config(config)),
            sharing=sharing_field(config),
            mixed=mixed_field(config),
            window_head_size=window_head_size(config),
            draft=None if self.draft is None else self.draft.of_target(config),
        )
        found = checkpoint_cache_dtype(config)
        if found is None or self.cache_dtype != "auto":
            return engine
        return replace(engine, cache_dtype=found, cache_dtype_of="quantization_config")

    @property
    def cache_dtypes(self) -> tuple[str, ...]:
        """Those that the device's kernels read."""
        return (*CACHE_DTYPES, *FLOAT8_CACHE_DTYPES) if self.device == "gpu" else CACHE_DTYPES


def engine_reasons(engine: Engine) -> list[Reason]:
    """Why an engine is not served: it would break the page tails, or bypass the thresholds."""
    dtypes = ", ".join(engine.cache_dtypes)
    block_size = engine.block_size
    checks = {
        Reason("--runner, --convert", NO_GENERATION): not engine.generates,
        Reason(
            f"{engine.cache_dtype_of} {engine.cache_dtype}",
            f"not supported, only {dtypes}",
            "Give --kv-cache-dtype bfloat16, or leave it out where config.json says nothing else",
        ): engine.cache_dtype not in engine.cache_dtypes,
        Reason(f"--block-size {block_size}", f"not supported, only multiples of {BLOCK_MULTIPLE}"): (
            block_size is not None and (block_size < 1 or block_size % BLOCK_MULTIPLE != 0)
        ),
        Reason("--dtype float32", "GPUs take bfloat16 and float16"): engine.device == "gpu"
        and engine.dtype == "float32",
        Reason("--enable-sleep-mode", "vLLM has no sleep mode on CPUs", "Leave it out"): engine.sleeps
        and engine.device == "cpu",
        Reason(
            "--enable-sleep-mode",
            "this vLLM throws the thresholds away together with the KV cache, and does not get them back",
            "Leave it out, or install vLLM 0.32 or 0.33, which keep them",
        ): engine.sleeps and engine.device == "gpu" and not engine.wakes_up_whole,
        Reason(str(engine.sinks), "FlashAttention takes attention sinks in bfloat16 only", "Give --dtype bfloat16"): (
            engine.sinks is not None and engine.device == "gpu" and engine.dtype == "float16"
        ),
        Reason(
            "--decode-context-parallel-size, --prefill-context-parallel-size",
            "context parallelism splits a sequence's scores over ranks",
        ): engine.num_context_ranks > 1,
        Reason(
            "--kv-sharing-fast-prefill",
            "steps of layers that leave out rows of prompts were never tried",
            "Leave it out",
        ): engine.skips_rows,
        Reason(
            f"--tensor-parallel-size {engine.num_ranks}",
            "layers that share keys and values were never run on several ranks",
            "Give 1",
        ): engine.sharing is not None and engine.num_ranks > 1,
        Reason(
            f"head_dim {engine.window_head_size}",
            f"on GPUs, layers with a window have heads of {', '.join(map(str, HEAD_SIZES))} only",
            WITHOUT_US,
        ): engine.device == "gpu" and engine.window_head_size not in (None, *HEAD_SIZES),
        Reason(
            str(engine.sharing or engine.mixed),
            "GPUs have run layers that share keys and values, or differ in heads, with newer versions of vLLM only",
            _NEWER,
        ): (engine.sharing or engine.mixed) is not None and engine.device == "gpu" and not engine.splits_pages,
    }
    checks |= {**_hybrid_reasons(engine), **_connector_reasons(engine)}
    checks |= {**_draft_reasons(engine), **_drafting_reasons(engine)}
    return [reason for reason, applies in checks.items() if applies]


def _hybrid_reasons(engine: Engine) -> dict[Reason, bool]:
    """Why a model is not served some of whose layers keep states, and whether that is so."""
    model_type = f"model_type {engine.hybrid}"
    on_cpu, state = engine.device == "cpu", STATES.get(str(engine.hybrid))
    on_gpu = state is not None and not on_cpu
    return {
        Reason(
            model_type,
            "this vLLM cannot split its pages, which are as long as states and too long for kernels of GPUs",
            _NEWER,
        ): on_gpu and not engine.splits_pages,
        Reason(
            f"{engine.cache_dtype_of} {engine.cache_dtype}",
            f"pages of a {engine.hybrid} have room for sums of 16-bit values only",
            "Give --kv-cache-dtype bfloat16",
        ): on_gpu and engine.cache_dtype in FLOAT8_CACHE_DTYPES,
        Reason(
            "--enable-prefix-caching",
            f"on CPUs, vLLM does not keep the states of a {engine.hybrid} within a prompt as they were",
            "Give --no-enable-prefix-caching",
        ): state == "mamba2" and on_cpu and engine.caches_prefixes,
        Reason(
            model_type,
            "vLLM cannot import it without torchvision, which is not installed",
            "Install a torchvision that was built for the installed torch",
        ): engine.hybrid in NEED_TORCHVISION and on_cpu and not engine.has_torchvision,
        Reason(model_type, "on CPUs, vLLM's answers depend on where a prompt is divided into steps", WITHOUT_US): (
            state == "conv" and on_cpu
        ),
        Reason(
            f"--dtype {engine.dtype}", f"on CPUs, vLLM computes a {engine.hybrid} in bfloat16 only", "Choose bfloat16"
        ): state == "delta" and on_cpu and engine.dtype in ("float16", "float32"),
        Reason("--speculative-config", "drafts were never tried where a draft that is refused leaves states behind"): (
            state is not None and engine.draft is not None
        ),
        Reason("lossless", "drafts would change the states that answers are made of"): (
            state is not None and engine.drafts_itself
        ),
    }


def _connector_reasons(engine: Engine) -> dict[Reason, bool]:
    """Why no connector can copy pages out of an engine and into it, or not this one, and whether that is so."""
    connector = engine.connector
    if connector is None:
        return {}
    on_cpu, flag = engine.device == "cpu", connector.flag
    on_gpu = connector.stays_on_the_host and not on_cpu
    return {
        Reason(
            flag,
            "vLLM offloads pages from GPUs to the host, and has nothing to copy them with on CPUs",
            "Leave it out, and raise VLLM_CPU_KVCACHE_SPACE, which takes the same memory",
        ): on_cpu and connector.needs_gpus,
        Reason(
            flag,
            "only ExampleConnector, NixlConnector, and OffloadingConnector with a spec of CPUs were run on them",
            "Take one of these, or leave it out",
        ): on_cpu and not (connector.needs_gpus or connector.was_run_on_cpus),
        Reason(flag, "the package nixl is not installed", "Install it (pip install nixl), or leave this out"): (
            on_cpu and connector.is_nixl and not engine.has_nixl
        ),
        Reason(
            flag,
            "on GPUs it brings pages without the sums of values that belong to them, or from engines that write none",
            "Leave it out, or offload to the host by --kv-offloading-size",
        ): not (on_cpu or on_gpu),
        Reason(flag, "this vLLM has no pages with rows for sums of values", _NEWER): (
            on_gpu and not engine.splits_pages
        ),
        Reason(
            f"{engine.cache_dtype_of} {engine.cache_dtype}",
            "pages that a connector copies have room for sums of 16-bit values only",
            "Give --kv-cache-dtype bfloat16",
        ): on_gpu and engine.cache_dtype in FLOAT8_CACHE_DTYPES,
        Reason(
            flag,
            "connectors were never run with layers that keep states, share keys and values, or have heads of their own",
            "Leave it out",
        ): any(field is not None for field in (engine.hybrid, engine.sharing, engine.mixed)),
        Reason(flag, "connectors other than NIXL were never run on several ranks", "Leave it out"): (
            engine.num_ranks > 1 and not (on_cpu and connector.is_nixl)
        ),
        Reason(flag, "connectors were never run on several stages or replicas", "Leave it out"): (
            engine.num_stages > 1 or engine.num_replicas > 1
        ),
        Reason(flag, "connectors were never run where tokens are drafted", "Leave it out"): (
            engine.draft is not None or engine.drafts_itself
        ),
        Reason(flag, "pages that arrive do not say which adapter they were computed with", "Leave it out"): (
            engine.adapts
        ),
    }


def _draft_reasons(engine: Engine) -> dict[Reason, bool]:
    """Why no model can draft in an engine, or not this one, and whether that is so."""
    draft = engine.draft
    if draft is None or not draft.is_by_model:
        return {}
    on_cpu, flag = engine.device == "cpu", draft.flag
    return draft.reasons(on_cpu=on_cpu, runs_on_v2=engine.runs_on_v2) | {
        Reason(
            f"--block-size {engine.block_size}",
            f"layers that draft have vLLM's own attention, on CPUs in pages of multiples of {PAGE_MULTIPLE}",
            f"Give a multiple of {PAGE_MULTIPLE}, or leave it out",
        ): on_cpu and engine.block_size is not None and engine.block_size % PAGE_MULTIPLE != 0,
        Reason(flag, "on GPUs models have drafted with newer versions of vLLM only", f"{_NEWER}, or leave it out"): (
            not on_cpu and not engine.splits_pages
        ),
        Reason(flag, "models have not drafted yet beside layers that share keys and values, or differ in heads"): (
            engine.sharing is not None or engine.mixed is not None
        ),
        Reason(flag, "models have not drafted yet for one that takes images or sounds"): engine.sees,
        Reason(flag, "models have not drafted yet on several ranks"): (
            max(engine.num_ranks, engine.num_stages, engine.num_replicas) > 1
        ),
        Reason("--enable-lora", "models have not drafted yet for one with adapters"): engine.adapts,
        Reason("--enable-sleep-mode", "models have not drafted yet in an engine that slept"): engine.sleeps,
    }


def _drafting_reasons(engine: Engine) -> dict[Reason, bool]:
    """Why the served model cannot draft for itself, and whether that is so."""
    drafts = engine.drafts_itself
    on_gpu = drafts and engine.device == "gpu"
    return {
        Reason(
            "lossless",
            "on GPUs the served model drafts in vLLM's V2 model runner, which can since 0.32",
            "Leave it out, or install vLLM 0.32 or later and unset VLLM_USE_V2_MODEL_RUNNER",
        ): on_gpu and not engine.runs_on_v2,
        Reason("lossless", "on GPUs, models that take images or sounds do not draft for themselves", "Leave it out"): (
            on_gpu and engine.sees
        ),
        Reason("lossless", "on GPUs, layers that share keys and values, or differ in heads, never drafted"): (
            on_gpu and (engine.sharing or engine.mixed) is not None
        ),
        Reason("--enable-sleep-mode", "lossless drafts were never tried in an engine that slept"): drafts
        and engine.sleeps,
        Reason("--data-parallel-size", "lossless drafts were never tried on ranks that wait for each other"): on_gpu
        and engine.num_replicas > 1,
        Reason(
            "lossless",
            f"the served model drafts, and so does --speculative-config {engine.draft and engine.draft.method}",
        ): drafts and engine.draft is not None,
        Reason("--pipeline-parallel-size", "lossless drafts need all layers on each rank"): drafts
        and engine.num_stages > 1,
        Reason("--enable-lora", "lossless drafts do not know which adapter a request has"): drafts and engine.adapts,
    }


def kernel_reasons(
    engine: Engine,
    *,
    head_size: int,
    num_heads: int,
    num_kv_heads: int,
    mode: str,
    is_sparse: bool,
    has_copies: bool,
) -> list[Reason]:
    """Why a model is not served by an engine: there are no kernels for its heads, or for what the mode stores.

    Args:
        engine: What is asked of the engine.
        head_size: Numbers of a key or a value.
        num_heads: Query heads of a layer, over all ranks.
        num_kv_heads: Key and value heads of a layer, over all ranks.
        mode: `values` or `shadow`.
        is_sparse: Whether there are thresholds; without, every layer runs dense.
        has_copies: Whether there are copies of keys and values.
    """
    reasons = []
    ranks = engine.num_ranks
    if ranks < 1 or num_heads % ranks or (num_kv_heads % ranks and ranks % num_kv_heads):
        remedy = "Choose a number of ranks that divides both"
        text = f"ranks cannot share {num_heads} query heads on {num_kv_heads} kv heads evenly"
        reasons.append(Reason(f"--tensor-parallel-size {ranks}", text, remedy))
    if mode == "shadow" and engine.device == "gpu" and (engine.hybrid or engine.connector) is not None:
        pages = f"pages of a {engine.hybrid}" if engine.hybrid is not None else "pages that a connector copies"
        text = f"on GPUs, {pages} have no room for shadow keys or copies"
        reasons.append(Reason("mode shadow", text, "Serve in mode values"))
    if mode == "shadow" and is_sparse and not has_copies and engine.sharing is not None:
        text = "layers that share keys have calibrated shadow keys of their own, and a page has room for one layer's"
        reasons.append(Reason(engine.sharing, text, "Serve in mode values, or with shadow_values on"))
    if has_copies and head_size % COPY_MULTIPLE:
        text = f"there are no copies of heads of {head_size}, only of multiples of {COPY_MULTIPLE}"
        reasons.append(Reason(f"head_dim {head_size}", text, _WITHOUT_COPIES))
    elif engine.device == "gpu":
        if is_sparse:
            heads = head_size, num_heads, num_kv_heads
            lacking, of_copies = gpus_lack(*heads, has_copies=has_copies), not gpus_lack(*heads)
        else:
            # pages and dense layers are FlashAttention's, and its groups are of any size
            lacking, of_copies = gpus_lack(head_size, 1, 1), False
        if lacking:
            field = "num_attention_heads" if head_size in HEAD_SIZES and not of_copies else f"head_dim {head_size}"
            reasons.append(Reason(field, lacking, _WITHOUT_COPIES if of_copies else None))
    return reasons
