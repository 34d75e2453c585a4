"""Runs one program under limits; started by `sandbox.run_program` in a process of its own, from a temporary folder.

It reads a request as JSON from standard input, takes away from itself what it can, runs the program, and only if that
ends without an exception writes the request's token to standard output. The program cannot write there.
"""

import ctypes
import json
import os
import resource
import sys
from typing import Any

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
# what a program has no business with: other processes, the network, and the file system outside its folder
_FORBIDDEN = (
    "ctypes.",
    "ftplib.",
    "http.client.",
    "os.chflags",
    "os.chmod",
    "os.chown",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.kill",
    "os.killpg",
    "os.link",
    "os.posix_spawn",
    "os.putenv",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.setxattr",
    "os.spawn",
    "os.startfile",
    "os.symlink",
    "os.system",
    "os.truncate",
    "os.utime",
    "pty.",
    "shutil.",
    "signal.pthread_kill",
    "smtplib.",
    "socket.",
    "subprocess.",
    "sys.addaudithook",
    "urllib.",
    "webbrowser.",
)


def _limit(request: dict[str, Any]) -> None:
    for limit, value in (
        (resource.RLIMIT_CPU, request["cpu_seconds"]),
        (resource.RLIMIT_AS, request["memory_bytes"]),
        (resource.RLIMIT_FSIZE, request["file_bytes"]),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))


def _leave_network() -> None:
    """Moves into an empty network namespace, where the kernel lets us; the audit hook stands either way."""
    if hasattr(ctypes.CDLL(None), "unshare"):
        ctypes.CDLL(None).unshare(_CLONE_NEWUSER | _CLONE_NEWNET)


def _forbid() -> None:
    folder = os.getcwd() + os.sep

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(_FORBIDDEN):
            raise PermissionError(f"{event} is not allowed")
        if event == "open" and not isinstance(arguments[0], int):
            path, _, flags = arguments
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND))
            if writes and not os.path.abspath(os.fspath(path)).startswith(folder):
                raise PermissionError(f"writing to {path!r} is not allowed")

    sys.addaudithook(hook)


def main() -> None:
    request = json.load(sys.stdin)
    result = os.dup(sys.stdout.fileno())
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())
    _leave_network()
    _limit(request)
    program = compile(request["program"], "<program>", "exec")
    _forbid()
    exec(program, {"__name__": "__main__"})  # noqa: S102 - what this file is for
    os.write(result, request["token"].encode())


if __name__ == "__main__":
    main()
