"""vLLM's flags: passed on word for word, and read only where this package has something to add or to check."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_toptheta.errors import SettingsError

_VALUE = re.compile(r"^(?!-)|^-\.?\d|^-$")  # a word that is no flag: negative numbers are values


@dataclass(frozen=True)
class Flag:
    """A flag and the words that belong to it.

    Attributes:
        name: The flag as vLLM compares it: dashes for underscores, nothing behind `=`.
        words: As they were given.
    """

    name: str
    words: tuple[str, ...]

    @classmethod
    def of_words(cls, words: Iterable[str]) -> Flag:
        """A flag and its values."""
        first, *values = words
        return cls(first.split("=", 1)[0].replace("_", "-"), (first, *values))

    @property
    def value(self) -> str | None:
        """Its value; None for a bare flag or for several."""
        name, separator, inside = self.words[0].partition("=")
        if separator:
            return inside
        return self.words[1] if len(self.words) == 2 else None


def split(words: Iterable[str]) -> tuple[list[str], list[Flag]]:
    """What stands before the first flag, and the flags."""
    positional: list[str] = []
    groups: list[list[str]] = []
    for word in words:
        if not _VALUE.match(word):
            groups.append([word])
        else:
            (groups[-1] if groups else positional).append(word)
    return positional, [Flag.of_words(group) for group in groups]


def from_mapping(flags: Mapping[str, Any]) -> list[Flag]:
    """The flags that a configuration file names."""
    return [Flag.of_words(_words(name, value)) for name, value in flags.items()]


def _words(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if value is True:
        return [f"--{flag}"]
    if value is False:
        return [f"--no-{flag}"]
    values = value if isinstance(value, list) else [value]
    return [f"--{flag}", *(item if isinstance(item, str) else json.dumps(item) for item in values)]


def overlay(lower: list[Flag], upper: list[Flag]) -> list[Flag]:
    """Both lists, without those of `lower` that `upper` sets, in either of a switch's two forms."""
    named = {_switch(flag.name) for flag in upper}
    return [flag for flag in lower if _switch(flag.name) not in named] + upper


def _switch(name: str) -> str:
    return name.replace("--no-", "--", 1)


def find(flags: list[Flag], *names: str) -> Flag | None:
    """The flag of one of these names, the last one where there are several, as vLLM has it.

    Long names may be cut short, as argparse allows. Whether another flag starts likewise is left to vLLM, which then
    takes neither.
    """
    return next((flag for flag in reversed(flags) if any(_means(flag, name) for name in names)), None)


def _means(flag: Flag, name: str) -> bool:
    return flag.name == name or (len(flag.name) > 2 and flag.name.startswith("--") and name.startswith(flag.name))


def value_of(flags: list[Flag], *names: str) -> str | None:
    """The value of the flag of one of these names; None without one."""
    flag = find(flags, *names)
    return None if flag is None else flag.value


def is_on(flags: list[Flag], name: str, *, by_itself: bool = False) -> bool:
    """Whether a switch is on.

    Args:
        flags: What is given.
        name: Of the switch.
        by_itself: Whether it is on where nobody says anything.
    """
    flag = find(flags, name, name.replace("--", "--no-", 1))
    return by_itself if flag is None else not flag.name.startswith("--no-")


def integer(flags: list[Flag], *names: str) -> int | None:
    """The number that a flag holds; None without the flag.

    Raises:
        SettingsError: It holds none.
    """
    flag = find(flags, *names)
    if flag is None:
        return None
    try:
        return int(flag.value or "")
    except ValueError:
        raise SettingsError(f"expected an integer, got {flag.value}", field=flag.name, remedy="Correct it") from None


def json_object(flags: list[Flag], *names: str) -> dict[str, Any]:
    """The JSON object that a flag of vLLM's holds, or that dotted names such as `--flag.a.b value` make; {} without.

    Dotted names win over JSON, as in vLLM.

    Raises:
        SettingsError: The flag holds no JSON object.
    """
    content: dict[str, Any] = {}
    for flag in flags:
        name, *path = flag.words[0].partition("=")[0].split(".")
        if path and name.replace("_", "-") in names:
            _set(content, path, flag.value or "")
    if content:
        return content
    whole = find(flags, *names)
    return {} if whole is None else _parse(whole)


def _set(content: dict[str, Any], path: list[str], text: str) -> None:
    *parents, last = path
    for parent in parents:
        inside = content.get(parent)
        content[parent] = content = inside if isinstance(inside, dict) else {}
    if last.endswith("+"):
        name, values = last[:-1], text.split(",")
        before = content.get(name)
        content[name] = [*before, *values] if isinstance(before, list) else values
        return
    try:
        content[last] = json.loads(text)
    except ValueError:
        content[last] = text


def _parse(flag: Flag) -> dict[str, Any]:
    try:
        content = json.loads(flag.value or "")
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"not JSON: {error}", field=flag.name, remedy="Give a JSON object") from None
    if not isinstance(content, dict):
        raise SettingsError(f"expected a JSON object, got {flag.value}", field=flag.name, remedy="Give a JSON object")
    return content


def take_json(flags: list[Flag], name: str) -> tuple[dict[str, Any], list[Flag]]:
    """The JSON object that a flag holds, {} without the flag, and the other flags.

    Raises:
        SettingsError: The flag holds no JSON object, or sets a part of it by a dotted name.
    """
    if dotted := next((flag for flag in flags if flag.name.startswith(f"{name}.")), None):
        raise SettingsError(
            "not supported by `toptheta serve`",
            field=dotted.name,
            remedy=f"Give {name} as JSON, or use the options of `toptheta serve --help`",
        )
    flag = find(flags, name)
    if flag is None:
        return {}, flags
    return _parse(flag), [other for other in flags if not _means(other, name)]
