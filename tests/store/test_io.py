"""Reading and writing a store: every refusal has its own exception, and nothing is half done."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.store.mutation import split_safetensors, with_header, write_resealed
from tests.store_factory import make_draft, make_tensors
from vllm_toptheta import errors
from vllm_toptheta.store import ThresholdStore, io, load, read_architecture, save
from vllm_toptheta.store.expectations import EXPECTATION_NAMES

MakeStore = Callable[..., ThresholdStore]


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def assert_equal(one: ThresholdStore, other: ThresholdStore) -> None:
    assert one.manifest == other.manifest
    for name in make_tensors(make_draft()):
        np.testing.assert_array_equal(getattr(one.calibrated, name), getattr(other.calibrated, name), strict=True)


def test_a_saved_store_loads_as_it_was(tmp_path: Path) -> None:
    draft = make_draft()
    tensors = make_tensors(draft)
    saved = save(tmp_path / "new" / "acme--tiny", draft, tensors)
    loaded = load(tmp_path / "new" / "acme--tiny")
    assert_equal(saved, loaded)
    assert loaded.manifest.model_dump(exclude={"tensors", "content_sha256"}) == draft.model_dump()
    assert loaded.expectations is None
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(getattr(loaded.calibrated, name), tensor, strict=True)
        assert not getattr(loaded.calibrated, name).flags.writeable
    assert names(tmp_path / "new") == ["acme--tiny"]
    assert names(tmp_path / "new" / "acme--tiny") == ["manifest.yaml", "thresholds.safetensors"]


def test_a_measured_store_loads_with_its_expectations(tmp_path: Path) -> None:
    draft = make_draft(measured=True)
    tensors = make_tensors(draft)
    save(tmp_path / "acme--tiny", draft, tensors)
    loaded = load(tmp_path / "acme--tiny")
    assert loaded.manifest.labels == ("k:8", "k:32")
    assert loaded.manifest.target_ks == (8, 32)
    for name in EXPECTATION_NAMES:
        np.testing.assert_array_equal(getattr(loaded.expectations, name), tensors[name], strict=True)


def test_a_store_may_hold_shadow_keys_alone(tmp_path: Path) -> None:
    draft = make_draft(calibrated=False, num_channels=8)
    loaded = save(tmp_path / "acme--tiny", draft, make_tensors(draft))
    assert loaded.calibrated is loaded.expectations is None
    assert loaded.manifest.labels == loaded.manifest.dense_layers == ()
    assert "thresholds:" not in (loaded.folder / "manifest.yaml").read_text()
    with pytest.raises(
        errors.TargetOutOfRange, match="no thresholds for k 8; calibrated are none. Calibrate with --k 8"
    ):
        loaded.curve(8)


def test_checksum_is_that_of_the_file(make_store: MakeStore) -> None:
    store = make_store()
    data = (store.folder / "thresholds.safetensors").read_bytes()
    assert store.manifest.tensors.sha256 == hashlib.sha256(data).hexdigest()


def test_a_store_crosses_a_process_border(make_store: MakeStore) -> None:
    store = make_store()
    assert_equal(pickle.loads(pickle.dumps(store)), store)  # noqa: S301


def test_everyone_may_read_a_saved_store(make_store: MakeStore) -> None:
    umask = os.umask(0o022)
    try:
        folder = make_store().folder
    finally:
        os.umask(umask)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o644}


def test_saving_replaces_a_store(tmp_path: Path, make_store: MakeStore) -> None:
    make_store(max_length=512)
    new = make_store(max_length=2048)
    assert_equal(load(new.folder), new)
    assert names(tmp_path) == ["acme--tiny"]


def test_saving_replaces_nothing_else(tmp_path: Path, make_store: MakeStore) -> None:
    folder = tmp_path / "acme--tiny"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(errors.StoreNotWritable, match="thesis"):
        make_store()
    assert names(folder) == ["thesis.txt"]
    (folder / "thesis.txt").rename(tmp_path / "thesis.txt")
    make_store()
    assert names(tmp_path) == ["acme--tiny", "thesis.txt"]


def test_saving_below_a_file_is_refused(tmp_path: Path, make_store: MakeStore) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(errors.StoreNotWritable):
        make_store("file")
    with pytest.raises(errors.StoreNotWritable):
        make_store("file/acme--tiny")


def test_a_failed_rename_leaves_the_old_store(
    tmp_path: Path, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = make_store()
    rename = Path.rename

    def fail_once(source: Path, target: Path) -> Path:
        if source.name == "new":
            raise OSError(28, "No space left on device")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(errors.StoreNotWritable, match="No space left"):
        make_store(max_length=2048)
    assert_equal(load(old.folder), old)
    assert names(tmp_path) == ["acme--tiny"]


def test_invalid_tensors_are_not_written(tmp_path: Path) -> None:
    draft = make_draft()
    with pytest.raises(errors.TensorNames):
        save(tmp_path / "acme--tiny", draft, {})
    assert names(tmp_path) == []


def edit(name: str, index: Any, value: float) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        tensors[name][index] = value

    return change


def replace(name: str, function: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        tensors[name] = function(tensors[name])

    return change


@pytest.mark.parametrize(
    ("change", "error", "field"),
    [
        (lambda tensors: tensors.pop("row_count"), errors.TensorNames, None),
        (lambda tensors: tensors.update(extra=np.zeros(1)), errors.TensorNames, None),
        (replace("coefficients", lambda tensor: tensor[1:]), errors.TensorShape, "coefficients"),
        (replace("coefficients", lambda tensor: tensor.T), errors.TensorShape, "coefficients"),
        (replace("score_mean", lambda tensor: tensor.astype(np.float64)), errors.TensorDtype, "score_mean"),
        (replace("score_mean", lambda tensor: tensor.astype(np.float16)), errors.TensorDtype, "score_mean"),
        (replace("bucket_edges", lambda tensor: tensor.view(np.uint32)), errors.TensorDtype, "bucket_edges"),
        (edit("coefficients", (0, 0, 0, 0), np.nan), errors.TensorNotFinite, "coefficients"),
        (edit("score_mean", (2, 3, 1, 3), np.inf), errors.TensorNotFinite, "score_mean"),
        (edit("score_std", (2, 3, 1, 3), -np.inf), errors.TensorNotFinite, "score_std"),
        (edit("coefficients", (0, 0, 0, 0), 1e30), errors.TensorValues, "coefficients"),
        (edit("score_std", (2, 3, 1, 3), -0.5), errors.TensorValues, "score_std"),
        (edit("score_mean", (0, 0, 1, 0), 1.0), errors.TensorValues, "score_mean"),
        (edit("score_std", (0, 0, 1, 0), 1.0), errors.TensorValues, "score_std"),
        (edit("bucket_edges", 0, 0), errors.TensorValues, "bucket_edges"),
        (edit("bucket_edges", 0, 10), errors.TensorValues, "bucket_edges"),
        (edit("bucket_edges", -1, 1024), errors.TensorValues, "bucket_edges"),
        (edit("bucket_edges", 1, 9), errors.TensorValues, "bucket_edges"),
        (edit("row_count", (0, 1), -1), errors.TensorValues, "row_count"),
        (edit("row_count", (1, 0), 1), errors.TensorValues, "row_count"),
        (edit("row_count", 1, 0), errors.TensorValues, "row_count"),
        (lambda tensors: tensors.pop("offline_sum"), errors.TensorNames, None),
        (edit("measured_rows", (1, 0), 1), errors.TensorValues, "measured_rows"),
        (edit("measured_rows", 0, 0), errors.TensorValues, "measured_rows"),
        (edit("offline_sum", (2, 3, 1, 3), np.nan), errors.TensorNotFinite, "offline_sum"),
        (edit("offline_sum", (2, 3, 1, 3), -1.0), errors.TensorValues, "offline_sum"),
        (edit("exp_threshold_scale", (2, 3, 1, 0), 1.0), errors.TensorValues, "exp_threshold_scale"),
    ],
)
def test_tensors_that_contradict_the_manifest_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], error: type[errors.TensorsInvalid], field: str | None
) -> None:
    draft = make_draft(measured=True)
    tensors = make_tensors(draft)
    change(tensors)
    with pytest.raises(errors.TensorsInvalid) as caught:
        save(tmp_path / "acme--tiny", draft, tensors)
    assert type(caught.value) is error
    assert caught.value.field == field
    assert caught.value.file == tmp_path / "acme--tiny" / "thresholds.safetensors"
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("old", "new", "error", "field"),
    [
        ("acme/tiny", "acme/other", errors.ChecksumMismatch, "content_sha256"),
        ("k: 32\n", "k: 31\n", errors.ChecksumMismatch, "content_sha256"),
        ("schema_version: 5", "schema_version: 6", errors.ManifestVersion, "schema_version"),
        ("schema_version: 5", "schema_version: 3", errors.ManifestVersion, "schema_version"),
        ("schema_version: 5", "schema_version: true", errors.ManifestInvalid, "schema_version"),
        ("schema_version: 5", "other: 1", errors.ManifestInvalid, "schema_version"),
        ("num_layers: 3", "num_layers: 5000", errors.ManifestInvalid, "architecture.num_layers"),
        ("num_layers: 3", "num_layers: 3\n  more: 4", errors.ManifestInvalid, "architecture.more"),
        ("k: 32\n", "k: .nan\n", errors.ManifestInvalid, "thresholds.targets[1].k"),
        ("seed: 0", "seed: 0x" + "f" * 30, errors.ManifestInvalid, "calibration.seed"),
        ("seed: 0", "seed: 0x" + "f" * 5000, errors.ManifestInvalid, None),
        ("seed: 0", "seed: " + "9" * 5000, errors.ManifestInvalid, None),
        ("seed: 0", "seed: 0x_", errors.ManifestInvalid, None),
        ("date: 2026-01-31", "date: 2026-13-31", errors.ManifestInvalid, None),
        ("date: 2026-01-31", "date: 2026-01-31 10:00:00 +99:99", errors.ManifestInvalid, None),
        ("date: 2026-01-31", "date: 2026-01-31 10:00:00", errors.ManifestInvalid, "calibration.date"),
        ("seed: 0", "seed: 0\n  seed: 0", errors.ManifestInvalid, None),
        ("seed: 0", "seed: &a 0", errors.ManifestInvalid, None),
        ("seed: 0", "seed: *a", errors.ManifestInvalid, None),
        ("seed: 0", "seed: !!python/object/apply:os.getpid []", errors.ManifestInvalid, None),
        ("seed: 0", "<<: {seed: 0}", errors.ManifestInvalid, None),
        ("seed: 0", "1: 0", errors.ManifestInvalid, None),
        ("seed: 0", "[a]: 0", errors.ManifestInvalid, None),
        ("seed: 0", "seed: " + "[" * 100_000, errors.ManifestInvalid, None),
        ("seed: 0", 'seed: "\\UFFFFFFFF"', errors.ManifestInvalid, None),
        ("command: toptheta", 'command: "\\ud800" #', errors.ManifestInvalid, "calibration.command"),
        ("command: toptheta", "command: \x00", errors.ManifestInvalid, None),
        ("schema_version: 5", "--- [1]\n---", errors.ManifestInvalid, None),
    ],
)
def test_edited_manifests_are_refused(
    make_store: MakeStore, old: str, new: str, error: type[errors.StoreError], field: str | None
) -> None:
    file = make_store().folder / "manifest.yaml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(errors.StoreError) as caught:
        load(file.parent)
    assert type(caught.value) is error
    assert (caught.value.file, caught.value.field) == (file, field)
    assert caught.value.remedy
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "content", [b"", b"- 1", b"null", b"\xff\xfe", b"text", b"{", b"\x80", b"%YAML 9" + b"9" * 9999]
)
def test_other_files_are_no_manifests(make_store: MakeStore, content: bytes) -> None:
    file = make_store().folder / "manifest.yaml"
    file.write_bytes(content)
    with pytest.raises(errors.ManifestInvalid):
        load(file.parent)


def test_changed_tensors_are_refused(make_store: MakeStore) -> None:
    file = make_store().folder / "thresholds.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(errors.ChecksumMismatch) as caught:
        load(file.parent)
    assert (caught.value.file, caught.value.field) == (file, "tensors.sha256")


HEADER_EDITS: list[tuple[Callable[[dict[str, Any]], Any], type[errors.TensorsInvalid]]] = [
    (lambda header: header.update(__metadata__={"format": "np"}), errors.TensorNames),
    (lambda header: header.update(row_count=[]), errors.TensorHeaderInvalid),
    (lambda header: header["row_count"].update(more=1), errors.TensorHeaderInvalid),
    (lambda header: header["row_count"].update(dtype="U64"), errors.TensorDtype),
    (lambda header: header["row_count"].update(dtype=64), errors.TensorDtype),
    (lambda header: header["row_count"].update(shape=[4, 2]), errors.TensorShape),
    (lambda header: header["row_count"].update(shape=[2, 4.0]), errors.TensorShape),
    (lambda header: header["row_count"].update(shape=[10**4000, 1]), errors.TensorShape),
    (lambda header: header["bucket_edges"].update(data_offsets=[0, 20]), errors.TensorHeaderInvalid),
    (lambda header: header["bucket_edges"].update(data_offsets=[-20, 0]), errors.TensorHeaderInvalid),
    (lambda header: header["bucket_edges"].update(data_offsets=[20]), errors.TensorHeaderInvalid),
    (lambda header: header["bucket_edges"].update(data_offsets="ab"), errors.TensorHeaderInvalid),
]


@pytest.mark.parametrize(("change", "error"), HEADER_EDITS)
def test_edited_headers_are_refused(
    make_store: MakeStore, change: Callable[[dict[str, Any]], Any], error: type[errors.TensorsInvalid]
) -> None:
    store = make_store()
    header, data = split_safetensors((store.folder / "thresholds.safetensors").read_bytes())
    change(header)
    write_resealed(store.folder, store.manifest, with_header(json.dumps(header).encode(), data))
    with pytest.raises(errors.TensorsInvalid) as caught:
        load(store.folder)
    assert type(caught.value) is error


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 7,
        b"\x00" * 8,
        b"\xff" * 8 + b"{}",
        with_header(b" " * (64 * 1024) + b"{}", b""),
        with_header(b"[" * 60_000, b""),
        with_header(b"[]", b""),
        with_header(b"\xff", b""),
        with_header(b'{"a": ' + b"9" * 5000 + b"}", b""),
        with_header(b'{"a": 1, "a": 1}', b""),
        with_header(b"{}", b""),
    ],
)
def test_other_files_are_no_tensors(make_store: MakeStore, content: bytes) -> None:
    store = make_store()
    write_resealed(store.folder, store.manifest, content)
    with pytest.raises(errors.TensorsInvalid):
        load(store.folder)


@pytest.mark.parametrize("extra", [b"\x00", b"\x00" * 8])
def test_trailing_bytes_are_refused(make_store: MakeStore, extra: bytes) -> None:
    store = make_store()
    data = (store.folder / "thresholds.safetensors").read_bytes()
    write_resealed(store.folder, store.manifest, data + extra)
    with pytest.raises(errors.TensorHeaderInvalid, match="bytes; header and tensors take"):
        load(store.folder)


@pytest.mark.parametrize("name", ["manifest.yaml", "thresholds.safetensors"])
class TestFiles:
    """Both files are read with the same care."""

    def test_missing(self, make_store: MakeStore, name: str) -> None:
        file = make_store().folder / name
        file.unlink()
        with pytest.raises(errors.StoreUnreadable, match="No such file") as caught:
            load(file.parent)
        assert caught.value.file == file

    def test_too_large(self, make_store: MakeStore, name: str) -> None:
        file = make_store().folder / name
        os.truncate(file, max(io.MAX_MANIFEST_BYTES, io.MAX_TENSORS_BYTES if "safe" in name else 0) + 1)
        with pytest.raises(errors.StoreTooLarge):
            load(file.parent)

    def test_directory(self, make_store: MakeStore, name: str) -> None:
        file = make_store().folder / name
        file.unlink()
        file.mkdir()
        with pytest.raises(errors.StoreUnreadable):
            load(file.parent)

    def test_named_pipe(self, make_store: MakeStore, name: str) -> None:
        file = make_store().folder / name
        file.unlink()
        os.mkfifo(file)
        with pytest.raises(errors.StoreUnreadable, match="not a regular file"):
            load(file.parent)

    def test_link_out_of_the_folder(self, tmp_path: Path, make_store: MakeStore, name: str) -> None:
        file = make_store().folder / name
        file.rename(tmp_path / name)
        file.symlink_to(tmp_path / name)
        with pytest.raises(errors.StoreUnreadable, match="leaves the folder"):
            load(file.parent)

    def test_link_to_itself(self, make_store: MakeStore, name: str) -> None:
        file = make_store().folder / name
        file.unlink()
        file.symlink_to(file)
        with pytest.raises(errors.StoreUnreadable):
            load(file.parent)

    def test_link_within_the_folder(self, make_store: MakeStore, name: str) -> None:
        store = make_store()
        (store.folder / "..data").mkdir()
        (store.folder / name).rename(store.folder / "..data" / name)
        (store.folder / name).symlink_to(Path("..data") / name)
        assert_equal(load(store.folder), store)


def test_no_folder_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "nowhere", tmp_path / "file", "a\0b"):
        with pytest.raises(errors.StoreNotFound):
            load(folder)


def test_reads_the_architecture_of_a_model_directory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16})
    )
    make_draft().architecture.check(read_architecture(tmp_path))


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b"[" * 100_000, b'{"num_hidden_layers": 1e999}', None])
def test_refuses_an_unusable_model_directory(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(errors.ModelConfigError) as caught:
        read_architecture(tmp_path)
    assert caught.value.file == tmp_path / "config.json"
