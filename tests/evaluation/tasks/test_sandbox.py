import time

import pytest

from vllm_toptheta.evaluation.tasks.sandbox import run_program


def test_a_program_that_ends_by_itself_passes() -> None:
    assert run_program("import math\nassert math.isqrt(17) == 4\nprint('noise')\n")
    assert run_program("open('here.txt', 'w').write('x')\nassert open('here.txt').read() == 'x'\n")


@pytest.mark.parametrize(
    "program",
    [
        "assert 1 == 2",
        "this is no Python",
        "raise SystemExit(0)",
        "import os\nos._exit(0)",
        "import sys\nsys.stdout.write('0' * 32)\nraise ValueError",
        "import torch",  # packages of ours are none of a program's
    ],
)
def test_what_does_not_end_by_itself_fails(program: str) -> None:
    assert not run_program(program)


@pytest.mark.parametrize(
    "attempt",
    [
        "import socket\nsocket.socket().bind(('127.0.0.1', 0))",
        "import socket\nsocket.getaddrinfo('localhost', 80)",
        "import urllib.request\nurllib.request.urlopen('http://localhost')",
        "import subprocess, sys\nsubprocess.run([sys.executable, '-c', ''])",
        "import os\nos.system('true')",
        "import os\nos.fork()",
        "import os\nos.execv('/bin/true', ['true'])",
        "import os\nos.kill(os.getppid(), 0)",
        "import os\nos.remove('/etc/hostname')",
        "open('../outside.txt', 'w')",
        "import ctypes\nctypes.CDLL(None)",
        "x = bytearray(4 << 30)",
        "open('large', 'wb').write(bytes(4 << 20))",
    ],
)
def test_what_a_program_has_no_business_with_is_an_error(attempt: str) -> None:
    # the program passes if its attempt fails, whatever it fails with
    caught = f"try:\n    exec({attempt!r})\nexcept BaseException:\n    pass\nelse:\n    raise AssertionError\n"
    assert run_program(caught)
    assert not run_program(attempt)


def test_a_program_that_does_not_end_is_ended() -> None:
    start = time.perf_counter()
    assert not run_program("while True: pass", timeout=1.0)
    assert not run_program("import time\ntime.sleep(60)", timeout=0.5)
    assert time.perf_counter() - start < 20


def test_a_program_sees_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOPTHETA_SECRET", "x")
    assert run_program("import os\nassert 'TOPTHETA_SECRET' not in os.environ\nassert os.listdir() == []")
