"""Doubles of NVRTC's and the driver's libraries: they compile and load without either, and count what is asked."""

from __future__ import annotations

import ctypes
from typing import Any

REFUSED = b"refused"  # a cubin that the driver's double does not take


class NvrtcDouble:
    """Answers a source with `cubin`, or with an error if it has a log."""

    def __init__(self, cubin: bytes = b"\x7fELF cubin", log: str = "", result: int = 6) -> None:
        self.cubin = cubin
        self.log = log.encode() + b"\0"
        self.result = result if log else 0
        self.version = (13, 0)
        self.compiled: list[tuple[str, list[str]]] = []
        self.num_programs = 0

    def nvrtcVersion(self, major: Any, minor: Any) -> int:
        major._obj.value, minor._obj.value = self.version
        return 0

    def nvrtcCreateProgram(self, program: Any, source: bytes, name: bytes, num_headers: int, *headers: Any) -> int:
        assert num_headers == 0
        program._obj.value = 7
        self.num_programs += 1
        self.source = source.decode()
        return 0

    def nvrtcCompileProgram(self, program: ctypes.c_void_p, num_options: int, options: Any) -> int:
        self.compiled.append((self.source, [option.decode() for option in options[:num_options]]))
        return self.result

    def nvrtcGetCUBINSize(self, program: ctypes.c_void_p, size: Any) -> int:
        size._obj.value = len(self.cubin)
        return 0

    def nvrtcGetCUBIN(self, program: ctypes.c_void_p, content: Any) -> int:
        content.raw = self.cubin
        return 0

    def nvrtcGetProgramLogSize(self, program: ctypes.c_void_p, size: Any) -> int:
        size._obj.value = len(self.log)
        return 0

    def nvrtcGetProgramLog(self, program: ctypes.c_void_p, content: Any) -> int:
        content.raw = self.log
        return 0

    def nvrtcDestroyProgram(self, program: Any) -> int:
        self.num_programs -= 1
        return 0


class DriverDouble:
    """Takes every cubin but `REFUSED`, and keeps what launches say, as bytes."""

    def __init__(self, argument_bytes: int = 0) -> None:
        self.argument_bytes = argument_bytes
        self.loaded: list[bytes] = []
        self.attributes: dict[int, int] = {3: 16, 4: 168}
        self.launches: list[dict[str, Any]] = []
        self.launch_result = 0

    def cuModuleLoadData(self, module: Any, cubin: bytes) -> int:
        self.loaded.append(cubin)
        module._obj.value = len(self.loaded)
        return 200 if cubin == REFUSED else 0

    def cuModuleGetFunction(self, function: Any, module: ctypes.c_void_p, name: bytes) -> int:
        function._obj.value = 99
        return 0 if name == b"kernel" else 500

    def cuFuncSetAttribute(self, function: ctypes.c_void_p, attribute: int, value: int) -> int:
        self.attributes[attribute] = value
        return 1 if attribute == 8 and value > 227 * 1024 else 0

    def cuFuncGetAttribute(self, value: Any, attribute: int, function: ctypes.c_void_p) -> int:
        value._obj.value = self.attributes[attribute]
        return 0

    def cuGetErrorString(self, result: int, text: Any) -> int:
        text._obj.value = {200: b"device kernel image is invalid", 1: b"invalid argument"}.get(result)
        return 0

    def cuLaunchKernelEx(self, config: Any, function: ctypes.c_void_p, parameters: Any, extra: None) -> int:
        # at the offsets of the driver's own header, not by the names of the struct under test
        raw = ctypes.string_at(ctypes.addressof(config._obj), 56)
        numbers = [int.from_bytes(raw[i : i + 4], "little") for i in range(0, 28, 4)]
        stream, attributes = (int.from_bytes(raw[i : i + 8], "little") for i in (32, 40))
        count = int.from_bytes(raw[48:52], "little")
        self.launches.append(
            {
                "grid": tuple(numbers[:3]),
                "block": tuple(numbers[3:6]),
                "shared_bytes": numbers[6],
                "stream": stream,
                "attributes": [ctypes.string_at(attributes + 72 * i, 72) for i in range(count)],
                "arguments": ctypes.string_at(parameters[0], self.argument_bytes),
            }
        )
        return self.launch_result
