"""What thresholds.safetensors holds, and every check between its bytes and the arrays.

The checks do not lean on the checksum: a store with a matching checksum may still have been made wrongly.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from vllm_toptheta.errors import (
    TensorDtype,
    TensorHeaderInvalid,
    TensorNames,
    TensorNotFinite,
    TensorShape,
    TensorsInvalid,
    TensorValues,
)
from vllm_toptheta.store.expectations import EXPECTATION_NAMES
from vllm_toptheta.store.schema import ManifestDraft, clip
from vllm_toptheta.store.shadow import SHADOW_NAMES

MAX_HEADER_BYTES = 64 * 1024
# keeps theta, and codes of shadow keys, finite in float32 at any length that a manifest allows
MAX_COEFFICIENT = 1e9
_TOO_LARGE = f"beyond +-{MAX_COEFFICIENT:g}"
_LENGTH_BYTES = 8
_ITEM_BYTES = {"F32": 4, "I32": 4, "I64": 8}
_REMEDY = "The store was written wrongly: calibrate the model again (toptheta calibrate --help)"


class TensorFormat(NamedTuple):
    """The dtype, as safetensors names it, and the shape of a tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor's data."""
        return _ITEM_BYTES[self.dtype] * math.prod(self.shape)


def expected_formats(manifest: ManifestDraft) -> dict[str, TensorFormat]:
    """Return the format of every tensor that a manifest implies, by name."""
    sizes = manifest.architecture
    per_head, per_kv_head = (sizes.num_layers, sizes.num_heads), (sizes.num_layers, sizes.num_kv_heads)
    formats: dict[str, TensorFormat] = {}
    if manifest.thresholds is not None:
        counted = (len(manifest.targets), manifest.thresholds.num_buckets)
        statistic = TensorFormat("F32", (*per_head, *counted))
        formats = {
            "coefficients": TensorFormat("F32", (*per_head, counted[0], manifest.thresholds.degree + 1)),
            "bucket_edges": TensorFormat("I32", (counted[1] + 1,)),
            "row_count": TensorFormat("I64", counted),
            "score_mean": statistic,
            "score_std": statistic,
        }
        if manifest.thresholds.measurement:
            formats |= dict.fromkeys(EXPECTATION_NAMES, statistic)
            formats["measured_rows"] = TensorFormat("I64", counted)
    if manifest.shadow is not None:
        head_size, num_channels = sizes.head_size, manifest.shadow.num_channels
        shapes = (
            (*per_kv_head, head_size, num_channels),
            (*per_kv_head, num_channels, head_size),
            (*per_kv_head, head_size),
            per_head,
            (*per_head, 2),
            per_kv_head,
        )
        formats |= {name: TensorFormat("F32", shape) for name, shape in zip(SHADOW_NAMES, shapes, strict=True)}
    return formats


def encode(tensors: Mapping[str, NDArray[Any]]) -> bytes:
    """Return the bytes of thresholds.safetensors."""
    return safetensors.numpy.save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()})


def decode(data: bytes, manifest: ManifestDraft, *, file: Path) -> dict[str, NDArray[Any]]:
    """Check the bytes of thresholds.safetensors against a manifest and return its tensors, read-only.

    Args:
        data: The whole file.
        manifest: What the tensors must agree with.
        file: Named by the errors.

    Raises:
        TensorsInvalid: One of its sub-classes, the first check that fails.
    """
    _check_header(data, expected_formats(manifest), file)
    try:
        tensors = safetensors.numpy.load(data)
    except safetensors.SafetensorError as error:
        raise TensorHeaderInvalid(str(error), file=file, remedy=_REMEDY) from None
    _check_values(tensors, manifest, file)
    for tensor in tensors.values():
        tensor.flags.writeable = False
    return tensors


