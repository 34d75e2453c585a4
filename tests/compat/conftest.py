"""The Python files of vLLM releases, downloaded once into the cache folder."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import vllm

from tests.compat.release import Release, release_of
from vllm_toptheta.cache_folder import cache_folder

INSTALLED = "installed"
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (17, 28, 31, 34, 35)]


def unpacked(version: str) -> Path:
    """A folder for PYTHONPATH with the Python files of vLLM `version`, named as the CPU build of itself.

    The kernels are left out: what is tested is the contract, which is Python.
    """
    folder = cache_folder() / "compat" / f"vllm-{version}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        options = ["--no-deps", "--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
        for platform in PLATFORMS:
            options += ["--platform", platform]
        command = [sys.executable, "-m", "pip", "download", "-q", *options, "-d", scratch, f"vllm=={version}"]
        subprocess.run(command, check=True, capture_output=True)
        site = Path(scratch, "site")
        with zipfile.ZipFile(next(Path(scratch).glob("vllm-*.whl"))) as wheel:
            names = [name for name in wheel.namelist() if name.startswith("vllm/") and name.endswith((".py", ".json"))]
            wheel.extractall(site, names)
        metadata = site / f"vllm-{version}+cpu.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
        site.rename(folder)
    return folder


@pytest.fixture(scope="session", params=["0.26.0", INSTALLED, "0.33.0"])
def release(request: pytest.FixtureRequest) -> Iterator[Release]:
    """The oldest and the newest supported release, and the installed one, in a process of its own like the others."""
    files = Path(vllm.__file__).parents[1] if request.param == INSTALLED else unpacked(request.param)
    with release_of(files) as started:
        yield started
