"""Registration: the name is known in every process, whatever its case, and costs nothing."""

from __future__ import annotations

import pickle
import subprocess
import sys

import cloudpickle
import pytest

from vllm_toptheta.backend import plugin
from vllm_toptheta.backend.hooks import backend_name


@pytest.fixture(autouse=True)
def _registered() -> None:
    plugin.register()


def test_entry_points_are_declared() -> None:
    from importlib.metadata import entry_points

    for group in ("vllm.general_plugins", "vllm.endpoint_plugins"):
        (point,) = entry_points(group=group, name="toptheta")
        assert callable(point.load())


def test_register_twice() -> None:
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    select = type(current_platform).get_attn_backend_cls
    plugin.register()
    assert type(current_platform).get_attn_backend_cls is select
    assert AttentionBackendEnum["TOPTHETA"].get_path() == backend_name.CPU_BACKEND


@pytest.mark.parametrize("name", ["toptheta", "TOPTHETA", "TopTheta"])
def test_name_in_any_case(name: str) -> None:
    from vllm.config import AttentionConfig

    assert AttentionConfig(backend=name).backend.name == "TOPTHETA"


@pytest.mark.parametrize("dumps", [pickle.dumps, cloudpickle.dumps])
def test_a_spawned_process_unpickles_the_member_before_it_loads_plugins(dumps) -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum as Backends

    members = dumps([Backends.TOPTHETA, Backends.CPU_ATTN, Backends.CUSTOM])
    code = "import pickle, sys; print([member.name for member in pickle.loads(sys.stdin.buffer.read())])"
    process = subprocess.run([sys.executable, "-c", code], input=members, capture_output=True, check=True)
    assert process.stdout.decode().strip().endswith("['TOPTHETA', 'CPU_ATTN', 'CUSTOM']")


def test_registration_loads_no_kernel_and_no_transformers() -> None:
    # what vLLM itself has loaded by the time it calls plugins does not count
    code = (
        "import sys, vllm.platforms, vllm.v1.attention.backends.registry, vllm.v1.worker.worker_base\n"
        "before = set(sys.modules)\n"
        "from vllm_toptheta.backend.plugin import register; register()\n"
        "print(sorted(name for name in set(sys.modules) - before))\n"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    loaded = eval(process.stdout.strip().splitlines()[-1])  # noqa: S307 - our own list of names
    assert "vllm_toptheta.backend.plugin" in loaded
    # of the kernels only their records
    kernels = {name for name in loaded if name.startswith("vllm_toptheta.kernels")}
    records = ("", ".codec", ".contract", ".pages", ".cpu", ".cpu.scratch")
    assert kernels == {f"vllm_toptheta.kernels{name}" for name in records}
    assert not [
        name for name in loaded if name.startswith(("vllm_toptheta.calibration", "triton", "transformers.models"))
    ]
