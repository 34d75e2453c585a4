"""Run the steps of a Dockerfile without Docker, and then what it starts: `python -m tests.deploy.image --help`.

A stage is an overlay on this machine's root file system, which stands for the base image, so that every step runs as
written, on absolute paths, and this machine stays as it is. The server runs as the image's user on a read-only root,
with the image's environment alone and in a network of its own that holds nothing but the loopback device. That is
`docker run --read-only --network none`. Needs Linux and root; everything ends with the process.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.deploy.dockerfile import Instruction, context_files, expand, instructions

ROOT = Path(__file__).parents[2]
PATH = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
# settings of this machine's package clients, without which no step could install anything
CLIENT_SETTINGS = ("PIP_FIND_LINKS", "PIP_CERT", "PIP_DEFAULT_TIMEOUT", "SSL_CERT_FILE", "http_proxy", "https_proxy")
IN_OWN_NETWORK = """
import fcntl, os, socket, struct, sys
up, running, set_flags = 0x1, 0x40, 0x8914
fcntl.ioctl(socket.socket(socket.AF_INET, socket.SOCK_DGRAM), set_flags, struct.pack("16sh", b"lo", up | running))
os.execvp(sys.argv[1], sys.argv[1:])
"""


@dataclass(frozen=True)
class Image:
    """A stage of the build: the folders laid over each other, the topmost first, and the settings."""

    layers: tuple[Path, ...]
    environment: dict[str, str]
    arguments: dict[str, str] = field(default_factory=dict)
    user: str = "0:0"
    workdir: str = "/"
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    healthcheck: tuple[str, ...] = ()


class Builder:
    """Runs a Dockerfile's instructions; each stage's files lie below `scratch`."""

    def __init__(self, context: Path, scratch: Path) -> None:
        self.context = context
        self.scratch = scratch
        self.base = base_image(scratch)
        self.stages: dict[str, Image] = {}

    def build(self, dockerfile: Path) -> Image:
        """Run every step; return the last stage."""
        arguments: dict[str, str] = {}
        image: Image | None = None
        for instruction in instructions(dockerfile):
            if instruction.name == "ARG" and image is None:
                name, _, default = instruction.text.partition("=")
                arguments[name] = default
            elif instruction.name == "FROM":
                source, *alias = expand(instruction.text, arguments).split()
                image = self.start(source, alias[1] if alias else source)
            else:
                assert image is not None, f"{instruction.name} before FROM"
                image = self.step(image, instruction)
                self.stages[list(self.stages)[-1]] = image
        assert image is not None
        return image

    def start(self, source: str, name: str) -> Image:
        parent = self.stages.get(source) or self.base
        layer = new_folder(self.scratch / name)
        self.stages[name] = replace(parent, layers=(layer, *parent.layers), arguments={})
        return self.stages[name]

    def step(self, image: Image, instruction: Instruction) -> Image:
        text = expand(instruction.text, image.environment | image.arguments)
        match instruction.name:
            case "RUN":
                self.run(image, instruction)
            case "COPY":
                self.copy(image, replace(instruction, text=text))
            case "ARG":
                return replace(image, arguments=image.arguments | {text.partition("=")[0]: text.partition("=")[2]})
            case "ENV":
                pairs = [word.partition("=") for word in replace(instruction, text=text).words]
                return replace(image, environment=image.environment | {key: value for key, _, value in pairs})
            case "WORKDIR":
                (image.layers[0] / text.lstrip("/")).mkdir(parents=True, exist_ok=True)
                return replace(image, workdir=text)
            case "USER":
                return replace(image, user=text)
            case "ENTRYPOINT":
                return replace(image, entrypoint=tuple(instruction.words))
            case "CMD":
                return replace(image, command=tuple(instruction.words))
            case "HEALTHCHECK":
                return replace(image, healthcheck=tuple(json.loads(instruction.text.removeprefix("CMD"))))
            case "LABEL" | "EXPOSE" | "STOPSIGNAL":
                pass
            case name:
                raise NotImplementedError(f"no way to run {name} {text}")
        return image

    def run(self, image: Image, instruction: Instruction) -> None:
        started = time.monotonic()
        with_mounts = []
        for flag, value in instruction.flags:
            mount = dict(part.split("=", 1) for part in value.split(","))
            assert (flag, mount.get("type")) == ("mount", "bind"), f"no way to run --{flag}={value}"
            with_mounts.append((mounted(self.stages[mount["from"]], self.scratch), mount["source"], mount["target"]))
        root = mounted(image, self.scratch, writable=True)
        for source_root, source, target in with_mounts:
            bind(source_root / source.lstrip("/"), root / target.lstrip("/"))
        settings = {name: os.environ[name] for name in CLIENT_SETTINGS if name in os.environ}
        inside(root, image, ["/bin/sh", "-c", instruction.text], settings | image.arguments | image.environment)
        unmount(root)
        log(f"RUN {instruction.text[:60]}... took {time.monotonic() - started:.0f} s")

    def copy(self, image: Image, instruction: Instruction) -> None:
        *sources, target = instruction.words
        root = mounted(image, self.scratch, writable=True)
        destination = root / os.path.join(image.workdir, target).lstrip("/")
        stage = dict(instruction.flags).get("from")
        for source in sources:
            if stage is not None:
                copied = mounted(self.stages[stage], self.scratch) / source.lstrip("/")
                subprocess.run(["cp", "-a", "--no-target-directory", copied, destination], check=True)
                continue
            files = list(context_files(self.context, self.context / ".dockerignore", source))
            assert files, f"COPY {source}: .dockerignore leaves nothing of it"
            for file in files:
                within = file.relative_to(source) if str(file) != source else Path(file.name)
                place = destination if str(file) == source and not target.endswith("/") else destination / within
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.context / file, place)
        unmount(root)


def base_image(scratch: Path) -> Image:
    """This machine's files; like the image `python`, with an interpreter that is found first and open to everyone."""
    root, upper, work = (new_folder(scratch / f"base-{name}") for name in ("root", "upper", "work"))
    overlay(root, [Path("/")], upper, work)
    binaries = Path(sys.base_prefix) / "bin"
    for parent in (binaries, *binaries.parents):
        folder = root / str(parent).lstrip("/")
        folder.chmod(folder.stat().st_mode | 0o055)
    return Image(layers=(root,), environment={"PATH": f"{binaries}:{PATH}"})


