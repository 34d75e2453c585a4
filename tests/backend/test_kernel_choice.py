"""Which kernels a rank's layers are decoded by."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.backend.gpu_engine import make_plan
from vllm_toptheta.backend.kernel_choice import Loaders
from vllm_toptheta.kernels.gpu.cuda import value_split


@pytest.mark.parametrize("head_size", [64, 96, 128, 256])
def test_drafts_have_a_kernel_of_their_own(monkeypatch: pytest.MonkeyPatch, head_size: int) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(value_split, "find_loader", lambda device, size, group, _: asked.append((size, group)))
    spec = SimpleNamespace(head_size=head_size, dtype=torch.bfloat16)
    Loaders.find(make_plan(), spec, 2, torch.device("cuda", 0))
    assert asked == [(head_size, 2)]
    asked.clear()
    Loaders.find(make_plan(), spec, 2, torch.device("cuda", 0), max_query_len=3)
    assert sorted(asked) == [(head_size, 2), (head_size, 6)]
