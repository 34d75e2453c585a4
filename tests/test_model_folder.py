"""A model directory is made once, made again if damaged, and never seen half made."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_toptheta.errors import ConversionError
from vllm_toptheta.model_folder import COMPLETE, is_complete, make_folder


def write(folder: Path) -> None:
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).write_text(name * 100)


def refuse(folder: Path) -> None:
    pytest.fail("it was complete")


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "model", write, source="weights.gguf")


def test_it_is_made_once(made: Path) -> None:
    assert is_complete(made)
    assert make_folder(made, refuse, source="weights.gguf") == made


@pytest.mark.parametrize("damage", ["truncate", "delete", "unfinished"])
def test_a_damaged_folder_is_made_again(made: Path, damage: str) -> None:
    if damage == "truncate":
        (made / "model.safetensors").write_text("model")
    else:
        (made / ("tokenizer.json" if damage == "delete" else COMPLETE)).unlink()
    assert not is_complete(made)
    assert make_folder(made, write, source="weights.gguf") == made
    assert is_complete(made)
    assert [path.name for path in made.parent.iterdir() if path.is_dir()] == [made.name]


@pytest.mark.parametrize("there_is_one", [True, False])
def test_an_interrupted_conversion_leaves_nothing_behind(there_is_one: bool, made: Path) -> None:
    (made / COMPLETE).unlink()

    def fail(scratch: Path) -> None:
        (scratch / "config.json").write_text("{")
        raise KeyboardInterrupt

    folder = made if there_is_one else made.with_name("new")
    with pytest.raises(KeyboardInterrupt):
        make_folder(folder, fail, source="weights.gguf")
    assert not is_complete(folder)
    assert [path.name for path in made.parent.iterdir() if path.is_dir()] == [made.name]


def test_what_a_killed_process_left_goes_away(tmp_path: Path) -> None:
    (left := tmp_path / ".model.part").mkdir()
    (left / "model.safetensors.1").write_text("half")
    made = make_folder(tmp_path / "model", write, source="weights.gguf")
    assert not left.exists()
    assert not (made / "model.safetensors.1").exists()


def test_a_folder_of_somebody_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("unique")
    with pytest.raises(ConversionError, match="was not made by this command. Name an empty or new folder"):
        make_folder(tmp_path, refuse, source="weights.gguf")
    assert (tmp_path / "thesis.txt").read_text() == "unique"
