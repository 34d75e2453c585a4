"""Texts that are no files of their own."""

import hashlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_toptheta.calibration.sources import builtin_texts, read_dataset
from vllm_toptheta.errors import CalibrationError


def serve(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]] | Exception) -> list[dict[str, Any]]:
    """Put a package in the place of datasets that has one dataset; return the calls."""
    calls: list[dict[str, Any]] = []

    def load_dataset(path: str, **options: Any) -> Iterator[dict[str, Any]]:
        calls.append({"path": path, **options})
        if isinstance(rows, Exception):
            raise rows
        return iter(rows)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return calls


def test_a_dataset_gives_as_much_text_as_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = serve(monkeypatch, [{"text": letter * 10} for letter in "abcdef"])
    text = read_dataset("org/name", num_characters=25)
    assert text.content == "\n\n".join(["a" * 10, "b" * 10, "c" * 10])
    assert calls == [{"path": "org/name", "split": "train", "streaming": True}]
    assert text.source.name == "org/name"
    assert text.source.sha256 == hashlib.sha256(text.content.encode()).hexdigest()


def test_the_split_and_the_column_of_a_dataset_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = serve(monkeypatch, [{"body": "words"}])
    assert read_dataset("org/name:test", num_characters=100, text_field="body").content == "words"
    assert calls[0]["split"] == "test"
    with pytest.raises(CalibrationError, match=r"no text in 'text'; its columns are: body"):
        read_dataset("org/name:test", num_characters=100)


def test_half_of_a_surrogate_pair_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, [{"text": "a\ud800b"}])
    assert read_dataset("org/name", num_characters=100).content == "a?b"


def test_a_dataset_that_cannot_be_loaded_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, ConnectionError("Couldn't reach the hub\nlong explanation"))
    with pytest.raises(CalibrationError, match=r"org/name cannot be loaded: Couldn't reach the hub\. Check") as caught:
        read_dataset("org/name", num_characters=100)
    assert caught.value.field == "dataset"


def test_a_dataset_needs_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match=r"vllm-toptheta\[datasets\]"):
        read_dataset("org/name", num_characters=100)


def test_python_itself_is_a_text() -> None:
    texts = builtin_texts()
    assert len(texts) == len({text.source.sha256 for text in texts}) == 24
    assert sum(text.source.num_characters for text in texts) > 1_000_000
    assert [text.source for text in texts] == [text.source for text in builtin_texts()]
