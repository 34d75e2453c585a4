"""Compiling of CUDA kernels, and keeping, loading and launching them, by doubles of NVRTC and of the driver."""

from __future__ import annotations

import ctypes
import errno
import importlib.util
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.kernels.nvrtc_double import REFUSED, DriverDouble, NvrtcDouble
from vllm_toptheta.kernels.codec import tier_bytes
from vllm_toptheta.kernels.gpu.cuda import tier_copy, value_split
from vllm_toptheta.kernels.gpu.cuda.cubins import Cubins
from vllm_toptheta.kernels.gpu.cuda.driver import Driver, DriverError, Kernel, KernelAttributes
from vllm_toptheta.kernels.gpu.cuda.loading import SOURCE_FOLDER, load, source_text
from vllm_toptheta.kernels.gpu.cuda.nvrtc import LOG_CHARACTERS, CompileError, Nvrtc, find_nvrtc
from vllm_toptheta.kernels.gpu.cuda.tier_split import SOURCE, SPLIT, macros_of, split_sizes
from vllm_toptheta.kernels.gpu.cuda.value_split import ValueSizes
from vllm_toptheta.kernels.gpu.records import Shape

PROBE = Path(__file__).parent / "simt" / "probe.cu"
LAUNCH = {"grid": (4, 5, 6), "threads": 128, "shared_bytes": 65536, "stream": 0x1234567890AB, "is_early": False}


class Arguments(ctypes.Structure):
    _fields_ = [("pointer", ctypes.c_void_p), ("number", ctypes.c_int), ("scale", ctypes.c_float)]


def compile_real(source: str, architecture: str, macros: tuple[str, ...], folder: Path) -> bytes:
    return Cubins(find_nvrtc(), folder).get(source, architecture, macros)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_nvrtc_takes_every_wrapper(architecture: str, tmp_path: Path) -> None:
    assert compile_real(source_text(PROBE), architecture, (), tmp_path).startswith(b"\x7fELF")


def shape_of(block_size: int, head_size: int, group: int, *, is_float16: bool = False) -> Shape:
    return Shape(block_size, head_size, group, head_size, is_float16, True, True, tier_bytes(head_size))


KINDS = [
    ("sm_90", shape_of(16, 128, 4), False),
    ("sm_90", shape_of(32, 128, 7, is_float16=True), True),
    ("sm_90", shape_of(48, 128, 16), False),
    ("sm_90", shape_of(128, 64, 3), False),
    ("sm_90", shape_of(16, 256, 8), False),
    ("sm_80", shape_of(16, 64, 1), False),
    ("sm_80", shape_of(16, 128, 1), False),
    ("sm_100", shape_of(16, 128, 4), False),
]
KINDS_OF_VALUES = [*KINDS, ("sm_90", shape_of(16, 96, 1), False), ("sm_80", shape_of(32, 96, 16), True)]


@pytest.mark.parametrize(("architecture", "shape", "has_soft_cap"), KINDS)
def test_nvrtc_takes_the_kernels_of_copies(architecture: str, shape: Shape, has_soft_cap: bool, tmp_path: Path) -> None:
    """It knows less than the emulator's compiler: no header, and none of its built-in functions."""
    macros = macros_of(shape, split_sizes(shape.HEAD_SIZE, shape.GROUP), has_soft_cap=has_soft_cap)
    assert SPLIT.encode() in compile_real(source_text(SOURCE_FOLDER / SOURCE), architecture, macros, tmp_path)
    dtype = torch.float16 if shape.FLOAT16 else torch.bfloat16
    macros = tier_copy.macros_of(shape.HEAD_SIZE, shape.BLOCK_SIZE, dtype)
    source = source_text(SOURCE_FOLDER / tier_copy.SOURCE)
    assert tier_copy.COPY.encode() in compile_real(source, architecture, macros, tmp_path)


@pytest.mark.parametrize(("architecture", "shape", "has_soft_cap"), KINDS_OF_VALUES)
def test_nvrtc_takes_the_kernel_of_values(architecture: str, shape: Shape, has_soft_cap: bool, tmp_path: Path) -> None:
    sizes = ValueSizes.of(shape.HEAD_SIZE, shape.GROUP)
    macros = value_split.macros_of(shape, sizes, has_soft_cap=has_soft_cap)
    cubin = compile_real(source_text(SOURCE_FOLDER / value_split.SOURCE), architecture, macros, tmp_path)
    assert value_split.SPLIT.encode() in cubin


