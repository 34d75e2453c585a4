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
from vllm_toptheta.kernels.gpu.cuda.value_split import DENSE_STEP_TOKENS, ValueSizes
from vllm_toptheta.kernels.gpu.scratch import Sizes
from vllm_toptheta.kernels.gpu.tuning import LaunchConfig, launch_config
from vllm_toptheta.limits import HEAD_SIZES, MAX_QUERIES_PER_KV, MAX_QUERY_LEN

REGISTERS_OF_MERGE = 4 * 32 * 64  # of a program of it, at most


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    value_split.find_loader.cache_clear()
    yield
    value_split.find_loader.cache_clear()


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_programs_and_the_merge_fit_into_a_multiprocessor(head_size: int) -> None:
    made = [
        group
        for group in range(1, MAX_QUERIES_PER_KV * MAX_QUERY_LEN + 1)
        if value_split.is_made_for(head_size, group, 2)
    ]
    assert bool(made) == (head_size in (64, 96, 128, 256))
    for group in made:
        sizes = ValueSizes.of(head_size, group)
        assert sizes.shared_bytes <= MOST_SHARED_BYTES
        assert sizes.resident * (sizes.shared_bytes + 1024) <= SHARED_BYTES_OF_SM
        # what the loops need
        registers = 128 if head_size == 64 and group <= 8 else 192 if head_size <= 128 and group <= 8 else 255
        free = REGISTERS_OF_SM - sizes.resident * sizes.warps * 32 * registers
        assert free >= (REGISTERS_OF_MERGE if registers < 255 else 0)
        assert 3 <= sizes.stages <= 31
        assert sizes.warps <= 16


@pytest.mark.parametrize(
    ("head_size", "group", "element_bytes"),
    [(96, 17, 2), (80, 1, 2), (128, 4, 1), (256, 16, 2), (128, 32, 2), (64, 17, 2)],
)
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


def test_without_it_drafts_have_the_registers_of_fewer_programs() -> None:
    for num_queries, head_size, warps, programs in ((16, 128, 4, 2), (17, 128, 8, 1), (32, 64, 4, 2), (16, 256, 8, 1)):
        config = LaunchConfig().for_drafts(num_queries, head_size)
        assert (config.max_registers, config.num_warps, config.programs_per_sm) == (None, warps, programs)
    assert LaunchConfig(programs_per_sm=1).for_drafts(8, 64).programs_per_sm == 1
    sizes = Sizes(3, 8, 1, 128, max_query_len=4)
    assert sizes.config(LaunchConfig(), None) == LaunchConfig().for_drafts(32, 128)
    assert sizes._replace(max_query_len=1).config(LaunchConfig(), None) == LaunchConfig()


def test_what_is_loaded_is_launched_by_its_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(value_split, "_loaded", lambda *arguments: asked.append(arguments))
    for head_size in (64, 96, 128, 256):
        loader = value_split.find_loader(torch.device("cuda", 0), head_size, 4, 2)
        assert loader is not None
        assert asked.pop()[0] == loader
        config = launch_config(head_size, 2, "cpu").for_loader(loader)
        assert config.programs_per_sm == loader.sizes.resident
        for num_kv_heads in (1, 8):
            assert config.min_step_tokens(num_kv_heads, 132) == DENSE_STEP_TOKENS


def test_no_gpu_no_loader() -> None:
    assert value_split.find_loader(torch.device("cpu"), 128, 4, 2) is None
