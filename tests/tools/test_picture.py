"""The picture in CONTRIBUTING.md is that of the imports as they are."""

from __future__ import annotations

import pytest

from tools import picture


def test_it_is_current() -> None:
    page = picture.PAGE.read_text(encoding="utf-8")
    assert page == picture.drawn(page), "run: python -m tools.picture"


def test_each_step_of_the_way_knows_its_neighbour() -> None:
    assert picture.gaps() == []
    assert picture.gaps({"here": "telemetry.stats", "there": "soak.run"}) == [
        ("vllm_toptheta.telemetry.stats", "vllm_toptheta.soak.run")
    ]


def test_every_part_and_its_imports_are_drawn() -> None:
    graph = picture.parts_imported()
    text = picture.picture()
    for name in graph:
        assert name in text
    drawn = {tuple(line.split(" --> ")) for line in text.replace("    ", "").splitlines() if " --> " in line}
    assert ("evaluation", "calibration") in drawn
    assert all(other in graph[one] for one, other in drawn)
    # evaluation imports the store too, by way of calibration
    assert "store" in graph["evaluation"]
    assert ("evaluation", "store") not in drawn


def test_a_page_without_a_place_for_it_is_an_error() -> None:
    with pytest.raises(SystemExit, match="lacks the line"):
        picture.drawn("# A page\n")
