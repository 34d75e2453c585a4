"""Evidence as a report has it: what its page, its figures and its words say are the record's own figures."""

from pathlib import Path
from typing import Any

import pytest

from tests.quality_factory import make_evidence, make_length, make_probe, make_promise
from tests.report.test_page import Page
from tests.tuned_factory import make_tuned
from vllm_toptheta.errors import EvaluationError
from vllm_toptheta.evaluation import DecodeReport, Tuned, read_tuned
from vllm_toptheta.evaluation.paired import upper_bound
from vllm_toptheta.report import Report
from vllm_toptheta.report.page import draw_report, render
from vllm_toptheta.report.quality import Quality
from vllm_toptheta.report.quality_figures import draw_quality
from vllm_toptheta.report.quality_verdict import quality_verdict
from vllm_toptheta.store import Evidence, Promise

LENGTHS = (1024, 4096)


def with_layers(**fields: Any) -> Evidence:
    """Evidence of two lengths, with lost mass by layer."""
    measured = (
        make_length(1024, change_percent=0.37, change_bound=0.46, lost_mass_p99=(None, 0.31)),
        make_length(4096, change_percent=0.12, change_bound=0.21, lost_mass_p99=(None, 0.13)),
    )
    high = make_promise(0.5, preset="high", max_loss=0.2, lengths=LENGTHS)
    return make_evidence(
        Promise(max_loss=0.5, weight_floor=1.5, measured=measured),
        high,
        make_promise(None, preset="exact", max_loss=0.05),
        **fields,
    )


@pytest.fixture(scope="module")
def tuned() -> Tuned:
    return make_tuned(with_layers(), lengths=LENGTHS, equal_rows=(1.5, 3.0))


@pytest.fixture(scope="module")
def quality(tuned: Tuned) -> Quality:
    return Quality.of(tuned.evidence, tuned)


def page_of(*found: Quality, model: str = "tiny") -> str:
    report = Report(model=model, quality=found, survivors=None)
    return render(report, draw_report(report))


def test_rungs_are_the_ladder_with_bounds(quality: Quality) -> None:
    assert quality.lengths == LENGTHS
    assert quality.floors == (0.5, 1.5, 3.0)
    assert [(rung.label, rung.equal_rows) for rung in quality.rungs] == [
        ("floor:0.5", None),
        ("floor:1.5", None),
        ("floor:3", None),
        ("k:100", "floor:1.5"),
        ("k:100", "floor:3"),
    ] * 2
    short, long = quality.at_floor(3.0)
    assert (short.length, long.length) == LENGTHS
    assert short.change_percent == pytest.approx(0.3)
    assert short.change_bound == upper_bound(0.3, 0.04, 8, confidence=0.95)
    assert [one.layer for one in quality.served_layers[1024]] == [0, 1]


def test_the_words_say_what_is_promised_and_where_it_lies(quality: Quality) -> None:
    words = quality_verdict(quality)
    assert words.promised.startswith(
        "Floor 1.5 keeps perplexity within 0.5 % of dense attention, in sequences of up to 4,096 tokens"
    )
    assert "Floor 0.5 keeps perplexity within 0.2 % of dense attention (high), for requests" in words.promised
    assert "Not kept by any floor that was tried: perplexity within 0.05 % (exact)." in words.promised
    assert "At 1,024 tokens perplexity changes by +0.37 +- 0.08 % and by less than +0.46 %, with 95%" in words.figures
    assert "cut from prose.txt." in words.figures
    assert "Nearest to the promise of 0.5 % is +0.46 % at 1,024 tokens." in words.where
    assert "Exact top-k that reads about as many value rows changes perplexity" in words.where
    assert "by +0.30 +- 0.04 % in place of +0.15 +- 0.04 % (KL 0.00300 in place of 0.00150) at 1,024" in words.where
    assert "of up to 768 tokens, which a server leaves dense" in words.unknown
    assert "nor of ones longer than 4,096" in words.unknown
    assert "--equal-rows" not in words.unknown


