"""What the kernels of copies in CUDA C++ are compiled for, and what happens where they are not."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from vllm_toptheta.kernels.gpu.cuda import tier_copy, tier_split
from vllm_toptheta.kernels.gpu.cuda.nvrtc import CompileError
from vllm_toptheta.kernels.gpu.tuning import TIER_CONFIG, tier_config
from vllm_toptheta.limits import MAX_QUERIES_PER_KV, TIER_HEAD_SIZES

SHARED_BYTES_OF_SM = 233_472  # of compute capability 9.0, of which each program's share is 1 KiB more than it asks for
MOST_SHARED_BYTES = 232_448  # of a program
REGISTERS_OF_SM = 65_536


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    tier_split.find_loader.cache_clear()
    yield
    tier_split.find_loader.cache_clear()


@pytest.mark.parametrize("head_size", TIER_HEAD_SIZES)
def test_programs_fit_into_a_multiprocessor(head_size: int) -> None:
    for group in range(1, MAX_QUERIES_PER_KV + 1):
        sizes = tier_split.split_sizes(head_size, group)
        assert sizes.shared_bytes <= MOST_SHARED_BYTES
        assert sizes.resident * (sizes.shared_bytes + 1024) <= SHARED_BYTES_OF_SM
        # room for the 168 registers of a thread that loops need, and for 255 where there are more sums
        registers = 168 if sizes.resident > 1 else 255
        assert sizes.resident * sizes.warps * 32 * registers <= REGISTERS_OF_SM
        assert sizes.warps <= 16


@pytest.mark.parametrize("refused", ["what scans", "what writes copies"])
def test_without_a_compiler_the_kernels_in_triton_are_taken(
    refused: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise CompileError("no libnvrtc was found")

    monkeypatch.setattr(tier_split, "_loaded", refuse if refused == "what scans" else lambda *_: None)
    monkeypatch.setattr(tier_copy, "loaded", refuse)
    with caplog.at_level(logging.WARNING, logger="vllm.toptheta"):
        for _ in range(2):
            assert tier_split.find_loader(torch.device("cuda", 0), 128, 4) is None
    assert [record.getMessage() for record in caplog.records] == [
        "toptheta: copies are read by the slower kernels in Triton, because no libnvrtc was found"
    ]
    assert tier_config(None) is TIER_CONFIG


def test_float8_pages_are_read_in_triton(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="vllm.toptheta"):
        for _ in range(2):
            assert tier_split.find_loader(torch.device("cuda", 0), 128, 4, element_bytes=1) is None
    assert [record.getMessage() for record in caplog.records] == [
        "toptheta: float8 keys and values with copies are read by the slower kernels in Triton"
    ]


def test_what_is_loaded_is_launched_by_its_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    for module, name in ((tier_split, "_loaded"), (tier_copy, "loaded")):
        monkeypatch.setattr(module, name, lambda *arguments: asked.append(arguments))
    loader = tier_split.find_loader(torch.device("cuda", 0), 128, 4)
    assert loader is not None
    assert [arguments[0] for arguments in asked] == [loader, loader]
    assert tier_config(loader).programs_per_sm == loader.sizes.resident == 2


def test_no_gpu_no_loader() -> None:
    assert tier_split.find_loader(torch.device("cpu"), 128, 4) is None
