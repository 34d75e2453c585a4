"""Python code on a vLLM release other than the installed one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

# every piece of code runs in a fork, so that vLLM is imported once and nothing that is patched stays
_FORKS = """
import json, os, sys, traceback
import vllm.config
for line in sys.stdin:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writing, 1), os.dup2(writing, 2)
        status = 1
        try:
            exec(json.loads(line), {"__name__": "__main__"})
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
    os.close(writing)
    with open(reading) as output:
        text = output.read()
    print(json.dumps({"text": text, "failed": os.waitpid(child, 0)[1] != 0}), flush=True)
"""


class Release(NamedTuple):
    """A vLLM release, and a process that has imported it.

    Attributes:
        files: Its Python files.
        process: Runs what `run` is given.
    """

    files: Path
    process: subprocess.Popen[str]

    def run(self, code: str) -> str:
        """Run `code` in a process of its own; its last line of output."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()
        # vLLM may print while it is imported
        answer = next((line for line in self.process.stdout if line.startswith("{")), None)
        assert answer is not None, f"vLLM of {self.files} could not be imported, or its process ended; see stderr"
        done = json.loads(answer)
        assert not done["failed"], done["text"][-4000:]
        return str(done["text"].strip().splitlines()[-1])


@contextmanager
def release_of(files: Path) -> Iterator[Release]:
    """Start a process whose vLLM is `files`."""
    environment = {**os.environ, "PYTHONPATH": str(files), "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", _FORKS]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield Release(files, process)
