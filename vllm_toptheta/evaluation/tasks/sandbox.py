"""Runs programs that a model wrote: in a process of their own, with limits, without a network as far as possible.

The limits are the kernel's (processor time, memory, file sizes, processes), the time on the wall is watched from
outside, and what else the program may do is held by an audit hook in its interpreter. That stops accidents and clumsy
programs. It is no wall against an attacker: on a machine that matters, run the evaluation in a container as well.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

__all__ = ["run_program"]

_CHILD = Path(__file__).with_name("sandbox_child.py")
_MEMORY_BYTES = 1 << 30
_FILE_BYTES = 1 << 20


def run_program(program: str, *, timeout: float = 10.0) -> bool:
    """Returns whether a Python program ends by itself, without an exception and within the limits.

    Args:
        program: the source. It sees the standard library, an empty folder and no environment.
        timeout: seconds, of processor time and on the wall.
    """
    token = secrets.token_hex(16)
    request = {
        "program": program,
        "token": token,
        "cpu_seconds": max(1, round(timeout)),
        "memory_bytes": _MEMORY_BYTES,
        "file_bytes": _FILE_BYTES,
    }
    # -I and -S: nothing of this environment's packages and nothing from the current folder
    command = [sys.executable, "-I", "-S", "-B", str(_CHILD)]
    with tempfile.TemporaryDirectory(prefix="toptheta-") as folder:
        process = subprocess.Popen(  # noqa: S603 - the interpreter that runs us, and a file of ours
            command,
            cwd=folder,
            env={"PYTHONHASHSEED": "0"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            written, _ = process.communicate(json.dumps(request).encode(), timeout=timeout)
        except subprocess.TimeoutExpired:
            # its session, so that nothing it may have started is left
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return False
    return written.decode(errors="replace") == token
