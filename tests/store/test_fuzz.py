"""2,000 damaged stores: each is refused by an exception of ours, or is loaded as exactly what it says.

A change to a file behind the back of the checksums must be refused, unless the content is still the same. A store whose
checksums were made anew is another store: it may load, but then only as an independent reader of its bytes sees it, and
only if it keeps every promise of the format.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import event, given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests import store_factory
from tests.fuzzing import fuzz
from tests.store.mutation import anything, damaged, edited, split_safetensors, with_header, write_resealed
from vllm_toptheta.errors import ChecksumMismatch, StoreError
from vllm_toptheta.store import Manifest, ThresholdStore, load, strict_yaml
from vllm_toptheta.store.shadow import SHADOW_NAMES

EXAMPLES = {
    "manifest bytes": 500,
    "manifest fields": 300,
    "manifest fields, resealed": 300,
    "tensor bytes": 200,
    "tensor bytes, resealed": 300,
    "tensor header, resealed": 400,
}
TENSORS = ("coefficients", "bucket_edges", "row_count", "score_mean", "score_std")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> ThresholdStore:
    return store_factory.make_store(tmp_path_factory.mktemp("original") / "acme--tiny", measured=True, num_channels=4)


@pytest.fixture
def victim(original: ThresholdStore, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original.folder, tmp_path / "acme--tiny"))


def load_or_refuse(folder: Path) -> ThresholdStore | None:
    """Return the store, or None where an exception of ours says why not; anything else fails the test."""
    try:
        store = load(folder)
    except StoreError as error:
        event(type(error).__name__)
        assert str(error).encode()  # noqa: PT017
        assert error.file is not None  # noqa: PT017
        assert error.remedy  # noqa: PT017
        return None
    event("loaded")
    return store


def assert_tensors(store: ThresholdStore, expected: dict[str, Any]) -> None:
    actual = tensors_of(store)
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        np.testing.assert_array_equal(tensor, expected[name], strict=True)


def tensors_of(store: ThresholdStore) -> dict[str, Any]:
    assert store.expectations is not None
    shadow = vars(store.shadow)
    return (
        {name: getattr(store.calibrated, name) for name in TENSORS}
        | vars(store.expectations)
        | {name: shadow[field] for name, field in zip(SHADOW_NAMES, list(shadow)[2:], strict=True)}
    )


def assert_promises(store: ThresholdStore) -> None:
    """State what every loaded store promises, in other words than the loader does."""
    found = store.calibrated
    assert found is not None
    counts, edges = found.row_count, found.bucket_edges.tolist()
    for name in ("coefficients", "score_mean", "score_std"):
        assert all(map(np.isfinite, getattr(found, name).flat))
    assert edges == sorted(set(edges))
    assert edges[0] > 0
    assert counts.min() >= 0
    assert found.score_std.min() >= 0
    for target, bucket in np.argwhere(counts == 0):
        assert set(found.score_mean[:, :, target, bucket].flat) == {0}
    for array in vars(found.expectations).values():
        assert all(map(np.isfinite, array.flat))
        assert array.min() >= 0
    for target in store.manifest.targets:
        for length in (target.min_length, target.max_length):
            assert np.isfinite(store.curve_of(target.label).threshold(length)).all()
    scale = store.shadow.exp_threshold_scale([1, 1 << 20])
    for quantity in (store.shadow.margin, scale, store.shadow.candidate_share):
        assert 0 <= quantity.min() <= quantity.max() <= 1e9
    for layer in range(store.manifest.architecture.num_layers):
        assert all(np.abs(array).max() <= 1e9 for array in vars(store.shadow.projection(layer)).values())


@pytest.fixture(scope="module")
def fields(original: ThresholdStore) -> dict[str, Any]:
    return strict_yaml.parse((original.folder / "manifest.yaml").read_text())


def test_there_are_two_thousand_mutations() -> None:
    assert sum(EXAMPLES.values()) >= 2000


@given(data=st.data())
@fuzz(EXAMPLES["manifest bytes"])
def test_manifest_bytes(original: ThresholdStore, victim: Path, data: st.DataObject) -> None:
    content = (original.folder / "manifest.yaml").read_bytes()
    (victim / "manifest.yaml").write_bytes(data.draw(damaged(content)))
    if store := load_or_refuse(victim):
        assert store.manifest == original.manifest
        assert_tensors(store, tensors_of(original))


@given(data=st.data())
@fuzz(EXAMPLES["manifest fields"])
def test_manifest_fields(original: ThresholdStore, fields: dict[str, Any], victim: Path, data: st.DataObject) -> None:
    mutant = data.draw(edited(fields))
    (victim / "manifest.yaml").write_bytes(strict_yaml.dump(mutant).encode())
    if store := load_or_refuse(victim):
        assert store.manifest == original.manifest
        assert_tensors(store, tensors_of(original))


@given(data=st.data())
@fuzz(EXAMPLES["manifest fields, resealed"])
def test_manifest_fields_resealed(
    original: ThresholdStore, fields: dict[str, Any], victim: Path, data: st.DataObject
) -> None:
    plausible = st.integers(0, 70) | st.just(1024) | st.floats(-2, 2) | st.booleans() | st.text(max_size=8)
    mutant = data.draw(edited(fields, plausible))
    tensors = (original.folder / "thresholds.safetensors").read_bytes()
    try:
        manifest = Manifest.model_validate(mutant)
    except ValidationError:
        (victim / "manifest.yaml").write_bytes(strict_yaml.dump(mutant).encode())
        assert load_or_refuse(victim) is None
        return
    write_resealed(victim, manifest, tensors)
    if store := load_or_refuse(victim):
        assert store.manifest == Manifest.from_draft(manifest, tensors_sha256=original.manifest.tensors.sha256)
        assert_tensors(store, tensors_of(original))
        assert_promises(store)


@given(data=st.data())
@fuzz(EXAMPLES["tensor bytes"])
def test_tensor_bytes(original: ThresholdStore, victim: Path, data: st.DataObject) -> None:
    content = (original.folder / "thresholds.safetensors").read_bytes()
    mutant = data.draw(damaged(content))
    (victim / "thresholds.safetensors").write_bytes(mutant)
    if mutant == content:
        assert_tensors(load(victim), tensors_of(original))
    else:
        with pytest.raises(ChecksumMismatch):
            load(victim)


def check_resealed(original: ThresholdStore, victim: Path, tensors: bytes) -> None:
    write_resealed(victim, original.manifest, tensors)
    if store := load_or_refuse(victim):
        assert store.manifest == Manifest.from_draft(original.manifest, tensors_sha256=store.manifest.tensors.sha256)
        assert_tensors(store, safetensors.numpy.load(tensors))
        assert_promises(store)


@given(data=st.data())
@fuzz(EXAMPLES["tensor bytes, resealed"])
def test_tensor_bytes_resealed(original: ThresholdStore, victim: Path, data: st.DataObject) -> None:
    content = (original.folder / "thresholds.safetensors").read_bytes()
    header_end = len(content) - len(split_safetensors(content)[1])
    match data.draw(st.sampled_from(["header", "data", "number"])):
        case "header":
            mutant = data.draw(damaged(content[:header_end])) + content[header_end:]
        case "data":
            mutant = content[:header_end] + data.draw(damaged(content[header_end:]))
        case _:  # a random bit seldom makes the numbers that matter
            number = np.float32(data.draw(st.sampled_from([np.nan, np.inf, -np.inf, -1.0, 0.5, 1e30]))).tobytes()
            position = header_end + 4 * data.draw(st.integers(0, (len(content) - header_end) // 4 - 1))
            mutant = content[:position] + number + content[position + 4 :]
    check_resealed(original, victim, mutant)


@given(data=st.data())
@fuzz(EXAMPLES["tensor header, resealed"])
def test_tensor_header_resealed(original: ThresholdStore, victim: Path, data: st.DataObject) -> None:
    header, body = split_safetensors((original.folder / "thresholds.safetensors").read_bytes())
    json_values = anything.filter(lambda value: "date" not in type(value).__name__).map(
        lambda value: repr(value) if isinstance(value, bytes) else value
    )
    size = st.sampled_from([0, 1, 2, 3, 4, 5, 20, 64, 288, 352, 384, 736, 1120, len(body), 2**32, 2**64])
    values = json_values | size | st.lists(size, max_size=4) | st.sampled_from(["F32", "I32", "I64", "U32", "BF16"])
    mutant = data.draw(edited(header, values))
    encoded = json.dumps(mutant, default=repr).encode()
    if data.draw(st.booleans(), label="repeat a tensor"):
        encoded = encoded[:-1] + b', "row_count": ' + json.dumps(mutant.get("row_count"), default=repr).encode() + b"}"
    check_resealed(original, victim, with_header(encoded, body))
