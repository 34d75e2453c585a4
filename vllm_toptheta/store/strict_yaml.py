"""YAML reduced to what a manifest needs: string keys, no tags, no anchors, little depth and size, nothing said twice.

Anchors and merge keys let a small file become a huge value, tags choose how a value is built, and a repeated key hides
its first value: none of them has a use here.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml

MAX_DEPTH = 16
MAX_NODES = 1 << 15  # keys, values and items; PyYAML takes 40 microseconds for each
MAX_NUMBER_LENGTH = 32


def parse(text: str) -> dict[str, Any]:
    """Parse a YAML document whose root is a mapping.

    Raises:
        ValueError: Says what is wrong, and in which line.
    """
    try:
        root = _StrictLoader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{error.problem or error.context}{line}") from None
    except (yaml.YAMLError, OverflowError) as error:
        raise ValueError(str(error)) from None
    if not isinstance(root, dict):
        raise ValueError(f"the root must be a mapping, not {type(root).__name__}")
    return root


def dump(value: dict[str, Any]) -> str:
    """Write a mapping so that `parse` returns an equal one (tuples come back as lists)."""
    return yaml.dump(value, Dumper=_PlainDumper, sort_keys=False, allow_unicode=True, width=120)


class _StrictLoader(yaml.SafeLoader):
    _depth = 0
    _nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise yaml.MarkedYAMLError(problem="anchors and aliases are not allowed", problem_mark=event.start_mark)
        if event.tag is not None:
            raise yaml.MarkedYAMLError(problem="tags are not allowed", problem_mark=event.start_mark)
        if self._depth == MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem="nested too deeply", problem_mark=event.start_mark)
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise yaml.MarkedYAMLError(problem=f"more than {MAX_NODES} values", problem_mark=event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                raise yaml.MarkedYAMLError(problem="keys must be strings", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} repeated", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        _check_length(node)
        return super().construct_yaml_int(node)

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        _check_length(node)
        return super().construct_yaml_float(node)


def _check_length(number: yaml.ScalarNode) -> None:
    # Python converts a long decimal in quadratic time and refuses to print a long hexadecimal one
    if len(number.value) > MAX_NUMBER_LENGTH:
        raise yaml.MarkedYAMLError(problem="number too long", problem_mark=number.start_mark)


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_yaml_int)
_StrictLoader.add_constructor("tag:yaml.org,2002:float", _StrictLoader.construct_yaml_float)


class _PlainDumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True
