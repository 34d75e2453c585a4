"""Connectors: what copies pages out of an engine and into it, and which of them are served.

They copy keys and values. CPUs make the tails of pages that arrive again. On GPUs, where steps are captured in graphs,
sums of values have to be among what is copied, and must have been written by the engine that reads them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_OFFLOADING, _SIMPLE = "OffloadingConnector", "SimpleCPUOffloadConnector"
_OF_GPUS = (None, "CPUOffloadingSpec", "TieringOffloadingSpec", "cpu", "disk")  # what vLLM's own copy to
_TO_THE_HOST = (None, "CPUOffloadingSpec", "cpu")
_NIXL = ("NixlConnector", "NixlPullConnector")  # two names of one class


@dataclass(frozen=True)
class Connector:
    """What is asked for.

    Attributes:
        name: As vLLM knows it, or whoever brings it; empty where a configuration names none, which vLLM refuses.
        flag: What asks for it, with its name where that says more.
        is_foreign: Whether it is not vLLM's own.
        target: What vLLM's offloading copies to, by name; None where nothing says so.
    """

    name: str
    flag: str
    is_foreign: bool = False
    target: str | None = None

    @classmethod
    def of(
        cls, transfer: Mapping[str, Any], *, offloads: bool = False, offloading_backend: str | None = None
    ) -> Connector | None:
        """What flags, or vLLM's configuration, ask for; None if they ask for none.

        Args:
            transfer: Fields of vLLM's `KVTransferConfig`. Of any content.
            offloads: Whether there is a --kv-offloading-size, for which vLLM chooses the connector.
            offloading_backend: The --kv-offloading-backend; None for vLLM's own.
        """
        if not transfer and not offloads:
            return None
        name = str(transfer.get("kv_connector") or "")
        flag = f"--kv-transfer-config {name}".rstrip()
        if offloads:
            is_simple = os.environ.get("VLLM_USE_SIMPLE_KV_OFFLOAD", "0") != "0"
            name = "LMCacheMPConnector" if offloading_backend == "lmcache" else _SIMPLE if is_simple else _OFFLOADING
            flag = "--kv-offloading-size"
        extra = transfer.get("kv_connector_extra_config")
        extra = extra if isinstance(extra, Mapping) else {}
        target = extra.get("kv_offload_backend" if name == _SIMPLE else "spec_name")
        return cls(
            name,
            flag,
            is_foreign=bool(transfer.get("kv_connector_module_path")),
            target=None if target is None else str(target),
        )

    @property
    def needs_gpus(self) -> bool:
        """Whether it copies from GPUs, and from nothing else."""
        return not self.is_foreign and self.name in (_OFFLOADING, _SIMPLE) and self.target in _OF_GPUS

    @property
    def is_nixl(self) -> bool:
        """Whether it reads pages out of another engine's memory by NIXL."""
        return not self.is_foreign and self.name in _NIXL

    @property
    def was_run_on_cpus(self) -> bool:
        """Whether it is one that was, or leaves copying to code of somebody else's whose interface was."""
        return self.is_nixl or (
            not self.is_foreign
            and (self.name == "ExampleConnector" or (self.name == _OFFLOADING and not self.needs_gpus))
        )

    @property
    def stays_on_the_host(self) -> bool:
        """Whether it copies whole pages, with whatever rows they have, and only back to the engine that wrote them."""
        return self.needs_gpus and self.target in _TO_THE_HOST