def overlay(root: Path, lower: Sequence[Path], upper: Path | None = None, work: Path | None = None) -> None:
    options = f"lowerdir={':'.join(map(str, lower))}" + (f",upperdir={upper},workdir={work}" if upper else "")
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, root], check=True)


def new_folder(path: Path) -> Path:
    path.mkdir(parents=True, mode=0o755)
    return path


def mounted(image: Image, scratch: Path, *, writable: bool = False) -> Path:
    """Mount the image's layers; read-only ones for good, writable ones until `unmount`."""
    number = len(list(scratch.glob("mount-*")))
    root, work = new_folder(scratch / f"mount-{number}"), new_folder(scratch / f"work-{number}")
    if writable:
        overlay(root, image.layers[1:], image.layers[0], work)
        add_devices(root)
    else:
        overlay(root, image.layers)
    return root


def add_devices(root: Path) -> None:
    for name in ("dev", "proc", "sys"):
        subprocess.run(["mount", "--rbind", f"/{name}", root / name], check=True)
    add_tmpfs(root / "tmp", mode="1777")


def add_tmpfs(folder: Path, *, mode: str, owner: str = "0:0") -> None:
    user, group = owner.split(":")
    options = f"mode={mode},uid={user},gid={group}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)


def bind(source: Path, target: Path) -> None:
    if not target.exists():
        make_like(source, target)
    subprocess.run(["mount", "--bind", source, target], check=True)


def make_like(source: Path, target: Path) -> None:
    """Make an empty folder or file to mount `source` on."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.mkdir() if source.is_dir() else target.touch()


def unmount(root: Path) -> None:
    subprocess.run(["umount", "--recursive", root], check=True)


def chroot(root: Path, image: Image, argv: Sequence[str]) -> list[str]:
    """The command that runs `argv` inside, as the image's user in its folder."""
    enter = f'cd {image.workdir} && exec "$@"'
    return ["chroot", f"--userspec={image.user}", str(root), "/bin/sh", "-c", enter, "sh", *argv]


def inside(root: Path, image: Image, argv: Sequence[str], environment: Mapping[str, str]) -> str:
    """Run a command to its end; return what it printed."""
    done = subprocess.run(
        chroot(root, image, argv), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise SystemExit(f"{argv}: exit code {done.returncode}\n{done.stdout[-6000:]}")
    return done.stdout


def log(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


class Container:
    """A built image at work: read-only, without a network, writable only in /tmp, its home and its volumes."""

    def __init__(self, image: Image, scratch: Path, volumes: Mapping[str, Path]) -> None:
        self.image = image
        points = new_folder(scratch / "mount-points")
        for target, source in volumes.items():
            make_like(source, points / target.lstrip("/"))
        self.root = mounted(replace(image, layers=(points, *image.layers)), scratch)
        add_devices(self.root)
        add_tmpfs(self.root / image.environment["HOME"].lstrip("/"), mode="0775", owner=image.user)
        for target, source in volumes.items():
            bind(source, self.root / target.lstrip("/"))

    def execute(self, argv: Sequence[str]) -> str:
        """Run another command in the image, as `docker run --entrypoint` does."""
        return inside(self.root, self.image, argv, self.image.environment)

    def start(self, arguments: Sequence[str], output: Path) -> subprocess.Popen[bytes]:
        """Start the entrypoint, with the image's own arguments if there are none."""
        argv = [*self.image.entrypoint, *(arguments or self.image.command)]
        isolated = ["unshare", "--net", sys.executable, "-c", IN_OWN_NETWORK]
        with output.open("wb") as stream:
            return subprocess.Popen(
                [*isolated, *chroot(self.root, self.image, argv)],
                env=self.image.environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
            )

    def beside(self, server: subprocess.Popen[bytes], argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Run a command in the network of a server, as `docker exec` does."""
        enter = ["nsenter", f"--net=/proc/{server.pid}/ns/net"]
        command = [*enter, *chroot(self.root, self.image, argv)]
        return subprocess.run(command, env=self.image.environment, capture_output=True, text=True)

    def wait_until_healthy(self, server: subprocess.Popen[bytes], output: Path, seconds: float) -> None:
        """Repeat the image's own health check until it succeeds."""
        deadline = time.monotonic() + seconds
        while self.beside(server, self.image.healthcheck).returncode:
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"not healthy, exit code {server.poll()}\n{output.read_text()[-6000:]}")
            time.sleep(1)
