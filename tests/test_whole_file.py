"""A disk that is full, or an interrupt, leaves what was there before and nothing beside it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.store_factory import make_store
from vllm_toptheta.calibration.state import Checkpoint
from vllm_toptheta.errors import CalibrationError, StoreNotWritable
from vllm_toptheta.store import load
from vllm_toptheta.whole_file import unfinished, write_whole


def full(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupt(*arguments: object) -> None:
    raise KeyboardInterrupt


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_with_its_folder(tmp_path: Path) -> None:
    file = tmp_path / "new" / "deep" / "a.json"
    unfinished(tmp_path / "a").write_bytes(b"of a process that was killed")
    write_whole(file, b"first")
    write_whole(file, b"second")
    assert file.read_bytes() == b"second"
    assert entries(file.parent) == ["a.json"]


@pytest.mark.parametrize("place", ["fsync", "replace"])
@pytest.mark.parametrize(("fail", "kind"), [(full, OSError), (interrupt, KeyboardInterrupt)])
def test_nothing_is_left_of_a_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    fail: Callable[..., None],
    kind: type[BaseException],
) -> None:
    write_whole(tmp_path / "a.json", b"first")
    monkeypatch.setattr(os if place == "fsync" else Path, place, fail)
    with pytest.raises(kind):
        write_whole(tmp_path / "a.json", b"second")
    assert entries(tmp_path) == ["a.json"]
    assert (tmp_path / "a.json").read_bytes() == b"first"


def test_a_full_disk_leaves_the_state_of_a_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, arrays = Checkpoint(tmp_path / ".state", "a"), {"mean": np.ones(3)}
    checkpoint.save(1, arrays)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CalibrationError, match="No space left on device.*a disk with room") as caught:
        checkpoint.save(2, arrays)
    assert caught.value.file == tmp_path / ".state"
    assert checkpoint.restore(arrays) == 1
    assert entries(tmp_path) == [".state"]


@pytest.mark.parametrize("has_old", [True, False])
def test_a_full_disk_leaves_the_old_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_old: bool) -> None:
    before = make_store(tmp_path / "acme--tiny").manifest if has_old else None
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreNotWritable, match="No space left on device.*a disk with room"):
        make_store(tmp_path / "acme--tiny", max_length=2048)
    assert entries(tmp_path) == (["acme--tiny"] if has_old else [])
    assert before is None or load(tmp_path / "acme--tiny").manifest == before


def test_an_interrupt_between_two_renames_leaves_the_old_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = make_store(tmp_path / "acme--tiny").manifest
    rename = Path.rename

    def interrupted(source: Path, target: Path) -> Path:
        if source.name == "new":
            raise KeyboardInterrupt
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_store(tmp_path / "acme--tiny", max_length=2048)
    assert entries(tmp_path) == ["acme--tiny"]
    assert load(tmp_path / "acme--tiny").manifest == before
