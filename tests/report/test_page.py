from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vllm_toptheta.errors import ReportError
from vllm_toptheta.report import Report
from vllm_toptheta.report.figures import draw
from vllm_toptheta.report.findings import SurvivorReport
from vllm_toptheta.report.page import draw_report, render, write_report

NAMES = ["survivors", "reads", "lengths", "positions", "lost-mass", "thresholds"]


class Page(HTMLParser):
    """What the tests want to know of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: dict[str, str] = {}
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        if self.tags:
            self.texts[self.tags[-1]] = self.texts.get(self.tags[-1], "") + data

    def values(self, tag: str, name: str) -> list[str]:
        return [value for of, attribute, value in self.attributes if (of, attribute) == (tag, name)]


@pytest.fixture(scope="module")
def html(report: Report) -> str:
    return render(report, draw_report(report))


def test_the_page_needs_nothing_but_itself(html: str) -> None:
    page = Page(html)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form", "video", "audio"} & set(page.tags)
    loading = {"src", "href", "srcset", "data", "action", "poster", "background", "xlink:href"}
    loaded = [value for _, name, value in page.attributes if name in loading]
    assert len(loaded) == len(NAMES) * 3 - 1
    assert all(value.startswith("data:image/png;base64,") for value in loaded)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert "url(" not in html
    assert "@import" not in html
    assert "://" not in html
    assert page.values("meta", "content")[-1].startswith("default-src 'none'")


def test_the_page_can_be_heard(html: str, survivors: SurvivorReport) -> None:
    page = Page(html)
    assert page.values("html", "lang") == ["en"]
    assert page.texts["title"].strip() == "Top-Theta report: tiny"
    assert page.tags.count("h1") == 1
    alts = page.values("img", "alt")
    assert len(alts) == len(set(alts)) == len(NAMES) * len(survivors.targets) - 1
    assert all(len(alt) > 40 and any(letter.isdigit() for letter in alt) for alt in alts)
    assert page.tags.count("caption") == page.tags.count("table")
    assert set(page.values("th", "scope")) == {"col", "row"}
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert set(page.values("section", "aria-labelledby")) <= set(ids)


def test_the_numbers_are_on_the_page(html: str, survivors: SurvivorReport) -> None:
    for target in survivors.targets:
        for rows in target.held_out.by_length:
            assert f"{100 * rows.expectation.value_rows_share:.1f} %" in html
            assert f"{rows.expectation.step_speedup:.2f} x" in html
        assert f"{100 * target.held_out.mean_lost_mass:.1f} %" in html
    assert "Not held out:" not in html
    assert "may help" in html or "would not help" in html


def test_names_are_escaped_and_warnings_shown(survivors: SurvivorReport) -> None:
    hostile = survivors.model_copy(update={"not_held_out": ('"<b>',), "not_calibrated_on": ("x&y",)})
    report = Report(model="<script>alert(1)</script>", quality=(), survivors=hostile)
    html = render(report, {name: [] for name in draw_report(report)})
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "&lt;b&gt;" in html
    assert "x&amp;y" in html
    assert "Not held out:" in html


def test_files_are_written_together(survivors: SurvivorReport, tmp_path: Path) -> None:
    of_one = survivors.model_copy(update={"targets": survivors.targets[1:2]})
    report = Report(model="tiny", quality=(), survivors=of_one)
    out = tmp_path / "deep" / "report.html"
    written = write_report(report, out, png=tmp_path / "figures")
    assert set(written) == {file for file in tmp_path.rglob("*") if file.is_file()}
    assert Report.read(out.with_suffix(".json").read_text()) == report
    pictures = sorted(file.name for file in (tmp_path / "figures").iterdir())
    assert pictures == sorted(f"k-8-{name}.png" for name in NAMES)
    before = out.read_bytes()
    write_report(report, out)
    assert out.read_bytes() == before
    for out in (tmp_path / "report.json", tmp_path / "figures" / "k-8-reads.png" / "report.html"):
        with pytest.raises(ReportError):
            write_report(report, out)


def test_figures_are_large_and_not_blank(survivors: SurvivorReport, tmp_path: Path) -> None:
    for picture in draw(survivors.targets[1]):
        file = tmp_path / picture.name
        file.write_bytes(picture.png)
        with Image.open(file) as image:
            pixels = np.asarray(image.convert("RGB"))
        assert pixels.shape[1] > 900
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


def test_odd_reports_can_be_drawn(survivors: SurvivorReport) -> None:
    """No calibration text, no dense layer in the list, probabilities, a k between two, one length bucket."""
    target = survivors.targets[1]
    assert target.curves is not None
    held_out = target.held_out.model_copy(update={"by_length": target.held_out.by_length[:1]})
    thresholds = tuple(tuple(tuple(0.01 for _ in heads) for heads in layers) for layers in target.curves.thresholds)
    curves = target.curves.model_copy(update={"placement": "post_softmax", "thresholds": thresholds})
    odd = target.model_copy(
        update={"label": "k:100", "held_out": held_out, "calibration": None, "curves": curves, "dense_layers": ()}
    )
    plain = Report(model="tiny", quality=(), survivors=survivors.model_copy(update={"targets": (odd,)}))
    pictures = draw_report(plain)
    assert [picture.name for picture in pictures["k-100"]] == NAMES
    html = render(plain, pictures)
    assert "k-100" in html
    assert "calibration</td>" not in html
