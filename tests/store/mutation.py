"""Ways to change a store behind its checksums, and any file."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from vllm_toptheta.store import Manifest, ManifestDraft, strict_yaml


def split_safetensors(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the header and the data of a valid safetensors file."""
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), content[start:]


def with_header(header: bytes, data: bytes) -> bytes:
    """Return a safetensors file with any header."""
    return len(header).to_bytes(8, "little") + header + data


def write_resealed(folder: Path, draft: ManifestDraft, tensors: bytes) -> None:
    """Write a store whose checksums are right, whatever the tensors hold."""
    manifest = Manifest.from_draft(draft, tensors_sha256=hashlib.sha256(tensors).hexdigest())
    (folder / "manifest.yaml").write_text(strict_yaml.dump(manifest.model_dump()))
    (folder / "thresholds.safetensors").write_bytes(tensors)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Flip bits, cut, insert, overwrite, or repeat a slice; up to three times."""
    for _ in range(draw(st.integers(1, 3))):
        position = draw(st.integers(0, max(len(content) - 1, 0)))
        other = draw(st.integers(0, max(len(content) - 1, 0)))
        start, end = sorted((position, other))
        junk = draw(
            st.binary(max_size=8) | st.sampled_from([b"\n", b": ", b"- ", b"[", b"{", b"&a ", b"*a", b"!!", b"#"])
        )
        match draw(st.sampled_from(["flip", "flip", "cut", "insert", "overwrite", "truncate", "repeat"])):
            case "flip" if content:
                flipped = content[position] ^ (1 << draw(st.integers(0, 7)))
                content = content[:position] + bytes([flipped]) + content[position + 1 :]
            case "cut":
                content = content[:start] + content[end:]
            case "insert":
                content = content[:position] + junk + content[position:]
            case "overwrite":
                content = content[:position] + junk + content[position + len(junk) :]
            case "truncate":
                content = content[:position]
            case "repeat":
                content = content[:end] + content[start:end][:4096] + content[end:]
    return content


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 70)
    | st.integers()
    | st.sampled_from([10**18, 2**63, 2**64, -(2**70), 10**40])
    | st.floats()
    | st.text(max_size=20)
    | st.dates()
    | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


def paths(value: Any, prefix: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Return the path of every field and item below `value`."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, item in items for path in [(*prefix, key), *paths(item, (*prefix, key))]]


@st.composite
def edited(draw: st.DrawFn, fields: dict[str, Any], values: st.SearchStrategy[Any] = anything) -> dict[str, Any]:
    """Replace, remove or add one to three fields in a copy of a nested dict."""
    fields = copy.deepcopy(fields)
    for _ in range(draw(st.integers(1, 3))):
        *parents, last = draw(st.sampled_from(paths(fields) or [("empty",)]))
        place: Any = fields
        for parent in parents:
            place = place[parent]
        match draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"])):
            case "replace":
                place[last] = draw(values)
            case "remove" if last in place or isinstance(last, int):
                del place[last]
            case "add" if isinstance(place, dict):
                place[draw(st.text(max_size=8))] = draw(values)
    return fields