def test_the_next_larger_floor_is_said_to_fail_or_not_to_be_confirmed_or_not_to_be_there(tuned: Tuned) -> None:
    # 3 loses 0.3 %, less than the 0.5 % that is promised
    assert "floor:3, kept it on the sequences of the choice, and was not tried further" in (
        quality_verdict(Quality.of(tuned.evidence, tuned)).where
    )
    # and lost 0.6 % on those to confirm it
    worse = make_tuned(with_layers(), lengths=LENGTHS, floors=(1.5, 6.0)).ladder.model_dump_json()
    tried = DecodeReport.model_validate_json(worse.replace('"floor:6"', '"floor:3"'))
    unconfirmed = tuned.model_copy(update={"confirmations": (tried, *tuned.confirmations)})
    assert "floor:3, was chosen and not confirmed: with floor:3 at 1024 tokens, perplexity changes by +0.600" in (
        quality_verdict(Quality.of(unconfirmed.evidence, unconfirmed)).where
    )
    failing = make_tuned(with_layers(), lengths=LENGTHS, floors=(1.5, 6.0))
    assert "The next larger one does not keep it: with floor:6 at 1024 tokens, perplexity changes by +0.600" in (
        quality_verdict(Quality.of(failing.evidence, failing)).where
    )
    largest = make_tuned(with_layers(), lengths=LENGTHS, floors=(0.5, 1.5))
    words = quality_verdict(Quality.of(largest.evidence, largest))
    assert "No larger floor was tried" in words.where
    assert "toptheta tune --equal-rows 1.5" in words.unknown


def test_a_promise_of_kl_is_told_in_kl() -> None:
    evidence = make_evidence(make_promise(2.0, max_kl=0.001))
    words = quality_verdict(Quality.of(evidence, None))
    assert words.promised.startswith("Floor 2 keeps KL to dense attention within 0.001, in sequences of up to 2,048")
    assert "KL to dense attention is 0.00050 +- 0.00010 and less than 0.00070" in words.figures
    assert "Nearest to the promise of 0.001 is a KL of 0.00070 at 2,048 tokens." in words.where
    assert "%" not in words.where.split("Of what")[0]


def test_evidence_alone_says_what_is_missing() -> None:
    quality = Quality.of(with_layers(), None)
    assert quality.rungs == quality.floors == ()
    assert [picture.name for picture in draw_quality(quality)] == ["loss", "kl", "layers"]
    # older evidence has no lost mass
    assert [picture.name for picture in draw_quality(Quality.of(make_evidence(), None))] == ["loss", "kl"]
    assert "The store says nothing of other floors and of layers" in quality_verdict(quality).unknown
    html = page_of(quality)
    assert "The floors that were tried" not in html
    assert "Promised, confirmed" in html


def test_tasks_are_shown_and_not_promised(quality: Quality) -> None:
    assert quality_verdict(quality).tasks == "No task was tried (toptheta tune --tasks needle,key-value)."
    assert "Recall with the floors" not in page_of(quality)
    probes = (make_probe(dense=17, gained=2, lost=3), make_probe("key-value", 8192, dense=3, lost=0))
    high = make_promise(0.5, preset="high", max_loss=0.2, probes=(make_probe(dense=20, lost=0),))
    tried = Quality.of(make_evidence(make_promise(probes=probes), high), None)
    assert quality_verdict(tried).tasks == (
        "What follows was tried with the same floor, and is shown, not promised. At 2,048 tokens, of 20 questions of "
        "needle, dense attention solves 17 and floor 1.5 16 (2 gained, 3 lost), -5.0 points, with 95 % confidence "
        "-20.0 to +11.0. At 8,192 tokens, key-value tells nothing of this model at this length: dense attention "
        "solves less than 20 %, 3 of 20 questions."
    )
    html = page_of(tried)
    assert "shown, not promised" in html
    rows = html[html.index("Recall with the floors") :].split("<tr>")[2:]
    assert "floor:1.5, promised</th><td>needle</td><td>2,048</td>" in rows[0]
    assert "<td>-5.0 (-20.0 to +11.0)</td>" in rows[0]
    assert "<td>key-value</td><td>8,192</td>" in rows[1]
    assert "The task tells nothing of this model at this length" in rows[2]
    assert "floor:0.5, high</th><td>needle</td>" in rows[3]
    page = Page(html)
    assert page.tags.count("caption") == page.tags.count("table") == 2
    assert Report.read(Report(model="tiny", quality=(tried,), survivors=None).model_dump_json()).quality == (tried,)


