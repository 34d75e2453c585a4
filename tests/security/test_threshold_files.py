"""What a malicious threshold file can do: nothing but to be refused, soon and cheaply. SECURITY.md claims it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests import store_factory
from tests.store.mutation import split_safetensors, with_header, write_resealed
from vllm_toptheta.store import ThresholdStore, io, strict_yaml

SECONDS = 15.0  # the slowest takes 2, on a machine that does nothing else
MEGABYTES = 200
OUTSIDE = "root:x:0:0"


class Case(NamedTuple):
    """A way to attack, and the exception that it ends in."""

    attack: Callable[[ThresholdStore], None]
    outcome: str


def manifest(text: str | bytes) -> Callable[[ThresholdStore], None]:
    content = text.encode() if isinstance(text, str) else text
    return lambda store: (store.folder / "manifest.yaml").write_bytes(content) and None


def edited(**fields: Any) -> Callable[[ThresholdStore], None]:
    """Change top-level fields of the manifest and its own checksum with them."""

    def attack(store: ThresholdStore) -> None:
        file = store.folder / "manifest.yaml"
        content = strict_yaml.parse(file.read_text()) | fields
        body = {key: value for key, value in content.items() if key != "content_sha256"}
        canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), default=str).encode()
        file.write_text(strict_yaml.dump({**body, "content_sha256": hashlib.sha256(canonical).hexdigest()}))

    return attack


def tensors(content: bytes) -> Callable[[ThresholdStore], None]:
    return lambda store: write_resealed(store.folder, store.manifest, content)


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[ThresholdStore], None]:
    def attack(store: ThresholdStore) -> None:
        fields, data = split_safetensors((store.folder / "thresholds.safetensors").read_bytes())
        change(fields)
        write_resealed(store.folder, store.manifest, with_header(json.dumps(fields).encode(), data))

    return attack


def numbers(value: float) -> Callable[[ThresholdStore], None]:
    """Overwrite the first coefficient; the checksums are right."""

    def attack(store: ThresholdStore) -> None:
        fields, data = split_safetensors((store.folder / "thresholds.safetensors").read_bytes())
        start = fields["coefficients"]["data_offsets"][0]
        data = data[:start] + np.float32(value).tobytes() + data[start + 4 :]
        write_resealed(store.folder, store.manifest, with_header(json.dumps(fields).encode(), data))

    return attack


def link(name: str, target: str) -> Callable[[ThresholdStore], None]:
    def attack(store: ThresholdStore) -> None:
        (store.folder / name).unlink()
        (store.folder / name).symlink_to(target)

    return attack


def pipe(store: ThresholdStore) -> None:
    (store.folder / "thresholds.safetensors").unlink()
    os.mkfifo(store.folder / "thresholds.safetensors")


def sparse(name: str, size: int) -> Callable[[ThresholdStore], None]:
    return lambda store: os.truncate(store.folder / name, size)


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
CASES = {
    # code in YAML, and bombs
    "python object": Case(manifest("a: !!python/object/apply:os.system ['touch pwned']\n"), "ManifestInvalid"),
    "python name": Case(manifest("a: !!python/name:os.system\n"), "ManifestInvalid"),
    "custom tag": Case(manifest("a: !include /etc/passwd\n"), "ManifestInvalid"),
    "billion laughs": Case(manifest(LAUGHS), "ManifestInvalid"),
    "merge keys": Case(manifest("a: &a {b: 1}\nc: {<<: *a}\n"), "ManifestInvalid"),
    "deep nesting": Case(manifest("a: " + "[" * 500_000), "ManifestInvalid"),
    "long number": Case(manifest("schema_version: " + "9" * 900_000), "ManifestInvalid"),
    "long hexadecimal": Case(manifest("schema_version: 0x" + "f" * 900_000), "ManifestInvalid"),
    "sexagesimal number": Case(manifest("schema_version: " + "1:" * 400_000 + "1"), "ManifestInvalid"),
    "a list of everything": Case(manifest("schema_version: 1\na: [" + "1," * 500_000 + "]"), "ManifestInvalid"),
    "many keys": Case(manifest("".join(f"k{i}: 1\n" for i in range(90_000))), "ManifestInvalid"),
    "no text": Case(manifest(b"\xff\xfe" * 1000), "ManifestInvalid"),
    # names that look like paths
    "model out of the folder": Case(edited(model={"id": "../../etc/passwd"}), "ManifestInvalid"),
    "model with an absolute path": Case(edited(model={"id": "/etc/passwd"}), "ManifestInvalid"),
    "file named by the manifest": Case(edited(tensors={"sha256": "0" * 64, "file": "/etc/passwd"}), "ManifestInvalid"),
    # numbers that would make a reader allocate
    "giant architecture": Case(
        edited(architecture={"num_layers": 1 << 40, "num_heads": 1, "num_kv_heads": 1, "head_size": 1, "rope": {}}),
        "ManifestInvalid",
    ),
    "giant tensors by the manifest": Case(
        edited(architecture={"num_layers": 1024, "num_heads": 1024, "num_kv_heads": 1, "head_size": 64, "rope": {}}),
        "TensorShape",
    ),
    "giant tensors by the header": Case(
        header(lambda fields: fields["coefficients"].update(shape=[1 << 31, 1 << 31, 2, 3])), "TensorShape"
    ),
    "offsets beyond the file": Case(
        header(lambda fields: fields["row_count"].update(data_offsets=[0, 1 << 40])), "TensorHeaderInvalid"
    ),
    "a header of 2^63 bytes": Case(tensors((1 << 63).to_bytes(8, "little") + b"{}"), "TensorHeaderInvalid"),
    "a header of 100 MB": Case(tensors(with_header(b" " * (100 << 20), b"")), "TensorHeaderInvalid"),
    "a nested header": Case(tensors(with_header(b"[" * 60_000, b"")), "TensorHeaderInvalid"),
    "a pickle": Case(tensors(b"\x80\x04\x95cposix\nsystem\n(S'touch pwned'\ntR."), "TensorHeaderInvalid"),
    "a giant manifest": Case(sparse("manifest.yaml", 1 << 40), "StoreTooLarge"),
    "a giant tensor file": Case(sparse("thresholds.safetensors", 1 << 40), "StoreTooLarge"),
    # numbers that would make wrong attention
    "NaN": Case(numbers(float("nan")), "TensorNotFinite"),
    "infinity": Case(numbers(float("-inf")), "TensorNotFinite"),
    "the largest float": Case(numbers(3e38), "TensorValues"),
    # files that are no files, or not ours
    "link out of the folder": Case(link("manifest.yaml", "/etc/passwd"), "StoreUnreadable"),
    "relative link out of the folder": Case(link("thresholds.safetensors", "../outside"), "StoreUnreadable"),
    "link to a device": Case(link("thresholds.safetensors", "/dev/zero"), "StoreUnreadable"),
    "link to a process": Case(link("manifest.yaml", "/proc/self/environ"), "StoreUnreadable"),
    "link to itself": Case(link("manifest.yaml", "manifest.yaml"), "StoreUnreadable"),
    "named pipe": Case(pipe, "StoreUnreadable"),
}
# extreme, yet allowed: the thresholds keep nothing or everything; tests/security/test_bounds.py says what follows
ALLOWED = {"keep nothing": numbers(1e9), "keep everything": numbers(-1e9)}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What happened to each hostile store, all loaded by one observed process."""
    base = tmp_path_factory.mktemp("stores")
    (base / "outside").write_text(OUTSIDE)
    good = store_factory.make_store(base / "good").folder
    attacks = {name: case.attack for name, case in CASES.items()} | ALLOWED
    folders = []
    for number, attack in enumerate(attacks.values()):
        store = store_factory.make_store(base / f"store-{number}")
        attack(store)
        folders.append(store.folder)
    done = subprocess.run(
        [sys.executable, "-m", "tests.security.observe", good, *folders],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not list(base.rglob("pwned"))
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {
        name: record | {"folder": str(folder)} for name, folder, record in zip(attacks, folders, lines, strict=True)
    }


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_soon_and_cheaply(records: dict[str, dict[str, Any]], name: str) -> None:
    record = records[name]
    assert record["outcome"] == CASES[name].outcome, record["message"]
    assert record["seconds"] < SECONDS
    assert record["grown"] < MEGABYTES << 20
    assert len(record["message"]) < 2000
    assert OUTSIDE not in record["message"]


@pytest.mark.parametrize("name", [*CASES, *ALLOWED])
def test_nothing_happens_but_reading_its_two_files(records: dict[str, dict[str, Any]], name: str) -> None:
    record = records[name]
    files = {f"open {str(Path(record['folder'], file))!r}" for file in (io.MANIFEST_NAME, io.TENSORS_NAME)}
    # a descriptor of one of them is wrapped into a file object
    seen = {event for event in record["events"] if not event.removeprefix("open ").isdigit()}
    assert seen <= files
    if name in ALLOWED:
        assert seen == files


@pytest.mark.parametrize("name", ALLOWED)
def test_extreme_thresholds_are_finite(records: dict[str, dict[str, Any]], name: str) -> None:
    assert records[name]["outcome"] == "loaded"
