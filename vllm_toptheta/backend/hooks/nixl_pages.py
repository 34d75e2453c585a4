"""Has NIXL pass keys and values from engine to engine, and leave out the tails behind them.

Replaces `NixlBaseConnector.register_kv_caches` (0.26 to 0.33), by which vLLM shows an engine's pages to NIXL. vLLM goes
by the length of a page with its padding there. Whoever sent a tail may have other options, or write none, so tails are
made again in any case; and without them the parts of a page that belong to a kv head stand one behind the other, as
vLLM expects where the two engines have different numbers of ranks.

Also replaces `NixlBaseConnectorWorker._validate_remote_agent_handshake` (0.26 to 0.33): vLLM would cut pages of another
engine's length by tokens, which do not stand one behind the other in ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace as with_fields
from typing import Any

import torch

from vllm_toptheta.backend.hooks.patch import replace


def install() -> None:
    """Tell NIXL how long keys and values are; called where metadata builders are made, before vLLM shows them."""
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_worker import NixlBaseConnectorWorker
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import NixlBaseConnector

    replace(NixlBaseConnector, "register_kv_caches", _without_tails)
    replace(NixlBaseConnectorWorker, "_validate_remote_agent_handshake", _of_equal_pages)


def _without_tails(register: Callable[..., Any]) -> Callable[..., Any]:
    def register_keys_and_values(connector: Any, kv_caches: dict[str, torch.Tensor]) -> None:
        worker = connector.connector_worker
        worker._layer_specs = {
            name: with_fields(spec, page_size_padded=None) for name, spec in worker._layer_specs.items()
        }
        register(connector, {name: _countable(kv_cache) for name, kv_cache in kv_caches.items()})

    return register_keys_and_values


def _of_equal_pages(validate: Callable[..., None]) -> Callable[..., None]:
    def validate_length(worker: Any, remote: Any, *args: Any, **kwargs: Any) -> None:
        if remote.block_size != worker.block_size:
            # vLLM logs it, and fails the request
            raise RuntimeError(
                f"--block-size: {worker.block_size} here, {remote.block_size} in the engine that read the prompt. "
                "Give both the same"
            )
        validate(worker, remote, *args, **kwargs)

    return validate_length


def _countable(kv_cache: torch.Tensor) -> torch.Tensor:
    """The same pages; with all that lies between the start of one and that of the next, where layers share memory.

    There vLLM takes the bytes of a view for those of whole pages, and only the length of a page from its layer.
    """
    length = kv_cache.stride(0)
    if kv_cache.untyped_storage().nbytes() < (len(kv_cache) + 1) * length * kv_cache.element_size():
        return kv_cache
    return kv_cache.as_strided((len(kv_cache), 1, 1, length), (length, length, length, 1))