def _check_header(data: bytes, expected: Mapping[str, TensorFormat], file: Path) -> None:
    def fail(kind: type[TensorsInvalid], message: str, field: str | None = None) -> TensorsInvalid:
        return kind(message, file=file, field=field, remedy=_REMEDY)

    header_bytes = int.from_bytes(data[:_LENGTH_BYTES], "little")
    data_start = _LENGTH_BYTES + header_bytes
    if len(data) < _LENGTH_BYTES or data_start > len(data):
        raise fail(TensorHeaderInvalid, f"the file ends within its header, at byte {len(data)}")
    if header_bytes > MAX_HEADER_BYTES:
        raise fail(TensorHeaderInvalid, f"a header of {header_bytes} bytes; at most {MAX_HEADER_BYTES} are allowed")
    header = _parse_header(data[_LENGTH_BYTES:data_start], file)

    if header.keys() != expected.keys():
        missing, unexpected = sorted(expected.keys() - header.keys()), sorted(header.keys() - expected.keys())
        raise fail(TensorNames, f"missing tensors {clip(missing)}, unexpected ones {clip(unexpected)}")
    spans: list[tuple[int, int, str]] = []
    for name, tensor_format in expected.items():
        entry = header[name]
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise fail(TensorHeaderInvalid, "expected dtype, shape and data_offsets", name)
        if entry["dtype"] != tensor_format.dtype:
            raise fail(TensorDtype, f"dtype {clip(entry['dtype'])}; expected {tensor_format.dtype}", name)
        if not _is_integers(entry["shape"]) or tuple(entry["shape"]) != tensor_format.shape:
            raise fail(TensorShape, f"shape {clip(entry['shape'])}; expected {list(tensor_format.shape)}", name)
        offsets = entry["data_offsets"]
        if not _is_integers(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != tensor_format.num_bytes:
            raise fail(TensorHeaderInvalid, f"data_offsets do not span {tensor_format.num_bytes} bytes", name)
        spans.append((offsets[0], offsets[1], name))

    position = 0
    for start, end, name in sorted(spans):
        if start != position:
            raise fail(TensorHeaderInvalid, f"data starts at byte {start}; expected {position}", name)
        position = end
    if data_start + position != len(data):
        raise fail(TensorHeaderInvalid, f"{len(data)} bytes; header and tensors take {data_start + position}")


def _parse_header(header: bytes, file: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            raise ValueError("a key is repeated")
        return fields

    try:
        parsed = json.loads(header.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise TensorHeaderInvalid(f"the header is not JSON: {error}", file=file, remedy=_REMEDY) from None
    if not isinstance(parsed, dict):
        raise TensorHeaderInvalid("the header is not a JSON object", file=file, remedy=_REMEDY)
    return parsed


def _is_integers(value: object) -> bool:
    # numbers of any size may come from JSON; 32 bits hold every shape and offset of an allowed file
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 32 for item in value)


def _check_values(tensors: Mapping[str, NDArray[Any]], manifest: ManifestDraft, file: Path) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype == np.float32 and not np.isfinite(tensor).all():
            raise TensorNotFinite("contains NaN or infinity", file=file, field=name, remedy=_REMEDY)

    def require(condition: Any, name: str, message: str) -> None:
        if not condition:
            raise TensorValues(message, file=file, field=name, remedy=_REMEDY)

    for name in ("coefficients", *SHADOW_NAMES):
        require(name not in tensors or (np.abs(tensors[name]) <= MAX_COEFFICIENT).all(), name, _TOO_LARGE)
    if manifest.shadow:
        for name in ("shadow_margin", "shadow_candidate_share"):
            require((tensors[name] >= 0).all(), name, "a number is negative")
        require((tensors["shadow_candidate_share"] <= 1).all(), "shadow_candidate_share", "a share is above 1")
    if manifest.thresholds is None:
        return
    edges = tensors["bucket_edges"].astype(np.int64)
    require(edges[0] >= 1 and (np.diff(edges) > 0).all(), "bucket_edges", "edges must be positive and ascend")
    for target in manifest.targets:
        require(
            edges[0] <= target.min_length and target.max_length < edges[-1],
            "bucket_edges",
            f"the buckets do not cover lengths {target.min_length} to {target.max_length} of {target.label}",
        )
    counted = {"row_count": ["score_mean", "score_std"]}
    if manifest.thresholds.measurement:
        counted["measured_rows"] = [name for name in EXPECTATION_NAMES if name != "measured_rows"]
    for count_name, statistics in counted.items():
        count = tensors[count_name]
        require((count >= 0).all(), count_name, "a count is negative")
        for index, target in enumerate(manifest.targets):
            require(count[index].any(), count_name, f"no row was counted for {target.label}")
            too_short = edges[1:] - 1 <= target.k
            require(not count[index, too_short].any(), count_name, f"rows too short for {target.label}")
        for name in statistics:
            require(not tensors[name][:, :, count == 0].any(), name, "not zero in a bucket without rows")
            require(name == "score_mean" or (tensors[name] >= 0).all(), name, "a number is negative")
