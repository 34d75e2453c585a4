"""Read and write a store: the folder `<org>--<model>` with manifest.yaml and thresholds.safetensors.

Reading trusts nothing. Each file is opened once, and what is checked is what is used; a store is returned whole or not
at all. Writing checks the bytes by the same code before any file is touched, and renames a finished folder into place.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from pydantic import ValidationError

from vllm_toptheta.errors import (
    ChecksumMismatch,
    ManifestInvalid,
    ManifestVersion,
    StoreNotFound,
    StoreNotWritable,
    StoreTooLarge,
    StoreUnreadable,
)
from vllm_toptheta.store import strict_yaml, tensors
from vllm_toptheta.store.expectations import EXPECTATION_NAMES, Expectations
from vllm_toptheta.store.quality import Evidence
from vllm_toptheta.store.schema import (
    READABLE_VERSIONS,
    SCHEMA_VERSION,
    Architecture,
    Manifest,
    ManifestDraft,
    ModelIdentity,
    clip,
    describe,
)
from vllm_toptheta.store.shadow import SHADOW_NAMES, ShadowKeys
from vllm_toptheta.store.thresholds import CalibratedThresholds, ThresholdStore

MANIFEST_NAME = "manifest.yaml"
TENSORS_NAME = "thresholds.safetensors"
MAX_MANIFEST_BYTES = 1 << 20
MAX_TENSORS_BYTES = 256 << 20

_RESTORE = "Restore the folder from where it came, or calibrate the model again (toptheta calibrate --help)"


def load(folder: Path | str) -> ThresholdStore:
    """Read a store and check everything in it.

    Args:
        folder: The folder that contains manifest.yaml and thresholds.safetensors.

    Raises:
        StoreError: One of its sub-classes, the first check that fails.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise StoreNotFound(
            "there is no such folder", file=folder, remedy="Name a folder that contains a manifest.yaml"
        )
    manifest_bytes = _read(folder, MANIFEST_NAME, MAX_MANIFEST_BYTES)
    return _parse(folder, manifest_bytes, _read(folder, TENSORS_NAME, MAX_TENSORS_BYTES))


def save(folder: Path | str, draft: ManifestDraft, arrays: Mapping[str, NDArray[Any]]) -> ThresholdStore:
    """Write a store, replacing the one that may be there.

    Args:
        folder: Where to; its parents are created. An existing folder is replaced only if it is a store or empty.
        draft: The manifest without its checksums; those of a whole `Manifest` are computed anew.
        arrays: By name, in the dtypes and shapes of `tensors.expected_formats`: the tensors of `CalibratedThresholds`
            if the draft has thresholds, with those of `Expectations` if they were measured, and those of
            `shadow.SHADOW_NAMES` if it has shadow keys.

    Returns:
        The store, as `load` will return it.

    Raises:
        StoreError: The tensors contradict the manifest, or the folder cannot be written.
    """
    folder = Path(folder).absolute()
    tensor_bytes = tensors.encode(arrays)
    if len(tensor_bytes) > MAX_TENSORS_BYTES:
        raise StoreTooLarge(
            f"{len(tensor_bytes)} bytes; no more than {MAX_TENSORS_BYTES} would be read",
            file=folder / TENSORS_NAME,
            remedy="Calibrate fewer ks, or shadow keys of fewer channels",
        )
    manifest = Manifest.from_draft(draft, tensors_sha256=hashlib.sha256(tensor_bytes).hexdigest())
    manifest_bytes = strict_yaml.dump(manifest.model_dump(exclude_none=True)).encode()
    store = _parse(folder, manifest_bytes, tensor_bytes)
    try:
        with _replaced(folder) as new:
            _write(new / MANIFEST_NAME, manifest_bytes)
            _write(new / TENSORS_NAME, tensor_bytes)
            _sync_directory(new)
    except OSError as error:
        raise StoreNotWritable(
            f"cannot be written: {error.strerror}",
            file=folder,
            remedy="Choose a folder that you may write to, on a disk with room",
        ) from error
    return store


def record_quality(
    folder: Path | str, evidence: Evidence, *, model: ModelIdentity, architecture: Architecture
) -> ThresholdStore:
    """Write what was measured into a model's store, which is made if need be; what it holds otherwise stays.

    Args:
        folder: The store; its evidence of the same mode is replaced.
        evidence: What was measured.
        model: Of a new store.
        architecture: The model's.

    Returns:
        The store, as `load` will return it.

    Raises:
        StoreError: The store is damaged or that of another architecture, or the folder cannot be written.
    """
    folder = Path(folder)
    if not (folder / MANIFEST_NAME).exists():
        return save(folder, ManifestDraft(model=model, architecture=architecture, quality=(evidence,)), {})
    manifest = load(folder).manifest
    manifest.architecture.check(architecture, file=folder)
    arrays = tensors.decode(_read(folder, TENSORS_NAME, MAX_TENSORS_BYTES), manifest, file=folder / TENSORS_NAME)
    others = [other for other in manifest.quality or () if other.mode != evidence.mode]
    return save(folder, manifest.model_copy(update={"quality": (*others, evidence)}), arrays)


