"""Ways to change a store behind its checksums."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

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
