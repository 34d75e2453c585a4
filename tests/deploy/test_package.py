"""The wheel and the sdist: what is in them, and that the wheel works where nothing else of the repository is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import vllm_toptheta
from tests.deploy.image import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSION = PROJECT["version"]
BUILDS = ["-m", "hatchling", "build"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel that is made of nothing but the sdist."""
    folder = tmp_path_factory.mktemp("built")
    subprocess.run([sys.executable, *BUILDS, "-t", "sdist", "-d", folder], cwd=ROOT, check=True, capture_output=True)
    (sdist,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(sdist, folder / "unpacked")
    (source,) = (folder / "unpacked").iterdir()
    subprocess.run([sys.executable, *BUILDS, "-t", "wheel", "-d", folder], cwd=source, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel, whose dependencies are those of the environment that runs the tests.

    Files that put an editable package on the path are not read in folders that such a file names, so the package is
    the wheel's.
    """
    folder = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin/python", "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", built[1]], check=True, capture_output=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    others = [name for name in sys.path if name.endswith("site-packages")]
    (packages / "dependencies.pth").write_text("\n".join(others))
    return folder


def run(environment: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the environment."""
    ours = ("PYTHONPATH", "TOPTHETA_")
    variables = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    words = [environment / "bin" / command[0], *command[1:]]
    return subprocess.run(words, cwd=environment, env=variables, capture_output=True, text=True, check=False)


def test_the_version_is_the_same_everywhere() -> None:
    assert vllm_toptheta.__version__ == VERSION
    assert f"\n## {VERSION} (" in (ROOT / "CHANGELOG.md").read_text()


def test_the_wheel_carries_the_package_the_thresholds_and_the_licence(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as archive:
        names = set(archive.namelist())
    listed = subprocess.run(
        ["git", "ls-files", "vllm_toptheta", "thresholds"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    ours = {name if name.startswith("vllm_toptheta/") else f"vllm_toptheta/{name}" for name in listed}
    assert ours <= names
    assert f"vllm_toptheta-{VERSION}.dist-info/licenses/LICENSE" in names
    assert all(name.startswith(("vllm_toptheta/", f"vllm_toptheta-{VERSION}.dist-info/")) for name in names)


def test_the_sdist_carries_what_the_wheel_is_made_of_and_what_tests_it(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "SECURITY.md", "CONTRIBUTING.md"} <= names
    assert {"tests/test_layout.py", "tools/picture.py", "docs/README.md", "Makefile"} <= names
    assert not [name for name in names if name.startswith(("docs/results", ".git/"))]


def test_the_metadata_are_complete(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as archive:
        metadata = message_from_string(archive.read(f"vllm_toptheta-{VERSION}.dist-info/METADATA").decode())
    assert (metadata["Name"], metadata["Version"]) == ("vllm-toptheta", VERSION)
    assert (metadata["License-Expression"], metadata["License-File"]) == ("Apache-2.0", "LICENSE")
    assert metadata["Description-Content-Type"] == "text/markdown"
    for field in ("Summary", "Author", "Keywords", "Requires-Python", "Project-URL", "Classifier"):
        assert metadata[field], field
    assert {"gpu", "cpu", "cpu-dev", "report"} <= set(metadata.get_all("Provides-Extra", []))


def test_extras_that_name_extras_name_some() -> None:
    extras = PROJECT["optional-dependencies"]
    inner = [Requirement(text) for texts in extras.values() for text in texts if text.startswith(PROJECT["name"])]
    assert inner
    assert {name for requirement in inner for name in requirement.extras} <= extras.keys()


def test_the_installed_wheel_has_its_thresholds_its_command_and_its_entry_points(installed: Path) -> None:
    shown = run(installed, "toptheta", "thresholds", "list")
    assert shown.returncode == 0, shown.stderr
    assert "SmolLM2-135M-Instruct" in shown.stdout
    script = (
        "import vllm_toptheta; from importlib.metadata import entry_points, version; "
        "print(vllm_toptheta.__file__, version('vllm-toptheta')); "
        "print(sorted(e.group for e in entry_points(name='toptheta') if e.load()))"
    )
    found = run(installed, "python", "-c", script)
    assert found.returncode == 0, found.stderr
    place, groups = found.stdout.splitlines()[-2:]
    assert place.startswith(str(installed))
    assert place.endswith(f" {VERSION}")
    assert groups == "['console_scripts', 'vllm.endpoint_plugins', 'vllm.general_plugins']"
