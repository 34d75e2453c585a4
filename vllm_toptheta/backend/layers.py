"""Which layers of a model are ours."""

from __future__ import annotations

from typing import Any

from vllm_toptheta.backend.capabilities import NAME


def our_impls(vllm_config: Any) -> list[Any]:
    """The implementations of this rank's TOPTHETA layers."""
    layers = vllm_config.compilation_config.static_forward_context.values()
    return [layer.impl for layer in layers if getattr(layer, "backend", None) and layer.backend.name == NAME]