def test_the_page_has_the_figures_of_the_record(quality: Quality) -> None:
    html = page_of(quality)
    for rung in quality.rungs:
        one = rung.measured
        assert f"{one.change_percent:+.2f} ± {one.change_error:.2f}&nbsp;%" in html
        assert f"{one.kl_divergence:.5f} ± {one.kl_error:.5f}" in html
        assert f"<td>{100 * one.value_rows_share:.1f} %</td>" in html
    assert "k:100, as floor:1.5" in html
    assert "Not kept: exact, perplexity within 0.05 %: too few tokens." in html
    assert quality.evidence.command in html


def test_the_page_needs_nothing_but_itself_and_can_be_heard(quality: Quality) -> None:
    page = Page(page_of(quality))
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert all(source.startswith("data:image/png;base64,") for source in page.values("img", "src"))
    loss, _, layers = alts = page.values("img", "alt")
    assert len(set(alts)) == 3
    served = quality.evidence.served.measured[0]
    assert f"confirmed, floor:1.5 reads {100 * served.value_rows_share:.1f} percent of the value rows" in loss
    assert "0.37 %, below 0.46" in loss
    assert "exact top-k k:100" in loss
    assert "layer 1 loses most, 31.0 percent" in layers
    assert page.tags.count("h1") == 1
    assert page.tags.count("caption") == page.tags.count("table")
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert set(page.values("section", "aria-labelledby")) <= set(ids)
    assert len(ids) == len(set(ids))


def test_names_of_strangers_are_escaped_and_draw_nothing() -> None:
    name = "<img src=x onerror=alert(1)>$\\frac$"
    text = make_evidence().text[0].model_copy(update={"name": name})
    tuned = make_tuned(make_evidence(text=(text,), command=name, device=name), model=name)
    html = page_of(Quality.of(tuned.evidence, tuned), model=name)
    assert "<img src=x" not in html
    assert "&lt;img src=x onerror=alert(1)&gt;" in html


def test_two_modes_stand_side_by_side() -> None:
    html = page_of(Quality.of(with_layers(), None), Quality.of(with_layers(mode="shadow", heavy=0.007), None))
    assert html.index("Quality in mode values") < html.index("Quality in mode shadow")
    assert "in mode shadow by copies with heavy 0.007 promises" in html


def test_losses_far_beyond_the_promise_can_be_drawn() -> None:
    tuned = make_tuned(with_layers(), lengths=LENGTHS, floors=(0.5, 1.5, 400.0))
    assert len(list(draw_quality(Quality.of(tuned.evidence, tuned)))) == 3


def test_numbers_survive_json(quality: Quality) -> None:
    report = Report(model="tiny", quality=(quality,), survivors=None)
    assert Report.read(report.model_dump_json()) == report
    with pytest.raises(ValueError, match="a report of nothing"):
        Report(model="tiny", quality=(), survivors=None)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('"schema_version":1', '"schema_version":9', r"schema_version: not a record of tune: Input should be 1"),
        ('"change_standard_error":0.04', '"change_standard_error":null', "measured without standard errors"),
        ('"change_percent":0.05', '"change_percent":NaN', "not a record of tune"),
        ('"num_sequences":8', '"num_sequences":1', "not a record of tune"),
        ('"layer":1', '"layer":1000000000000', "layer: not a record of tune: Input should be less than 1024"),
        ('"target":"floor:0.5"', '"target":"floor:x"', "not a record of tune"),
    ],
)
def test_records_that_cannot_be_are_refused(tmp_path: Path, before: str, after: str, message: str) -> None:
    content = make_tuned().model_dump_json()
    assert before in content
    file = tmp_path / "tuned.json"
    file.write_text(content.replace(before, after))
    with pytest.raises(EvaluationError, match=message) as caught:
        read_tuned(file)
    assert caught.value.file == file
    file.write_text(content)
    assert read_tuned(file) == make_tuned()
