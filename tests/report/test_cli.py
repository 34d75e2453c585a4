"""`toptheta report`: what it prints, and what it leaves behind."""

import sys
from pathlib import Path

import pytest

from tests.calibration.tiny_model import write_text
from tests.cli.running import Run, runner
from tests.quality_factory import make_evidence
from tests.tuned_factory import make_tuned
from vllm_toptheta.evaluation import tuned_file
from vllm_toptheta.report import Report
from vllm_toptheta.store import ModelIdentity, ThresholdStore, read_architecture, record_quality, weights_sha256


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `toptheta report` with these arguments; return exit code, stdout and stderr."""
    return runner(monkeypatch, capsys, "report")


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
    assert (report.model, report.quality) == ("tiny", ())
    survivors = report.survivors
    assert survivors is not None
    assert (survivors.dtype, survivors.device, survivors.attention_share) == ("bfloat16", "cpu", 0.25)
    calibration = survivors.targets[0].calibration
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
    survivors = Report.read((tmp_path / "out.json").read_text()).survivors
    assert survivors is not None
    assert [source.name for source in survivors.targets[0].held_out.text] == ["a.txt", "b.txt"]


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


@pytest.fixture
def quality_store(folder: Path, tmp_path: Path) -> Path:
    """A store of the tiny model with evidence and nothing else, and beside it the record of tune."""
    evidence = make_evidence(weights_sha256=weights_sha256(folder / "tiny"))
    stored = tmp_path / "stores" / "acme--tiny"
    record_quality(
        stored,
        evidence,
        model=ModelIdentity(id="acme/tiny"),
        architecture=read_architecture(folder / "tiny"),
    )
    tuned_file(stored, "values").write_text(make_tuned(evidence, equal_rows=(1.5,)).model_dump_json())
    return stored


def test_evidence_is_drawn_without_a_model_or_text(run: Run, quality_store: Path, tmp_path: Path) -> None:
    code, printed, told = run(quality_store, "--out", tmp_path / "out.html", "--png", tmp_path / "png")
    assert code == 0, told
    assert printed.startswith("Floor 1.5 keeps perplexity within 0.5 % of dense attention, ")
    assert {file.name for file in (tmp_path / "png").iterdir()} == {
        "quality-values-loss.png",
        "quality-values-kl.png",
    }
    report = Report.read((tmp_path / "out.json").read_text())
    assert (report.model, report.survivors) == ("acme/tiny", None)
    (quality,) = report.quality
    assert quality.floors == (0.5, 1.5, 3.0)
    assert "Exact top-k that reads about as many value rows" in (tmp_path / "out.html").read_text()


def test_a_record_alone_needs_no_store(run: Run, quality_store: Path, tmp_path: Path) -> None:
    code, _, told = run("--from", tuned_file(quality_store, "values"), "--out", tmp_path / "out.html")
    assert code == 0, told
    assert "Top-Theta attention on tiny</h1>" in (tmp_path / "out.html").read_text()


def test_a_record_of_other_evidence_is_not_drawn(run: Run, quality_store: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text(make_tuned(make_evidence(seed=7)).model_dump_json())
    code, _, told = run(quality_store, "--from", other, "--out", tmp_path / "out.html")
    assert code == 2
    assert f"{other}: --from: not what the evidence in {quality_store} comes from" in told
    assert not (tmp_path / "out.html").exists()
    # one that lies beside the store was not asked for
    other.rename(tuned_file(quality_store, "values"))
    code, printed, told = run(quality_store, "--out", tmp_path / "out.html")
    assert code == 0, told
    assert "The store says nothing of other floors" in printed


def test_evidence_stands_before_what_is_kept_of_texts(
    run: Run, folder: Path, quality_store: Path, tmp_path: Path
) -> None:
    options = ("--thresholds", quality_store, "--length", 160, "--sequences", 1, "--device", "cpu")
    code, _, told = run(folder / "tiny", "--text", folder / "held-out.txt", *options, "--out", tmp_path / "out.html")
    assert code == 0, told
    report = Report.read((tmp_path / "out.json").read_text())
    assert report.survivors is not None
    # the floor that is promised, where none is named
    assert [target.label for target in report.survivors.targets] == ["floor:1.5"]
    assert not report.quality[0].other_weights
    page = (tmp_path / "out.html").read_text()
    assert page.index("Quality in mode values") < page.index("What is kept") < page.index("Target floor:1.5")


def test_other_weights_are_pointed_out(run: Run, folder: Path, quality_store: Path, tmp_path: Path) -> None:
    record = tmp_path / "other.json"
    record.write_text(make_tuned(make_evidence(weights_sha256="2" * 64)).model_dump_json())
    code, printed, told = run(folder / "tiny", "--from", record, "--out", tmp_path / "out.html")
    assert code == 0, told
    assert "has other weights than those measured" in printed
    assert "Other weights:" in (tmp_path / "out.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("{store}", "--text", "a.txt"), "{store}: --text: texts are measured with a model, and none is named"),
        (("{empty}",), "{empty}: there is no evidence of quality to draw. Measure it (toptheta tune "),
        ((), "there is no evidence of quality to draw. Measure it (toptheta tune "),
        (("--from", "{missing}"), "{missing}: cannot be read: No such file or directory. Name a file that toptheta "),
        (("--from", "{garbage}"), "{garbage}: not a record of tune: Invalid JSON"),
        (("--from", "{record}", "--from", "{record}"), "{record}: --from: a second record of mode values."),
        (("--from", "{record}", "b.txt", "c.txt"), "--text: which texts does 'c.txt' belong to?"),
        (("{store}", "--calibration-text", "a.txt"), "--calibration-text: nothing to compare with. Give --text too."),
        (("--from", "{out}.json"), "{out}.html: --out: its numbers would take the place of {out}.json."),
    ],
)
def test_what_cannot_be_drawn_is_said_and_leaves_nothing(
    run: Run, thresholds: ThresholdStore, quality_store: Path, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    (tmp_path / "garbage.json").write_text("[")
    names = {
        "store": quality_store,
        "empty": thresholds.folder,
        "missing": tmp_path / "missing.json",
        "garbage": tmp_path / "garbage.json",
        "record": tuned_file(quality_store, "values"),
        "out": tmp_path / "out",
    }
    before = set(tmp_path.rglob("*"))
    code, printed, told = run(*(word.format(**names) for word in arguments), "--out", tmp_path / "out.html")
    assert (code, printed) == (2, "")
    assert f"error: {words.format(**names)}" in told
    assert set(tmp_path.rglob("*")) == before
