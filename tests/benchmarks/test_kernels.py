"""The grammar of the kernel benchmark's batches."""

import pytest

from vllm_toptheta.benchmarks.kernels import DEFAULT_SPECS, layers_of, parse_shape
from vllm_toptheta.benchmarks.specs import parse_batch, parse_spec
from vllm_toptheta.benchmarks.tune import gain_begins
from vllm_toptheta.errors import BenchmarkError


def test_batches() -> None:
    assert parse_spec("q1s32k") == [32768]
    assert parse_spec("3q1s100") == [100] * 3
    assert parse_spec("2q1s4k_1q1s7") == [4096, 4096, 7]
    assert [len(parse_spec(spec)) for spec in DEFAULT_SPECS] == [32, 8, 4, 32, 1, 64]
    assert parse_batch("2q4s1k") == ([1024, 1024], 4)
    assert parse_batch("2q1s1k") == ([1024, 1024], 1)


@pytest.mark.parametrize("spec", ["", "32", "q2s1k", "q1ks1k", "1q1s0", "0q1s1k", "q1s1k_", "q1s1m"])
def test_other_batches_are_refused(spec: str) -> None:
    with pytest.raises(BenchmarkError):
        parse_spec(spec)


@pytest.mark.parametrize("spec", ["2q9s1k", "2q0s1k", "2q4ks1k", "1q4s1k_1q1s1k"])
def test_as_are_new_tokens_that_kernels_do_not_take(spec: str) -> None:
    with pytest.raises(BenchmarkError, match="new tokens"):
        parse_batch(spec)


@pytest.mark.parametrize(
    ("lost", "length"),
    [
        ([3.0, 1.0, -1.0, -9.0], 300),
        ([3.0, 1.0, 0.5, 0.1], 800),
        ([-1.0, 2.0, -1.0, 0.0], 0),
        ([2.0, 0.0, 1.0, 1.0], 200),
    ],
)
def test_where_a_gain_begins(lost: list[float], length: float) -> None:
    assert gain_begins([100, 200, 400, 800], lost) == length


def test_shapes() -> None:
    assert parse_shape("28, 4,128") == (28, 4, 128)
    for shape in ("", "32,8", "32,0,128", "32,x,128", "30,8,128", "32,1,128", "32,8,100"):
        with pytest.raises(BenchmarkError, match="--shape"):
            parse_shape(shape)


def test_layers_are_evenly_spread() -> None:
    assert list(layers_of(24, 6)) == [0, 4, 8, 12, 16, 20]
    assert list(layers_of(24, 5)) == [0, 5, 10, 15, 20]
    assert list(layers_of(3, None)) == list(layers_of(3, 100)) == [0, 1, 2]
