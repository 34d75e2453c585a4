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
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tier_split, "shared_memory_of", lambda device: (SHARED_BYTES_OF_SM, MOST_SHARED_BYTES))
    tier_split.find_loader.cache_clear()
    yield
    tier_split.find_loader.cache_clear()


@pytest.mark.parametrize("head_size", TIER_HEAD_SIZES)
def test_programs_fit_into_a_multiprocessor(head_size: int) -> None:
    for group in range(1, MAX_QUERIES_PER_KV + 1):
        sizes = tier_split.sizes_within(head_size, group, SHARED_BYTES_OF_SM, MOST_SHARED_BYTES)
        assert sizes.heavy_room > tier_split.split_sizes(head_size, group).heavy_room
        assert sizes.shared_bytes <= MOST_SHARED_BYTES
        assert sizes.resident * (sizes.shared_bytes + 1024) <= SHARED_BYTES_OF_SM
        # room for the 168 registers of a thread that loops need, and for 255 where there are more sums
        registers = 168 if sizes.resident > 1 else 255
        assert sizes.resident * sizes.warps * 32 * registers <= REGISTERS_OF_SM
        assert sizes.warps <= 16


def test_lists_are_shorter_where_there_is_less_shared_memory() -> None:
    least = tier_split.split_sizes(128, 4)
    assert tier_split.sizes_within(128, 4, 102_400, 101_376) == least  # of compute capability 8.9
    # room for what programs ask for, but not for what CUDA takes
    some = tier_split.split_sizes(128, 4, 512)
    assert tier_split.sizes_within(128, 4, 2 * (some.shared_bytes + 1024), MOST_SHARED_BYTES) == some
    assert tier_split.sizes_within(128, 4, 2 * some.shared_bytes + 1024, MOST_SHARED_BYTES).heavy_room == 480
    assert tier_split.sizes_within(128, 4, SHARED_BYTES_OF_SM, some.shared_bytes) == some


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
