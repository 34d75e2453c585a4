"""What the benchmark of shadow keys refuses, and how it ranks; its times need a GPU."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_toptheta.benchmarks.shadow import VARIANTS, ShadowTime, compare, summary
from vllm_toptheta.errors import BenchmarkError
from vllm_toptheta.kernels.gpu.tuning import ShadowConfig
from vllm_toptheta.limits import CHANNELS


def row(kernel: str, ratio: float | None) -> ShadowTime:
    fields: dict[str, Any] = {"error": "failed"} if ratio is None else {"ratio": ratio}
    return ShadowTime(spec="q1s1k", block_size=16, kernel=kernel, device="card", **fields)


@pytest.mark.parametrize(
    ("specs", "names", "message"),
    [
        (["q2s1k"], ["base"], "several new tokens"),
        (["q1s1k"], ["base", "fastest"], "'fastest' is no variant"),
    ],
)
def test_what_is_unknown_is_refused(specs: list[str], names: list[str], message: str) -> None:
    with pytest.raises(BenchmarkError, match=message):
        compare(specs, [16], names)


def test_variants_differ_and_have_kernels() -> None:
    assert VARIANTS["walk 128"].config == ShadowConfig()
    assert len(set(VARIANTS.values())) == len(VARIANTS)
    assert {variant.num_channels for variant in VARIANTS.values()} <= set(CHANNELS)


def test_the_fastest_comes_first_and_failures_do_not_count() -> None:
    lines = summary([row("slow", 2.0), row("fast", 2.0), row("fast", 8.0), row("slow", None)]).split("\n")
    assert lines[1:3] == [' "fast": 4.0,', ' "slow": 2.0']


def test_lists_must_have_room_for_a_chunk() -> None:
    with pytest.raises(ValueError, match="^list_depth: 4 is less than the 8 tiles"):
        ShadowConfig(chunk_tiles=8, list_depth=4)
