"""The emulated device: each wrapper against plain arithmetic, and the rules whose breaking it notices.

The same probe runs on a GPU through NVRTC, so that emulator and hardware cannot drift apart.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.kernels.simt.build import EmulatedKernel, SimtError, build, compiler
from vllm_toptheta.kernels.gpu.cuda.cubins import Cubins
from vllm_toptheta.kernels.gpu.cuda.driver import Kernel, find_driver
from vllm_toptheta.kernels.gpu.cuda.loading import load, source_text
from vllm_toptheta.kernels.gpu.cuda.nvrtc import find_nvrtc

FOLDER = Path(__file__).parent / "simt"
NUM_WORDS = 4096
UNTOUCHED = 0x7F7F7F7F  # what shared memory is full of
FAULTY_SHARED_BYTES = 2048
pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


class ProbeArguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("fragments", "words", "floats", "codes", "halves", "transposed")),
        *((name, ctypes.c_void_p) for name in ("bits", "reals", "copied", "collected", "total")),
        ("num_words", ctypes.c_int),
    ]


class FaultyArguments(ctypes.Structure):
    _fields_ = [("source", ctypes.c_void_p), ("to", ctypes.c_void_p), ("fault", ctypes.c_int)]


@dataclass
class Probe:
    """Inputs and outputs of the probe, on the CPU; see probe.cu for the shapes."""

    fragments: torch.Tensor
    words: torch.Tensor
    floats: torch.Tensor
    codes: torch.Tensor
    halves: torch.Tensor
    transposed: torch.Tensor
    bits: torch.Tensor
    reals: torch.Tensor
    copied: torch.Tensor
    collected: torch.Tensor
    total: torch.Tensor


def inputs() -> Probe:
    generator = torch.Generator().manual_seed(42)
    # the same bits are read as float16, bfloat16 and bytes; as any of the halves they are neither infinite nor NaN
    elements = torch.randn(64, 12, generator=generator).to(torch.float16)
    words = torch.randint(-(2**31), 2**31, (NUM_WORDS, 3), generator=generator).to(torch.int32)
    floats = torch.randn(NUM_WORDS, 2, generator=generator) * torch.tensor([30.0, 1.0])
    floats[:, 1] = torch.exp2(floats[:, 1] * 20)
    # overflow, ties, subnormal numbers and what is no number
    special = [0.0, -0.0, 65504.0, 65519.9, 65520.0, 1e-7, 2.0**-25, 1.0 + 2.0**-11, 1.0 + 3 * 2.0**-11, 1e-40, 3.4e38]
    special += [float("inf"), 1.00390625, 1.01171875, float("nan")]
    floats[: len(special)] = torch.tensor(special)[:, None]
    return Probe(
        fragments=elements.view(torch.int32),
        words=words,
        floats=floats,
        codes=torch.empty(64, 4, dtype=torch.int32),
        halves=torch.empty(2, 64, 4),
        transposed=torch.empty(64, dtype=torch.int32),
        bits=torch.empty(NUM_WORDS, 4, dtype=torch.int32),
        reals=torch.empty(NUM_WORDS, 5),
        copied=torch.empty(64, 4, dtype=torch.int32),
        collected=torch.empty(64, 8, dtype=torch.int32),
        total=torch.zeros(1, dtype=torch.int64),
    )


def run_probe(kernel: EmulatedKernel | Kernel, device: str, is_early: bool = False) -> Probe:
    probe = inputs()
    tensors = {name: tensor.to(device) for name, tensor in vars(probe).items()}
    arguments = ProbeArguments(**{name: tensor.data_ptr() for name, tensor in tensors.items()}, num_words=NUM_WORDS)
    stream = torch.cuda.current_stream().cuda_stream if device == "cuda" else 0
    kernel.launch((1, 1, 1), 64, 1024, arguments, stream, is_early)
    return Probe(**{name: tensor.cpu() for name, tensor in tensors.items()})


@pytest.fixture(
    scope="module", params=["emulated", "reversed", *(pytest.param(name, marks=needs_gpu) for name in ("gpu", "early"))]
)
def probe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Probe]:
    if request.param in ("gpu", "early"):
        torch.empty(1, device="cuda")  # makes the context
        major, minor = torch.cuda.get_device_capability()
        source = source_text(FOLDER / "probe.cu")
        cubins = Cubins(find_nvrtc(), tmp_path_factory.mktemp("cubins"))
        kernel = load(cubins, find_driver(), source, f"sm_{major}{minor}", "probe", (), 1024)
        yield run_probe(kernel, "cuda", request.param == "early")
    else:
        emulated = build(FOLDER / "probe.cu", "probe")
        emulated.is_reversed = request.param == "reversed"
        yield run_probe(emulated, "cpu")


def a_of(fragments: torch.Tensor, per_word: int) -> torch.Tensor:
    """a0..a3 `[32, 4 * per_word]` of a warp as the matrix `[16, 8 * per_word]`."""
    pieces = fragments.view(8, 4, 2, 2, per_word)  # row, part, half of the columns, half of the rows, element
    return pieces.permute(3, 0, 2, 1, 4).reshape(16, 8 * per_word)


def b_of(fragments: torch.Tensor, per_word: int) -> torch.Tensor:
    """b0, b1 `[32, 2 * per_word]` of a warp as the matrix `[8 * per_word, 8]`."""
    return fragments.view(8, 4, 2, per_word).permute(2, 1, 3, 0).reshape(8 * per_word, 8)


def d_of(lanes: torch.Tensor) -> torch.Tensor:
    """Sums `[32, 4]` of a warp as the matrix `[16, 8]`."""
    return lanes.view(8, 4, 2, 2).permute(2, 0, 1, 3).reshape(16, 8)


INITIAL = torch.tensor([1, 2, 3, 4]).expand(32, 4)


def test_products_of_codes(probe: Probe) -> None:
    for warp in range(2):
        fragments = probe.fragments[32 * warp : 32 * warp + 32]
        a = a_of(fragments[:, :4].contiguous().view(torch.uint8), 4).long()
        b = b_of(fragments[:, 4:].contiguous().view(torch.int8), 4).long()
        assert torch.equal(d_of(probe.codes[32 * warp : 32 * warp + 32]).long(), a @ b + d_of(INITIAL.contiguous()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_of_halves(probe: Probe, dtype: torch.dtype) -> None:
    lanes = probe.halves[0 if dtype is torch.float16 else 1]
    for warp in range(2):
        fragments = probe.fragments[32 * warp : 32 * warp + 32]
        a = a_of(fragments[:, :4].contiguous().view(dtype), 2).double()
        b = b_of(fragments[:, 4:].contiguous().view(dtype), 2).double()
        expected = a @ b + d_of(INITIAL.contiguous())
        # float32 sums in the hardware's own order, which truncates
        scale = a.abs() @ b.abs() + 4.0
        assert bool(((d_of(lanes[32 * warp : 32 * warp + 32]).double() - expected).abs() <= 2.0**-20 * scale).all())


def test_transpose(probe: Probe) -> None:
    for warp in range(2):
        rows = probe.fragments[32 * warp : 32 * warp + 32, 0].contiguous().view(torch.int16).view(8, 8)
        columns = probe.transposed[32 * warp : 32 * warp + 32].view(torch.int16).view(8, 8)
        assert torch.equal(columns, rows.T)


def test_bytes_are_permuted(probe: Probe) -> None:
    table = probe.words[:, :2].contiguous().view(torch.uint8).long()
    for i in range(4):
        nibble = probe.words[:, 2].long() >> (4 * i) & 15
        byte = table.gather(1, (nibble & 7)[:, None])[:, 0]
        expected = torch.where(nibble >= 8, torch.where(byte >= 128, 255, 0), byte)
        assert torch.equal(probe.bits[:, 0].contiguous().view(torch.uint8).view(-1, 4)[:, i].long(), expected)


def test_products_of_two_are_at_most_the_largest(probe: Probe) -> None:
    x, y = (probe.words[:, i].contiguous().view(torch.float16).double() for i in range(2))
    expected = torch.fmin((x * y).to(torch.float16), torch.tensor(65504.0, dtype=torch.float16))
    assert torch.equal(probe.bits[:, 3].contiguous().view(torch.float16), expected)
    assert bool((expected == 65504.0).any())


@pytest.mark.parametrize(("column", "dtype"), [(1, torch.float16), (2, torch.bfloat16)])
def test_floats_are_packed_to_the_nearest(probe: Probe, column: int, dtype: torch.dtype) -> None:
    found = probe.bits[:, column].contiguous().view(dtype).view(-1, 2)
    expected = probe.floats.to(dtype)
    assert torch.equal(found.nan_to_num(-7.0), expected.nan_to_num(-7.0))


def test_powers_and_quotients(probe: Probe) -> None:
    low, high = probe.floats[:, 0].double(), probe.floats[:, 1].double()
    flushed = torch.where(torch.exp2(low) < torch.finfo(torch.float32).tiny, 0.0, torch.exp2(low)).float()
    torch.testing.assert_close(probe.reals[:, 0], flushed, rtol=2.0**-21, atol=1e-37, equal_nan=True)
    quotient = (low / (high.abs() + 1)).float()
    # of larger divisors the device makes 0
    is_usual = high.abs() < 2.0**125
    torch.testing.assert_close(probe.reals[is_usual, 1], quotient[is_usual], rtol=2.0**-21, atol=1e-37, equal_nan=True)


def test_elements_become_floats(probe: Probe) -> None:
    half = probe.words[:, 0].contiguous().view(torch.int16).view(-1, 2)[:, 0].contiguous()
    for column, dtype in [(2, torch.float16), (3, torch.float16), (4, torch.bfloat16)]:
        expected = half.view(dtype).float()
        torch.testing.assert_close(probe.reals[:, column], expected, rtol=0, atol=0, equal_nan=True)


def test_copies_arrive(probe: Probe) -> None:
    rows = probe.fragments.flatten()[:256].view(64, 4)
    assert torch.equal(probe.copied, rows[torch.arange(64) ^ 33])


def test_collectives(probe: Probe) -> None:
    lane = torch.arange(32)
    for warp in range(2):
        found = probe.collected[32 * warp : 32 * warp + 32]
        value = probe.fragments[32 * warp : 32 * warp + 32, 0]
        votes = int(((value.long() & 1) << lane).sum())
        assert set(found[:, 0].long().bitwise_and(0xFFFFFFFF).tolist()) == {votes}
        assert set(found[:, 1].bool().tolist()) == {int(value[7]) > 0}
        assert torch.equal(found[:, 2], value[lane * 5 % 32])
        assert torch.equal(found[:, 3], value[lane ^ 9])
        assert torch.equal(found[:, 4], value[torch.where(lane < 3, lane, lane - 3)])
        assert torch.equal(found[:, 5], value.long().sum().to(torch.int32).expand(32))
        assert torch.equal(found[:, 6], (value[31 - lane].long() * 3 >> 1).to(torch.int32))
        for mine, counted in zip(value.tolist(), found[:, 7].tolist(), strict=True):
            unsigned = mine & 0xFFFFFFFF
            first = (unsigned & -unsigned).bit_length()
            assert counted == min(unsigned.bit_count(), 14) + max(first, 32 - unsigned.bit_length())
    assert int(probe.total) == 3 * int(probe.fragments[:, 0].long().sum())


def run_faulty(fault: int, *, is_reversed: bool = False) -> torch.Tensor:
    kernel = build(FOLDER / "faulty.cu", "faulty")
    kernel.is_reversed = is_reversed
    source, to = torch.arange(256, dtype=torch.int32), torch.full((64,), -1, dtype=torch.int32)
    arguments = FaultyArguments(source=source.data_ptr(), to=to.data_ptr(), fault=fault)
    kernel.launch((1, 1, 1), 64, FAULTY_SHARED_BYTES, arguments)
    return to


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (0, r"thread 1: __syncwarp in line \d+, while lane 0 of the warp is at __ballot_sync in line"),
        (
            1,
            "warp 0: nobody can go on; lanes 0xffff of 0xffffffff are at __syncthreads, lanes 0xffff0000 at __syncwarp",
        ),
        (2, "reads lane 3, which has ended"),
        (6, r"block \(0, 0, 0\): byte 2048 of shared memory is written, which has 2048"),
        (7, "byte 2048 is outside 2048 bytes of shared memory"),
        (8, "load8: .* is no multiple of 8"),
        (9, "only masks of all lanes are supported, this is 0xff"),
    ],
)
def test_broken_rules_end_the_run(fault: int, says: str) -> None:
    with pytest.raises(SimtError, match=says):
        run_faulty(fault)
    # a failed run leaves nothing behind
    assert run_faulty(3)[0] == 2**21 - 1


def test_threads_that_have_ended_hold_nobody_up() -> None:
    found = run_faulty(3).view(2, 32)
    assert bool((found[:, :21] == 2**21 - 1).all())
    assert bool((found[:, 21:] == -1).all())


def test_copies_that_nobody_waits_for_have_not_arrived() -> None:
    assert set(run_faulty(4).tolist()) == {UNTOUCHED}
    assert set(run_faulty(5).tolist()) == {UNTOUCHED}


def test_a_missing_barrier_shows_in_one_of_the_orders() -> None:
    in_order = run_faulty(10)
    backwards = run_faulty(10, is_reversed=True)
    assert UNTOUCHED in in_order.tolist()
    assert not torch.equal(in_order, backwards)


def test_a_struct_of_another_size_is_refused() -> None:
    with pytest.raises(SimtError, match="the kernel's arguments have 24 bytes, those given 8"):
        build(FOLDER / "faulty.cu", "faulty").launch((1, 1, 1), 32, 0, ctypes.c_int64(0))  # type: ignore[arg-type]


def test_every_cta_runs_and_has_fresh_shared_memory() -> None:
    source = """
        struct Arguments { int* to; };
        extern "C" __global__ void ctas(Arguments arguments) {
            int* shared = reinterpret_cast<int*>(dynamic_shared());
            const int cta = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
            arguments.to[cta * blockDim.x + threadIdx.x] = shared[threadIdx.x] == 0x7F7F7F7F ? FACTOR * cta : -1;
            shared[threadIdx.x] = 0;
        }"""
    to = torch.full((24, 40), -1, dtype=torch.int32)
    arguments = type("Arguments", (ctypes.Structure,), {"_fields_": [("to", ctypes.c_void_p)]})(to.data_ptr())
    build(source, "ctas", {"FACTOR": 3}).launch((2, 3, 4), 40, 256, arguments)
    assert torch.equal(to, (3 * torch.arange(24, dtype=torch.int32))[:, None].expand(24, 40))


def test_the_compilers_message_is_the_error() -> None:
    with pytest.raises(SimtError, match="nothing_like_this"):
        build('extern "C" __global__ void broken(int x) { nothing_like_this(x); }', "broken")