def test_errors_in_what_a_source_includes_name_that_file(tmp_path: Path) -> None:
    file = tmp_path / "kernel.cu"
    file.write_text('constexpr bool SOFT_CAP = false;\n#include "scores.cuh"\n\nnothing_like_this x;\n')
    text = source_text(file)
    assert "float capped(" in text
    with pytest.raises(CompileError, match=r"kernel\.cu\(4\): error: .*nothing_like_this"):
        compile_real(text, "sm_90", (), tmp_path)
    with pytest.raises(CompileError, match=r"scores\.cuh\(1\d\): error: .*SOFT_CAP"):
        compile_real(text.replace("bool SOFT_CAP", "bool OTHER"), "sm_90", (), tmp_path)


def test_errors_of_nvrtc_itself_name_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "broken.cu"
    file.write_text("\n\nnothing_like_this x;\n")
    with pytest.raises(CompileError, match=r"broken\.cu\(3\): error: .*nothing_like_this"):
        compile_real(source_text(file), "sm_90", (), tmp_path)


@pytest.mark.parametrize("folder", ["cu13", "cuda_nvrtc"])
def test_the_library_beside_torch_comes_first(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / folder / "lib" / f"libnvrtc{name}" for name in ("-builtins.so.13.0", ".so.13")]
    files[0].parent.mkdir(parents=True)
    for file in files:
        file.write_text("")
    opened: list[str] = []

    def open_library(name: str) -> NvrtcDouble:
        opened.append(name)
        return NvrtcDouble()

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[tmp_path])
    )
    monkeypatch.setattr(ctypes, "CDLL", open_library)
    find_nvrtc.__wrapped__()
    assert opened == [str(file) for file in files]


def test_without_a_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def open_library(name: str) -> None:
        tried.append(name)
        raise OSError(name)

    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(ctypes, "CDLL", open_library)
    with pytest.raises(CompileError, match=r"nvidia-cuda-nvrtc of torch's CUDA version \(12\)"):
        find_nvrtc.__wrapped__()
    assert tried[0] == "libnvrtc.so.12"


def test_options_reach_the_compiler(tmp_path: Path) -> None:
    library = NvrtcDouble()
    assert Cubins(Nvrtc(library), tmp_path).get("text", "sm_90", ("A=1", "B")) == library.cubin
    options = ["--std=c++17", "-default-device", "--gpu-architecture=sm_90", "-DA=1", "-DB"]
    assert library.compiled == [("text", options)]
    assert library.num_programs == 0


def test_a_refused_source_raises_the_start_of_the_log(tmp_path: Path) -> None:
    library = NvrtcDouble(log="kernel.cu(3): error: expected a ;" + "." * 10000)
    with pytest.raises(CompileError, match=r"^kernel\.cu\(3\): error: expected") as caught:
        Cubins(Nvrtc(library), tmp_path).get("text", "sm_90")
    assert len(str(caught.value)) == LOG_CHARACTERS
    assert library.num_programs == 0
    assert list(tmp_path.iterdir()) == []


def test_other_failures_say_the_function_its_result_and_the_log(tmp_path: Path) -> None:
    library = NvrtcDouble(log="nvrtc: error: failed to open libnvrtc-builtins.so.13.0.", result=7)
    with pytest.raises(CompileError, match=r"nvrtcCompileProgram of NVRTC returned 7\. nvrtc: error: failed to open"):
        Nvrtc(library).compile("text", [])


def test_a_second_start_compiles_nothing(tmp_path: Path) -> None:
    library = NvrtcDouble()
    first = Cubins(Nvrtc(library), tmp_path / "cubins").get("text", "sm_90")
    assert Cubins(Nvrtc(library), tmp_path / "cubins").get("text", "sm_90") == first
    assert len(library.compiled) == 1
    assert [file.suffix for file in (tmp_path / "cubins").iterdir()] == [".cubin"]


def test_whatever_changes_the_cubin_changes_the_file(tmp_path: Path) -> None:
    library, newer = NvrtcDouble(), NvrtcDouble()
    newer.version = (13, 1)
    cubins = Cubins(Nvrtc(library), tmp_path)
    for source, architecture, macros in [
        ("a", "sm_90", ()),
        ("b", "sm_90", ()),
        ("a", "sm_80", ()),
        ("a", "sm_90", "M"),
    ]:
        cubins.get(source, architecture, macros)
    Cubins(Nvrtc(newer), tmp_path).get("a", "sm_90")
    assert len(library.compiled) == 4
    assert len(newer.compiled) == 1
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize("damage", [b"", b"short", "truncated", "changed"])
def test_a_damaged_file_is_compiled_again(damage: bytes | str, tmp_path: Path) -> None:
    library = NvrtcDouble()
    cubins = Cubins(Nvrtc(library), tmp_path)
    cubins.get("text", "sm_90")
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    damaged = {"truncated": whole[:-1], "changed": whole[:-1] + b"?"}
    file.write_bytes(damage if isinstance(damage, bytes) else damaged[damage])
    assert cubins.get("text", "sm_90") == library.cubin
    assert len(library.compiled) == 2
    assert file.read_bytes() == whole


