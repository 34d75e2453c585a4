"""Where texts come from."""

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_toptheta.calibration.sources import builtin_texts, read_dataset, read_file
from vllm_toptheta.errors import CalibrationError


def write_lines(file: Path, *entries: Any) -> Path:
    file.write_text("\n".join(json.dumps(entry) for entry in entries) + "\n\n")
    return file


def test_json_lines_are_joined(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "data.jsonl", {"text": "one\ntwo", "id": 1}, {"text": "three"})
    text = read_file(file)
    assert text.content == "one\ntwo\n\nthree"
    assert text.source.name == "data.jsonl"
    assert text.source.num_characters == len(text.content)
    assert text.source.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def test_the_field_of_a_json_line_is_chosen(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "data.jsonl", {"body": "one"}, {"body": "two"})
    assert read_file(file, text_field="body").content == "one\n\ntwo"
    with pytest.raises(CalibrationError, match=r"line 1 has no text in 'text'; its fields are: body"):
        read_file(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": 1}', "line 2 has no text"),
        ('{"text": "a"}\n[1]', "line 2 has no text"),
        ('{"text": "a"}\ntext', "line 2 is not JSON"),
        ("[" * 100_000, "line 1 is not JSON"),
        ('{"text": " "}', "no text in it"),
        ("\n", "holds no text"),
    ],
)
def test_json_lines_that_cannot_be_used_are_named(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(content)
    with pytest.raises(CalibrationError, match=message) as caught:
        read_file(file)
    assert caught.value.file == file


def test_other_files_are_plain_text(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "data.txt", {"text": "one"})
    assert read_file(file).content == file.read_text()


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
