"""What a file of text may be: UTF-8, as it is or compressed, prose or documents in JSON. Anything else is named.

What is compressed shows in the first bytes, whatever the file is called; what is JSON, in the name alone: the same
lines may be meant as prose or code where a file is called otherwise.
"""

import gzip
import importlib
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_toptheta.errors import CalibrationError

__all__ = ["decode_text", "is_json", "json_documents"]

_WRAPPINGS = {".gz", ".zst", ".xz", ".txt"}  # endings that say nothing of what is inside
_JSON = {".jsonl", ".ndjson", ".json"}
_GZIP, _XZ, _ZSTANDARD = b"\x1f\x8b", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"
_OTHERS = {
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"PK\x03\x04": "a zip archive, or a document made as one",
    b"%PDF": "a PDF file",
    b"BZh": "a bzip2 file",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}
_REMEDY = "Give UTF-8 text or JSON Lines, as they are or compressed with gzip, xz or zstd"
_MAX_FIELDS = 200  # characters of a message that list the fields of an object


def decode_text(data: bytes, file: Path) -> str:
    """Returns the text that the bytes of a file hold, without a byte order mark.

    Args:
        data: the whole file, compressed or not.
        file: named by the errors.

    Raises:
        CalibrationError: it is no UTF-8 text, or cannot be decompressed.
    """
    data = _decompressed(data, file)
    kind = next((kind for start, kind in _OTHERS.items() if data.startswith(start)), None)
    if kind is not None:
        raise CalibrationError(f"is {kind}, which is not read", file=file, remedy=_REMEDY)
    try:
        content = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"not UTF-8 text: byte {error.start} cannot be decoded", file=file, remedy=_REMEDY
        ) from error
    if "\0" in content:
        raise CalibrationError(
            f"holds a NUL character (character {content.index(chr(0))}), as UTF-16 and binary files do",
            file=file,
            remedy="Give UTF-8 text: iconv -f UTF-16LE -t UTF-8",
        )
    return content


def is_json(file: Path) -> bool:
    """Whether a file is called as one of JSON Lines or JSON, such as a.jsonl, a.NDJSON, a.json.gz and a.jsonl.txt.

    Args:
        file: the file; only its name is looked at.
    """
    endings = [ending.lower() for ending in file.suffixes]
    while endings and endings[-1] in _WRAPPINGS:
        endings.pop()
    return bool(endings) and endings[-1] in _JSON


def json_documents(content: str, file: Path, *, text_field: str) -> list[str]:
    """Returns the texts of JSON objects: one on every line, those of an array, or a single one.

    Args:
        content: of the file.
        file: named by the errors.
        text_field: the field that holds an object's text.

    Raises:
        CalibrationError: it is no JSON, or an object has no such text; names the line, or the place in the array.
    """
    return [_text_of(entry, place, file, text_field) for place, entry in _entries(content, file)]


def _entries(content: str, file: Path) -> Iterator[tuple[str, Any]]:
    """Yields what a message calls an entry, and the entry."""
    if content.lstrip().startswith(("[", "{\n", "{\r\n")):
        try:
            whole = json.loads(content)
        except (ValueError, RecursionError):
            pass  # said of the line below
        else:
            if isinstance(whole, list):
                yield from ((f"item {number}", entry) for number, entry in enumerate(whole, start=1))
            else:
                yield "the object", whole
            return
    # not splitlines(), which also cuts where a JSON text may hold a line separator
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CalibrationError(f"line {number} is not JSON: {error}", file=file, remedy=_AS_PROSE) from None


_AS_PROSE = "Give a JSON object on every line or an array of them, or call the file .txt to read it as it is"


def _text_of(entry: Any, place: str, file: Path, text_field: str) -> str:
    if not isinstance(entry, dict):
        raise CalibrationError(
            f"{place} is no object with a text in {text_field!r}", file=file, field="text_field", remedy=_AS_PROSE
        )
    text = entry.get(text_field)
    if not isinstance(text, str):
        raise CalibrationError(
            f"{place} has no text in {text_field!r}; its fields are: {', '.join(entry)[:_MAX_FIELDS]}",
            file=file,
            field="text_field",
            remedy="Call the field that holds the text 'text', or name it (toptheta calibrate --text-field)",
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CalibrationError(
            f"{place} holds half of a surrogate pair ({text[error.start]!r}), which is no character",
            file=file,
            field=text_field,
            remedy="Write the texts again as UTF-8, or leave that one out",
        ) from None
    return text


def _decompressed(data: bytes, file: Path) -> bytes:
    try:
        if data.startswith(_GZIP):
            return gzip.decompress(data)
        if data.startswith(_XZ):
            return lzma.decompress(data)
        if data.startswith(_ZSTANDARD):
            return _from_zstandard(data, file)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise CalibrationError(
            f"cannot be decompressed: {error}", file=file, remedy="Download or compress it again"
        ) from error
    return data


def _from_zstandard(data: bytes, file: Path) -> bytes:
    try:
        zstandard: Any = importlib.import_module("zstandard")
    except ImportError:
        raise CalibrationError(
            "files of zstd need the package zstandard",
            file=file,
            remedy="pip install 'vllm-toptheta[zstd]', or decompress it first",
        ) from None
    content = []
    # several frames may follow each other, as after `cat a.zst b.zst`
    while data:
        frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            content.append(frame.decompress(data))
        except zstandard.ZstdError as error:
            raise OSError(str(error)) from error
        if not frame.eof:
            raise EOFError("the file ends within a frame")
        data = frame.unused_data
    return b"".join(content)