def test_the_users_cache_folder_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    Cubins(Nvrtc(NvrtcDouble())).get("text", "sm_90")
    assert len(list((tmp_path / "vllm-toptheta" / "cubins").glob("*.cubin"))) == 1


def test_a_home_that_cannot_be_written_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # a file where the folder should be, which stops root too
    (tmp_path / "cache").write_text("")
    library = NvrtcDouble()
    cubins = Cubins(Nvrtc(library), tmp_path / "cache" / "cubins")
    with caplog.at_level(logging.WARNING, "vllm.toptheta"):
        assert cubins.get("a", "sm_90") == library.cubin
        assert cubins.get("b", "sm_90") == library.cubin
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "Compiled kernels cannot be kept, so each start compiles them"
    ]


def test_a_full_disk_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*names: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    library = NvrtcDouble()
    monkeypatch.setattr(os, "replace", full)
    assert Cubins(Nvrtc(library), tmp_path).get("text", "sm_90") == library.cubin
    assert list(tmp_path.iterdir()) == []


def load_double(driver: DriverDouble, compiler: NvrtcDouble, folder: Path, *, name: str = "kernel") -> Kernel:
    return load(Cubins(Nvrtc(compiler), folder), Driver(driver), "text", "sm_90", name, (), 196608)


def test_a_cubin_that_the_driver_refuses_is_compiled_again(tmp_path: Path) -> None:
    driver, compiler = DriverDouble(), NvrtcDouble()
    load_double(DriverDouble(), NvrtcDouble(REFUSED[:-1]), tmp_path)  # the file now holds another cubin
    Cubins(Nvrtc(NvrtcDouble(REFUSED)), tmp_path).get("text", "sm_90", is_fresh=True)
    load_double(driver, compiler, tmp_path)
    assert driver.loaded == [REFUSED, compiler.cubin]
    # the file was replaced
    load_double(driver, compiler, tmp_path)
    assert driver.loaded[2:] == [compiler.cubin]
    assert len(compiler.compiled) == 1


def test_what_the_driver_refuses_twice_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DriverError, match=r"cuModuleLoadData: device kernel image is invalid \(200\)"):
        load_double(DriverDouble(), NvrtcDouble(REFUSED), tmp_path)
    with pytest.raises(DriverError, match=r"cuModuleGetFunction of other: unknown error \(500\)"):
        load_double(DriverDouble(), NvrtcDouble(), tmp_path, name="other")


def test_shared_memory_is_raised_and_refused() -> None:
    driver = DriverDouble()
    Driver(driver).load(b"cubin", "kernel", 196608)
    assert (driver.attributes[8], driver.attributes[9]) == (196608, 100)
    with pytest.raises(DriverError, match=r"cuFuncSetAttribute\(8, 300000\) of kernel: invalid argument"):
        Driver(driver).load(b"cubin", "kernel", 300000)


def test_registers_and_spills_are_told() -> None:
    kernel = Driver(DriverDouble()).load(b"cubin", "kernel", 0)
    assert kernel.attributes() == KernelAttributes(num_registers=168, local_bytes=16)


def test_launches_are_laid_out_as_the_driver_reads_them() -> None:
    driver = DriverDouble(ctypes.sizeof(Arguments))
    kernel = Driver(driver).load(b"cubin", "kernel", 196608)
    arguments = Arguments(0x7F00DEADBEEF, -3, 0.5)
    kernel.launch(arguments=arguments, **LAUNCH)
    first = bytes(arguments)
    arguments.number = 8
    kernel.launch(arguments=arguments, **LAUNCH | {"grid": (7, 1, 1), "is_early": True, "stream": 0})
    kernel.launch(arguments=arguments, **LAUNCH)
    common = {"block": (128, 1, 1), "shared_bytes": 65536}
    early = (6).to_bytes(8, "little") + (1).to_bytes(64, "little")
    assert driver.launches == [
        {**common, "grid": (4, 5, 6), "stream": 0x1234567890AB, "attributes": [], "arguments": first},
        {**common, "grid": (7, 1, 1), "stream": 0, "attributes": [early], "arguments": bytes(arguments)},
        {**common, "grid": (4, 5, 6), "stream": 0x1234567890AB, "attributes": [], "arguments": bytes(arguments)},
    ]


def test_a_refused_launch_says_what_was_launched() -> None:
    driver = DriverDouble(ctypes.sizeof(Arguments))
    driver.launch_result = 1
    kernel = Driver(driver).load(b"cubin", "kernel", 0)
    with pytest.raises(
        DriverError, match=r"launch of kernel\(4, 5, 6\) with 128 threads, 65536 bytes: invalid argument"
    ):
        kernel.launch(arguments=Arguments(), **LAUNCH)
