"""What the kernel of mode `values` in CUDA C++ is compiled for, and what happens where it is not."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.kernels.test_tier_loading import MOST_SHARED_BYTES, REGISTERS_OF_SM, SHARED_BYTES_OF_SM
from vllm_toptheta.kernels.gpu.cuda import value_split
from vllm_toptheta.kernels.gpu.cuda.nvrtc import CompileError
from vllm_toptheta.kernels.gpu.cuda.value_split import ValueSizes
from vllm_toptheta.kernels.gpu.tuning import LaunchConfig, launch_config
from vllm_toptheta.limits import HEAD_SIZES, MAX_QUERIES_PER_KV

REGISTERS_OF_MERGE = 4 * 32 * 64  # of a program of it, at most


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    value_split.find_loader.cache_clear()
    yield
    value_split.find_loader.cache_clear()


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_programs_and_the_merge_fit_into_a_multiprocessor(head_size: int) -> None:
    made = [group for group in range(1, MAX_QUERIES_PER_KV + 1) if value_split.is_made_for(head_size, group, 2)]
    assert bool(made) == (head_size in (64, 128, 256))
    for group in made:
        sizes = ValueSizes.of(head_size, group)
        assert sizes.shared_bytes <= MOST_SHARED_BYTES
        assert sizes.resident * (sizes.shared_bytes + 1024) <= SHARED_BYTES_OF_SM
        # what the loops need
        registers = 128 if head_size == 64 and group <= 8 else 168 if head_size <= 128 and group <= 8 else 255
        free = REGISTERS_OF_SM - sizes.resident * sizes.warps * 32 * registers
        assert free >= (REGISTERS_OF_MERGE if registers < 255 else 0)
        assert 3 <= sizes.stages <= 31
        assert sizes.warps <= 16


@pytest.mark.parametrize(("head_size", "group", "element_bytes"), [(96, 4, 2), (80, 1, 2), (128, 4, 1), (256, 16, 2)])
def test_what_it_is_not_made_for_is_read_in_triton_without_a_word(
    head_size: int, group: int, element_bytes: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="vllm.toptheta"):
        assert value_split.find_loader(torch.device("cuda", 0), head_size, group, element_bytes) is None
    assert not caplog.records


def test_without_a_compiler_the_kernel_in_triton_is_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise CompileError("no libnvrtc was found")

    monkeypatch.setattr(value_split, "_loaded", refuse)
    with caplog.at_level(logging.WARNING, logger="vllm.toptheta"):
        for _ in range(2):
            assert value_split.find_loader(torch.device("cuda", 0), 128, 4, 2) is None
    assert [record.getMessage() for record in caplog.records] == [
        "toptheta: keys and values are read by the slower kernels in Triton, because no libnvrtc was found"
    ]
    assert LaunchConfig().for_loader(None) == LaunchConfig()


def test_what_is_loaded_is_launched_by_its_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(value_split, "_loaded", lambda *arguments: asked.append(arguments))
    for head_size in (64, 128, 256):
        loader = value_split.find_loader(torch.device("cuda", 0), head_size, 4, 2)
        assert loader is not None
        assert asked.pop()[0] == loader
        in_triton = launch_config(head_size, 2, "cpu")
        config = in_triton.for_loader(loader)
        assert config.programs_per_sm == loader.sizes.resident
        # steps are dense up to about as many tokens as with the other kernel, or to what was measured
        tokens = config.programs_per_sm * config.dense_tokens
        assert loader.sizes.dense_tokens or tokens == pytest.approx(
            in_triton.programs_per_sm * in_triton.dense_tokens, abs=config.programs_per_sm
        )


def test_no_gpu_no_loader() -> None:
    assert value_split.find_loader(torch.device("cpu"), 128, 4, 2) is None
