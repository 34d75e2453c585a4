"""Which kernels a rank's layers are decoded by."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.backend.gpu_engine import make_plan
from vllm_toptheta.backend.kernel_choice import Loaders
from vllm_toptheta.kernels.gpu.cuda import value_split
from vllm_toptheta.limits import ALLOW_UNTESTED


@pytest.mark.parametrize(("head_size", "is_tested"), [(64, True), (96, False), (128, True), (256, True)])
def test_what_no_card_has_run_is_read_in_triton(
    monkeypatch: pytest.MonkeyPatch, head_size: int, is_tested: bool
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(value_split, "find_loader", lambda device, size, group, _: asked.append((size, group)))
    spec = SimpleNamespace(head_size=head_size, dtype=torch.bfloat16)
    monkeypatch.delenv(ALLOW_UNTESTED, raising=False)
    Loaders.find(make_plan(), spec, 2, torch.device("cuda", 0))
    assert asked == ([(head_size, 2)] if is_tested else [])
    asked.clear()
    monkeypatch.setenv(ALLOW_UNTESTED, "1")
    Loaders.find(make_plan(), spec, 2, torch.device("cuda", 0), max_query_len=3)
    assert sorted(asked) == [(head_size, 2), (head_size, 6)]
