"""What vLLM's OffloadingConnector copies to where there is no GPU: its own manager, and copies by torch at once.

vLLM's own copies from GPUs only. It copies what the connector says a page is, which leaves out what a page is padded
with, and with it the tails.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec


class HostWorker(OffloadingWorker):
    """Copies of pages, each in a row of its own."""

    def __init__(self, kv_caches: CanonicalKVCaches, num_rows: int) -> None:
        self._kv_caches = kv_caches
        self._host = [torch.zeros(num_rows, one.page_size_bytes, dtype=torch.int8) for one in kv_caches.tensors]
        self._finished: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._copy(job_id, src_spec, dst_spec, to_host=True)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._copy(job_id, dst_spec, src_spec, to_host=False)

    def _copy(self, job_id: int, pages: Any, rows: Any, *, to_host: bool) -> bool:
        assert len(pages.block_ids) == len(rows.block_ids)
        start = 0
        for refs, size in zip(self._kv_caches.group_data_refs, pages.group_sizes, strict=True):
            blocks, places = (torch.as_tensor(one.block_ids[start : start + size]) for one in (pages, rows))
            for ref in refs:
                cached = self._kv_caches.tensors[ref.tensor_idx].tensor[:, : ref.page_size_bytes]
                kept = self._host[ref.tensor_idx][:, : ref.page_size_bytes]
                if to_host:
                    kept[places] = cached[blocks]
                else:
                    cached[blocks] = kept[places]
            start += size
        self._finished.append(TransferResult(job_id, success=True))
        return True

    def get_finished(self) -> list[TransferResult]:
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        """Nothing: what is submitted is done."""


class HostOffloadingSpec(CPUOffloadingSpec):
    """vLLM's, with that worker."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        return HostWorker(kv_caches, self.num_chunks)
