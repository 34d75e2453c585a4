"""Has NIXL pass whole pages from engine to engine, with what they are padded with.

Replaces `NixlBaseConnector.register_kv_caches` (0.26 to 0.33), by which vLLM shows an engine's pages to NIXL. vLLM goes
by the length of a page with its padding there, and stops at views that leave the padding out; a view of ours has to,
because kernels find keys and values by its shape. Tails that arrive are made again all the same: whoever sent them may
have other options, or write none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vllm_toptheta.backend.hooks.patch import replace


def install() -> None:
    """Widen what NIXL is shown; called where metadata builders are made, before vLLM shows it."""
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import NixlBaseConnector

    replace(NixlBaseConnector, "register_kv_caches", _widening)


def _widening(register: Callable[..., Any]) -> Callable[..., Any]:
    def register_whole_pages(connector: Any, kv_caches: dict[str, torch.Tensor]) -> None:
        register(connector, {name: _whole_pages(kv_cache) for name, kv_cache in kv_caches.items()})

    return register_whole_pages


def _whole_pages(kv_cache: torch.Tensor) -> torch.Tensor:
    """The same pages with all that lies between the start of one and that of the next: [B, 1, 1, page]."""
    length = kv_cache.stride(0)
    return kv_cache.as_strided((len(kv_cache), 1, 1, length), (length, length, length, 1))
