"""`toptheta report`: what it prints, and what it leaves behind."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.calibration.tiny_model import write_text
from vllm_toptheta import cli
from vllm_toptheta.report import Report
from vllm_toptheta.store import ThresholdStore

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `toptheta report` with these arguments; return exit code, stdout and stderr."""

    def run_main(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["toptheta", "report", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        printed = capsys.readouterr()
        return int(caught.value.code or 0), printed.out, printed.err

    return run_main


def test_a_page_its_numbers_and_figures(run: Run, folder: Path, thresholds: ThresholdStore, tmp_path: Path) -> None:
    for name in ("seen-a.txt", "seen-b.txt"):
        write_text(tmp_path / name, 100)
    code, printed, told = run(
        *(folder / "tiny", "--text", folder / "held-out.txt", "--calibration-text", tmp_path / "seen-*.txt"),
        *("--thresholds", thresholds.folder, "--k", "8", "--length", 60, "--sequences", 1, "--device", "cpu"),
        *("--dtype", "bfloat16", "--attention-share", "0.25", "--out", tmp_path / "out.html"),
        *("--png", tmp_path / "png"),
    )
    assert code == 0, told
    assert printed.startswith("The target k:8 ")
    written = [Path(line.removeprefix("wrote ")) for line in told.splitlines() if line.startswith("wrote ")]
    assert written[:2] == [tmp_path / "out.html", tmp_path / "out.json"]
    assert len(written) == 8
    assert all(file.stat().st_size for file in written)
    report = Report.read((tmp_path / "out.json").read_text())
    assert (report.dtype, report.device, report.attention_share) == ("bfloat16", "cpu", 0.25)
    calibration = report.targets[0].calibration
    assert calibration is not None
    assert [source.name for source in calibration.text] == ["seen-a.txt", "seen-b.txt"]


def test_files_that_may_belong_to_either_option_are_refused(run: Run, folder: Path, tmp_path: Path) -> None:
    texts = [folder / "calibration.txt", folder / "held-out.txt"]
    code, _, told = run(
        *(folder / "tiny", "--text", texts[1], "--calibration-text", *texts, "--out", tmp_path / "out.html")
    )
    assert code == 2
    assert "--calibration-text: which texts does" in told
    assert not (tmp_path / "out.html").exists()


def test_many_held_out_files_may_follow_the_option(
    run: Run, folder: Path, thresholds: ThresholdStore, tmp_path: Path
) -> None:
    texts = [write_text(tmp_path / f"{name}.txt", 60, seed) for seed, name in enumerate("ab")]
    code, _, told = run(
        *(folder / "tiny", "--text", *texts, "--thresholds", thresholds.folder, "--k", "8", "--length", 60),
        *("--sequences", 1, "--device", "cpu", "--out", tmp_path / "out.html"),
    )
    assert code == 0, told
    held_out = Report.read((tmp_path / "out.json").read_text()).targets[0].held_out
    assert [source.name for source in held_out.text] == ["a.txt", "b.txt"]


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_a_missing_extra_names_its_command(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    for module in list(sys.modules):
        if module == package or module.startswith((f"{package}.", "vllm_toptheta.report.")):
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    code, _, told = run(folder / "tiny", "--text", folder / "held-out.txt", "--out", tmp_path / "out.html")
    assert code == 2
    assert f"needs the package {package}" in told
    assert "pip install 'vllm-toptheta[report]'" in told
