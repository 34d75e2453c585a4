"""Which layers of a model are ours, and which of them write the tails of pages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.model_executor.models.utils import extract_layer_index

from vllm_toptheta.backend.capabilities import NAME


def our_impls(vllm_config: Any) -> list[Any]:
    """The implementations of this rank's TOPTHETA layers."""
    layers = vllm_config.compilation_config.static_forward_context.values()
    return [layer.impl for layer in layers if getattr(layer, "backend", None) and layer.backend.name == NAME]


def choose_tail_writers(layers: Mapping[str, Any]) -> None:
    """Have the first sparse layer on some pages write their tails, which others that read the pages then find written.

    A tail depends on keys and values alone, and a layer whose pages are shared may be dense, and so know no tails.

    Args:
        layers: vLLM's attention layers by name, with ours bound.
    """
    written = set()
    for name in sorted(layers, key=extract_layer_index):
        layer = layers[name]
        pages = getattr(layer, "kv_sharing_target_layer_name", None) or name
        if getattr(layer.impl, "layer_plan", None) is not None:
            layer.impl.writes_tails = pages not in written
            written.add(pages)
