"""What a Dockerfile says: its instructions in order, and the files that its build context hands over."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from dockerfile_parse import DockerfileParser

_VARIABLE = re.compile(r"\$\{(\w+)\}|\$(\w+)")


@dataclass(frozen=True)
class Instruction:
    """One instruction: its name in capitals, its `--flags`, and the text that follows them."""

    name: str
    flags: tuple[tuple[str, str], ...]
    text: str

    @property
    def words(self) -> list[str]:
        """The text as an exec form's list, or split as a shell does."""
        return json.loads(self.text) if self.text.startswith("[") else shlex.split(self.text)


def instructions(dockerfile: Path) -> list[Instruction]:
    """Return the instructions of a Dockerfile, without comments."""
    with dockerfile.open("rb") as stream:
        parts = DockerfileParser(fileobj=stream).structure
    return [_split(part["instruction"], part["value"]) for part in parts if part["instruction"] != "COMMENT"]


def _split(name: str, value: str) -> Instruction:
    flags = []
    while match := re.match(r"--([\w-]+)=(\S+)\s+", value):
        flags.append((match[1], match[2]))
        value = value[match.end() :]
    return Instruction(name, tuple(flags), value.strip())


def expand(text: str, variables: Mapping[str, str]) -> str:
    """Replace $NAME and ${NAME}; unknown ones become empty, as in Docker."""
    return _VARIABLE.sub(lambda match: variables.get(match[1] or match[2], ""), text)


def context_files(context: Path, ignore_file: Path, path: str) -> Iterator[PurePosixPath]:
    """Yield the files at or below `path` of a build context that .dockerignore lets through, relative to it."""
    patterns = [
        (line.startswith("!"), line.removeprefix("!").strip("/"))
        for line in map(str.strip, ignore_file.read_text().splitlines())
        if line and not line.startswith("#")
    ]
    root = context / path
    for file in [root] if root.is_file() else sorted(root.rglob("*")):
        relative = PurePosixPath(file.relative_to(context).as_posix())
        if file.is_file() and not _ignored(relative, patterns):
            yield relative


def _ignored(path: PurePosixPath, patterns: list[tuple[bool, str]]) -> bool:
    candidates = [str(part) for part in (path, *path.parents)]
    ignored = False
    for included, pattern in patterns:
        # `**/` also stands for no folder at all
        forms = {pattern, pattern.removeprefix("**/")}
        if any(_matches(candidate, form) for candidate in candidates for form in forms):
            ignored = not included
    return ignored


def _matches(path: str, pattern: str) -> bool:
    # a star does not cross folders, except in **
    return fnmatch(path, pattern) and ("**" in pattern or path.count("/") == pattern.count("/"))
