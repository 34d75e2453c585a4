"""What a file of text may be, whatever it is called, and how it is refused."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_toptheta.calibration.data import different_texts, load_sequences, read_text
from vllm_toptheta.errors import CalibrationError

DOCUMENTS = ("one\ntwo", "drei \u2028 vier")
LINES = "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in DOCUMENTS)
JOINED = "\n\n".join(DOCUMENTS)


def write(file: Path, content: str | bytes) -> Path:
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.NDJson", "a.json", "a.jsonl.txt", "a.b.jsonl", "a.json.gz"]
)
def test_names_of_json_lines(tmp_path: Path, name: str) -> None:
    file = write(tmp_path / name, LINES)
    text = read_text(file)
    assert text.content == JOINED
    assert text.source.name == name
    assert text.source.num_characters == len(JOINED)
    assert text.source.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["a.txt", "a.md", "jsonl", "json.txt", "a.jsonl.md"])
def test_by_other_names_they_are_prose(tmp_path: Path, name: str) -> None:
    assert read_text(write(tmp_path / name, LINES)).content == LINES


@pytest.mark.parametrize(
    "content",
    [
        LINES.replace("\n", "\r\n"),
        "\n\n" + LINES,
        "\ufeff" + LINES,
        LINES.encode("utf-8-sig"),
        json.dumps([{"text": text} for text in DOCUMENTS]),
        json.dumps([{"text": text} for text in DOCUMENTS], indent=1, ensure_ascii=False),
        json.dumps({"text": JOINED}, indent=1),
    ],
    ids=["crlf", "empty lines", "mark", "encoded mark", "array", "indented array", "one object"],
)
def test_layouts_of_json(tmp_path: Path, content: str | bytes) -> None:
    assert read_text(write(tmp_path / "a.json", content)).content == JOINED


def test_the_field_is_chosen(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", LINES.replace('"text"', '"body"'))
    assert read_text(file, text_field="body").content == JOINED
    with pytest.raises(CalibrationError, match=r"line 1 has no text in 'text'; its fields are: body, id.*--text-field"):
        read_text(file)


def compress(kind: str, content: bytes) -> bytes:
    if kind == "gz":
        return gzip.compress(content)
    if kind == "xz":
        return lzma.compress(content)
    zstandard = pytest.importorskip("zstandard")
    return bytes(zstandard.compress(content))


@pytest.mark.parametrize("kind", ["gz", "xz", "zst"])
def test_compressed_text_is_read(tmp_path: Path, kind: str) -> None:
    packed = compress(kind, LINES.encode())
    assert read_text(write(tmp_path / f"a.jsonl.{kind}", packed)).content == JOINED
    assert read_text(write(tmp_path / f"a.txt.{kind}", packed)).content == LINES
    # the first bytes tell, and parts may follow each other
    assert read_text(write(tmp_path / "a.txt", packed + packed)).content == LINES + LINES
    assert read_text(write(tmp_path / f"plain.txt.{kind}", LINES)).content == LINES


@pytest.mark.parametrize("kind", ["gz", "xz", "zst"])
def test_damaged_compressed_text_is_named(tmp_path: Path, kind: str) -> None:
    packed = compress(kind, LINES.encode())
    for damaged in (packed[: len(packed) // 2], packed[:6] + b"\xff" * 60):
        file = write(tmp_path / f"a.txt.{kind}", damaged)
        with pytest.raises(CalibrationError, match="cannot be decompressed: ") as caught:
            read_text(file)
        assert caught.value.file == file


def test_zstd_needs_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(CalibrationError, match=r"the package zstandard.*vllm-toptheta\[zstd\]"):
        read_text(write(tmp_path / "a.txt.zst", b"\x28\xb5\x2f\xfd" + b"0" * 20))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "Grüße".encode("utf-16"), "is UTF-16 text"),
        ("a.txt", b"\xfe\xff" + "Grüße".encode("utf-16-be"), "is UTF-16 text"),
        ("a.txt", "Gruss".encode("utf-16-le"), "NUL character .character 1.*iconv"),
        ("a.txt", "Gruss".encode("utf-16-be"), "NUL character .character 0"),
        ("a.txt", "Gruss".encode("utf-32-le"), "NUL character"),
        ("a.txt", b"words\0words", "NUL character .character 5"),
        ("a.jsonl", LINES.encode("utf-16-le"), "NUL character"),
        ("a.txt", "Grüße".encode("latin-1"), "byte 2 cannot be decoded"),
        ("a.txt", b"\xff\xd8\xff\xe0", "byte 0 cannot be decoded"),
        ("a.parquet", b"PAR1\x15\x00", "is a Parquet file"),
        ("a.txt", b"PAR1\x15\x00", "is a Parquet file"),
        ("a.docx", b"PK\x03\x04\x14\x00", "is a zip archive, or a document"),
        ("a.pdf", b"%PDF-1.7\n", "is a PDF file"),
        ("a.txt", "", "holds no text"),
        ("a.txt", "\ufeff \n", "holds no text"),
        ("a.jsonl", "\n", "no text in it"),
        ("a.jsonl", '{"text": " "}', "no text in it"),
        ("a.jsonl", '{"text": "a"}\n{"text": 1}', "line 2 has no text in 'text'"),
        ("a.jsonl", '{"text": "a"}\n[1]', "line 2 is no object"),
        ("a.jsonl", '{"text": "a"}\n"text"', "line 2 is no object"),
        ("a.jsonl", '{"text": "a"}\ntext', "line 2 is not JSON"),
        ("a.json", '[{"text": "a"}, {"words": "b"}]', "item 2 has no text in 'text'"),
        ("a.json", '[{"text": "a"}, ', "line 1 is not JSON"),
        ("a.json", "prose", "line 1 is not JSON.*call the file .txt"),
        ("a.jsonl", "[" * 100_000, "line 1 is not JSON"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b\\ud800c"}', r"line 2 holds half of a surrogate pair"),
        ("a.json", '[{"text": "\\udfff"}]', r"item 1 holds half of a surrogate pair"),
    ],
)
def test_what_is_no_text_is_named(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    file = write(tmp_path / name, content)
    with pytest.raises(CalibrationError, match=message) as caught:
        read_text(file)
    assert caught.value.file == file
    assert caught.value.remedy
    assert str(caught.value).encode()


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    assert read_text(write(tmp_path / "a.txt", "words".encode("utf-8-sig"))).content == "words"


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "circle.txt").symlink_to(tmp_path / "circle.txt")
    for name, message in (
        ("nowhere.txt", "No such file"),
        (".", "Is a directory"),
        ("dangling.txt", "a link to what is not there"),
        ("circle.txt", "a link to what is not there"),
    ):
        with pytest.raises(CalibrationError, match=f"cannot be read: {message}.*--text") as caught:
            read_text(tmp_path / name)
        assert caught.value.file == tmp_path / name


@pytest.mark.parametrize("name", ["a\nb.txt", "a\x1bb.txt", "a\udcffb.txt"])
def test_a_name_that_no_record_takes(tmp_path: Path, name: str) -> None:
    assert read_text(write(tmp_path / name, "words")).source.name == "a?b.txt"


class Bytes:
    bos_token_id = None

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


def test_a_text_counts_once_by_whatever_names(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    file = write(tmp_path / "a.txt", "first words")
    (tmp_path / "link.txt").symlink_to(file)
    again = [
        file,
        tmp_path / "folder" / ".." / "a.txt",
        tmp_path / "link.txt",
        write(tmp_path / "copy.txt", "first words"),
        write(tmp_path / "packed.txt.gz", gzip.compress(b"first words")),
    ]
    other = write(tmp_path / "b.txt", "other words")
    texts = [read_text(path) for path in (*again, other, file)]
    assert [text.source.name for text in different_texts(texts)] == ["a.txt", "b.txt"]
    with pytest.raises(CalibrationError, match="the texts have 22 tokens"):
        load_sequences(texts, Bytes(), num_sequences=1, max_length=23, seed=0)


class Always(Bytes):
    """One token for each word, or for everything, and always the same."""

    def __init__(self, *, of_words: bool) -> None:
        self.of_words = of_words

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [3] * (len(text.split()) if self.of_words else 1)}


@pytest.mark.parametrize(
    ("of_words", "message"), [(True, "token 3 of 100% of the texts"), (False, "1 tokens of 5000 characters")]
)
def test_a_tokenizer_that_makes_one_token_of_everything(tmp_path: Path, of_words: bool, message: str) -> None:
    text = read_text(write(tmp_path / "a.txt", "words" + " word" * 999))
    with pytest.raises(CalibrationError, match=message) as caught:
        load_sequences([text], Always(of_words=of_words), num_sequences=1, max_length=10, seed=0)
    assert caught.value.field == "tokenizer"
