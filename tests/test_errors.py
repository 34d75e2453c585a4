"""Errors: one message, one tree, across processes."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest

from vllm_toptheta import errors


def all_errors() -> list[type[errors.TopThetaError]]:
    return [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.TopThetaError)]


def test_message_names_file_field_and_remedy() -> None:
    error = errors.ManifestInvalid("too large, got 5000", file="a/manifest.yaml", field="targets[0].k", remedy="Fix it")
    assert str(error) == "a/manifest.yaml: targets[0].k: too large, got 5000. Fix it."


def test_message_alone() -> None:
    assert str(errors.UnsupportedError("no sinks.")) == "no sinks."


def test_message_can_be_printed_whatever_it_quotes() -> None:
    message = str(errors.StoreError("key '\ud800\x1b[2J'\nsecond line", file=Path("\udcff")))
    assert message == "\\udcff: key '\\ud800\\x1b[2J'\nsecond line."


@pytest.mark.parametrize("kind", all_errors())
@pytest.mark.parametrize("duplicate", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy])  # noqa: S301
def test_survives_a_process_border(kind: type[errors.TopThetaError], duplicate: object) -> None:
    assert callable(duplicate)
    error = kind("message", file="folder/file", field="field", remedy="Do this")
    twin = duplicate(error)
    assert type(twin) is kind
    assert vars(twin) == vars(error)
    assert str(twin) == str(error)


def test_docstring_draws_the_tree() -> None:
    _, tree, _ = (errors.__doc__ or "").split("\n\n")  # what they are, the tree, what may be imported
    lines = tree.splitlines()
    depth = {line.split()[0]: len(line) - len(line.lstrip()) for line in lines}
    assert depth.keys() == {kind.__name__ for kind in all_errors()}
    for kind in all_errors():
        generation = kind.__mro__.index(errors.TopThetaError)
        assert depth[kind.__name__] - depth["TopThetaError"] == 2 * generation
