"""The state on disk."""

from pathlib import Path

import numpy as np
import pytest

from vllm_toptheta.calibration.state import Checkpoint
from vllm_toptheta.errors import CalibrationError


def test_what_was_saved_comes_back_in_place(tmp_path: Path) -> None:
    saved = {"mean": np.random.default_rng(0).normal(size=(3, 2)), "count": np.arange(4), "none": np.zeros((0, 2))}
    file = tmp_path / "new" / ".state"
    Checkpoint(file, "a").save(7, saved)
    restored = {name: np.empty_like(array) for name, array in saved.items()}
    assert Checkpoint(file, "a").restore(restored) == 7
    for name, array in saved.items():
        np.testing.assert_array_equal(restored[name], array, strict=True)
    assert [entry.name for entry in file.parent.iterdir()] == [".state"]


def test_without_a_state_nothing_is_done(tmp_path: Path) -> None:
    arrays = {"mean": np.ones(3)}
    checkpoint = Checkpoint(tmp_path / ".state", "a")
    assert checkpoint.restore(arrays) == 0
    assert arrays["mean"].all()
    checkpoint.remove()


def test_the_state_of_another_calibration_is_refused(tmp_path: Path) -> None:
    file = tmp_path / ".state"
    Checkpoint(file, "a").save(7, {"mean": np.ones(3)})
    for fingerprint, array, message in [("b", np.ones(3), "other options"), ("a", np.ones(4), "another shape")]:
        with pytest.raises(CalibrationError, match=message) as caught:
            Checkpoint(file, fingerprint).restore({"mean": array})
        assert caught.value.file == file
        assert "--no-resume" in str(caught.value)
    Checkpoint(file, "b").remove()
    assert not file.exists()


@pytest.mark.parametrize("content", [b"", b"text", b"\xff" * 100])
def test_what_is_no_state_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / ".state"
    file.write_bytes(content)
    with pytest.raises(CalibrationError, match="not the state"):
        Checkpoint(file, "a").restore({})


def test_a_state_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CalibrationError, match="cannot be written"):
        Checkpoint(tmp_path / "file" / ".state", "a").save(1, {})
