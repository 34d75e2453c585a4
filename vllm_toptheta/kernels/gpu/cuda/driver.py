"""Loading and launching of cubins by CUDA's driver, in the contexts that torch makes."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

# CUfunction_attribute
_LOCAL_BYTES = 3
_NUM_REGISTERS = 4
_MAX_DYNAMIC_SHARED_BYTES = 8
_PREFERRED_SHARED_CARVEOUT = 9

_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID


class DriverError(RuntimeError):
    """CUDA's driver refuses something."""


class _LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute; the value is a union of 64 bytes, of which an int is used."""

    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60)]


class _LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        *((f"grid_{axis}", ctypes.c_uint) for axis in "xyz"),
        *((f"block_{axis}", ctypes.c_uint) for axis in "xyz"),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("num_attributes", ctypes.c_uint),
    ]


@dataclass(frozen=True)
class KernelAttributes:
    """What the compiler made of a kernel.

    Attributes:
        num_registers: Registers of a thread.
        local_bytes: Local memory of a thread in bytes; more than 0 where registers are spilled.
    """

    num_registers: int
    local_bytes: int


class Driver:
    """The driver's library.

    Args:
        library: What has the driver's functions: a `ctypes.CDLL`, or a double of it.
    """

    def __init__(self, library: Any) -> None:
        self._library = library
        self.launch = library.cuLaunchKernelEx

    def load(self, cubin: bytes, name: str, max_shared_bytes: int) -> Kernel:
        """Load a cubin into the current context, for as long as the process lives.

        Not while a CUDA graph is captured.

        Args:
            cubin: For the architecture of the context's device.
            name: Of an `extern "C"` kernel that takes one struct by value.
            max_shared_bytes: Dynamic shared memory of a CTA that launches may ask for; the L1 cache gives way to it.

        Raises:
            DriverError: There is no current context, the cubin is damaged or for another device, it has no such kernel,
                or the device has less shared memory.
        """
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self.check(self._library.cuModuleLoadData(ctypes.byref(module), cubin), "cuModuleLoadData")
        found = self._library.cuModuleGetFunction(ctypes.byref(function), module, name.encode())
        self.check(found, f"cuModuleGetFunction of {name}")
        for attribute, value in ((_MAX_DYNAMIC_SHARED_BYTES, max_shared_bytes), (_PREFERRED_SHARED_CARVEOUT, 100)):
            result = self._library.cuFuncSetAttribute(function, attribute, value)
            self.check(result, f"cuFuncSetAttribute({attribute}, {value}) of {name}")
        return Kernel(self, name, function)

    def attribute(self, function: ctypes.c_void_p, attribute: int) -> int:
        """A number that the driver knows of a function."""
        value = ctypes.c_int()
        result = self._library.cuFuncGetAttribute(ctypes.byref(value), attribute, function)
        self.check(result, f"cuFuncGetAttribute({attribute})")
        return value.value

    def check(self, result: int, what: str) -> None:
        """Raise what the driver says of an error.

        Raises:
            DriverError: `result` is not success.
        """
        if result != 0:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(result, ctypes.byref(text))
            raise DriverError(f"{what}: {(text.value or b'unknown error').decode()} ({result})")


class Kernel:
    """A kernel on one device. One thread at a time launches it: what describes a launch is made once and reused.

    Args:
        driver: The driver that has loaded it.
        name: For messages.
        function: The driver's CUfunction.
    """

    def __init__(self, driver: Driver, name: str, function: ctypes.c_void_p) -> None:
        self._driver = driver
        self._name = name
        self._function = function
        self._early = _LaunchAttribute(id=_PROGRAMMATIC_STREAM_SERIALIZATION, value=1)
        self._config = _LaunchConfig(block_y=1, block_z=1, attributes=ctypes.pointer(self._early))
        self._config_pointer = ctypes.byref(self._config)
        self._parameters = (ctypes.c_void_p * 1)()

    def launch(
        self,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        arguments: ctypes.Structure,
        stream: int,
        is_early: bool,
    ) -> None:
        """Enqueue the kernel, also into a CUDA graph that is captured on the stream.

        The context that it was loaded into must be current. `arguments` may change as soon as this returns; what it
        points to must live until the kernel has run.

        Args:
            grid: CTAs along x, y and z.
            threads: Threads of a CTA.
            shared_bytes: Dynamic shared memory of a CTA.
            arguments: The struct that the kernel takes by value, laid out as the kernel declares it.
            stream: The CUstream, `torch.cuda.current_stream().cuda_stream`.
            is_early: Start while the predecessor in the stream ends; the kernel waits for it by itself. From compute
                capability 9.0 on.

        Raises:
            DriverError: The driver refuses the launch, or an earlier kernel has failed.
        """
        config = self._config
        config.grid_x, config.grid_y, config.grid_z = grid
        config.block_x = threads
        config.shared_bytes = shared_bytes
        config.stream = stream
        config.num_attributes = 1 if is_early else 0
        self._parameters[0] = ctypes.addressof(arguments)
        result = self._driver.launch(self._config_pointer, self._function, self._parameters, None)
        if result != 0:
            self._driver.check(result, f"launch of {self._name}{grid} with {threads} threads, {shared_bytes} bytes")

    def attributes(self) -> KernelAttributes:
        """Registers and spills."""
        return KernelAttributes(
            num_registers=self._driver.attribute(self._function, _NUM_REGISTERS),
            local_bytes=self._driver.attribute(self._function, _LOCAL_BYTES),
        )


@functools.cache
def find_driver() -> Driver:
    """The installed driver.

    Raises:
        OSError: There is none.
    """
    return Driver(ctypes.CDLL("libcuda.so.1"))
