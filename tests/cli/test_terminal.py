import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import typer
from pydantic import BaseModel

from vllm_toptheta.cli.terminal import check_file, check_folder, integers, recorded_command, words, write_json
from vllm_toptheta.errors import SettingsError

OUT = cast(typer.CallbackParam, SimpleNamespace(opts=["--out"]))


class Report(BaseModel):
    number: int


def test_words_and_integers_are_separated_by_commas() -> None:
    assert words(" a, b,,c ") == ["a", "b", "c"]
    assert words("") == []
    assert integers("--k", "32, 64,") == [32, 64]
    with pytest.raises(SettingsError, match="--k: not whole numbers: '32,x'. Write them as 32,64,128"):
        integers("--k", "32,x")


def test_a_report_is_written_where_it_can_be(tmp_path: Path) -> None:
    write_json(None, Report(number=1))
    write_json(tmp_path / "report.json", Report(number=1))
    assert Report.model_validate_json((tmp_path / "report.json").read_text()) == Report(number=1)
    write_json(tmp_path / "new" / "folder" / "report.json", Report(number=2))
    assert (tmp_path / "new" / "folder" / "report.json").exists()
    with pytest.raises(SettingsError, match="--json: cannot be written: "):
        write_json(tmp_path / "report.json" / "report.json", Report(number=1))


def test_a_recorded_command_is_one_that_a_manifest_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["toptheta", "tune", "/models/tiny", "--text", "code=/texts/a b.txt", "\x1b[1m\n"])
    command = recorded_command(Path("/models/tiny"), Path("/texts/a b.txt"))
    assert command == "toptheta tune tiny --text 'code=a b.txt' '?[1m?'"
    monkeypatch.setattr(sys, "argv", ["toptheta", *(f"file-{number}.txt" for number in range(10_000))])
    assert len(recorded_command()) == 8192


def test_what_cannot_be_written_is_said_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert check_file(OUT, None) is check_folder(OUT, None) is None
    for name in ("file", "new.json", "new/deep/report.json"):
        assert check_file(OUT, tmp_path / name) == tmp_path / name
    assert check_folder(OUT, tmp_path / "new") == tmp_path / "new"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
    with pytest.raises(SettingsError, match="--out: is a folder"):
        check_file(OUT, tmp_path)
    with pytest.raises(SettingsError, match="file: --out: nothing may be written there"):
        check_file(OUT, tmp_path / "file" / "report.json")
    with pytest.raises(SettingsError, match="file: --out: nothing may be written there"):
        check_folder(OUT, tmp_path / "file")