def _parse(folder: Path, manifest_bytes: bytes, tensor_bytes: bytes) -> ThresholdStore:
    manifest = _parse_manifest(manifest_bytes, folder / MANIFEST_NAME)
    tensors_file = folder / TENSORS_NAME
    digest = hashlib.sha256(tensor_bytes).hexdigest()
    if digest != manifest.tensors.sha256:
        raise ChecksumMismatch(
            f"its sha256 is {digest}, but {MANIFEST_NAME} says {manifest.tensors.sha256}",
            file=tensors_file,
            field="tensors.sha256",
            remedy=_RESTORE,
        )
    arrays = tensors.decode(tensor_bytes, manifest, file=tensors_file)
    measured = {name: arrays.pop(name) for name in EXPECTATION_NAMES if name in arrays}
    shadow = [arrays.pop(name) for name in SHADOW_NAMES if name in arrays]
    expectations = Expectations(**measured) if measured else None
    return ThresholdStore(
        folder,
        manifest,
        calibrated=CalibratedThresholds(**arrays, expectations=expectations) if manifest.thresholds else None,
        shadow_keys=ShadowKeys(folder, manifest, *shadow) if manifest.shadow else None,
    )


def _parse_manifest(content: bytes, file: Path) -> Manifest:
    try:
        fields = strict_yaml.parse(content.decode("utf-8"))
    except ValueError as error:
        raise ManifestInvalid(f"not a YAML manifest: {error}", file=file, remedy=_RESTORE) from None
    # asked first, because another version may differ in everything else
    version = fields.get("schema_version")
    if type(version) is not int:
        raise ManifestInvalid(
            f"expected an integer, got {clip(version)}", file=file, field="schema_version", remedy=_RESTORE
        )
    if version not in READABLE_VERSIONS:
        raise ManifestVersion(
            f"version {version}; this release reads versions {' and '.join(map(str, READABLE_VERSIONS))}",
            file=file,
            field="schema_version",
            remedy="Upgrade vllm-toptheta"
            if version > SCHEMA_VERSION
            else "Calibrate the model again (toptheta calibrate --help)",
        )
    try:
        manifest = Manifest.model_validate(fields)
    except ValidationError as error:
        field, message = describe(error)
        raise ManifestInvalid(message, file=file, field=field, remedy=_RESTORE) from None
    if manifest.digest() != manifest.content_sha256:
        raise ChecksumMismatch(
            "the manifest was changed after it was written", file=file, field="content_sha256", remedy=_RESTORE
        )
    return manifest


def _read(folder: Path, name: str, max_bytes: int) -> bytes:
    """Read a regular file that lies in the folder, opening it once."""
    file = folder / name
    try:
        # links within the folder are allowed: that is how Kubernetes mounts a config map
        target = file.resolve(strict=True)
        if not target.is_relative_to(folder.resolve()):
            raise StoreUnreadable("a link that leaves the folder", file=file, remedy="Put the file itself there")
        # without O_NONBLOCK, opening a named pipe would wait for its writer
        descriptor = os.open(target, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as stream:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise StoreUnreadable("not a regular file", file=file, remedy=_RESTORE)
            if status.st_size > max_bytes:
                raise StoreTooLarge(
                    f"{status.st_size} bytes; at most {max_bytes} are allowed", file=file, remedy=_RESTORE
                )
            return stream.read(max_bytes)
    except (OSError, RuntimeError) as error:  # a cycle of links is a RuntimeError until Python 3.13
        reason = getattr(error, "strerror", None) or str(error)
        raise StoreUnreadable(f"cannot be read: {reason}", file=file, remedy=_RESTORE) from None


def check_place(folder: Path) -> None:
    """Refuse to write a store where `save` would refuse it or fail, as far as can be said before there is one.

    Args:
        folder: Where to; nothing is made there.

    Raises:
        StoreNotWritable: It holds other files, is none, or lies where nothing may be made.
    """
    remedy = "Choose a folder of its own for the store"
    try:
        foreign = {entry.name for entry in folder.iterdir()} - {MANIFEST_NAME, TENSORS_NAME}
    except FileNotFoundError:
        foreign = set()
    except OSError as error:
        raise StoreNotWritable(f"cannot be written: {error.strerror}", file=folder, remedy=remedy) from None
    if foreign:
        raise StoreNotWritable(
            f"holds other files ({clip(sorted(foreign)[0])}), so it is not replaced", file=folder, remedy=remedy
        )
    parent = next(parent for parent in folder.absolute().parents if parent.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        raise StoreNotWritable("nothing may be written there", file=parent, remedy="Choose another folder")


def _write(file: Path, content: bytes) -> None:
    with file.open("xb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


@contextlib.contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `folder` once the block has filled it without an error."""
    check_place(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    workspace = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    new, old = workspace / "new", workspace / "old"
    try:
        new.mkdir()  # not the workspace itself, which nobody else may read
        yield new
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except BaseException:  # also an interrupt
            if old.exists():
                old.rename(folder)
            raise
        _sync_directory(folder.parent)
    finally:
        # should even the way back fail, the old store stays in the workspace
        if folder.exists() or not old.exists():
            shutil.rmtree(workspace)


def _sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
