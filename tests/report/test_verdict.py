from typing import Any

import pytest

from vllm_toptheta.report.findings import LengthFindings, SurvivorReport, TargetFindings, TextFindings, expect
from vllm_toptheta.report.verdict import WORTHLESS_SPEEDUP, verdict


def changed(survivors: SurvivorReport, *, calibration: bool = True, **fields: Any) -> TargetFindings:
    """The first calibrated target, with other findings on held-out text."""
    target = survivors.targets[1]
    held_out = target.held_out.model_copy(update=fields)
    return target.model_copy(update={"held_out": held_out, "calibration": target.calibration if calibration else None})


def reading(found: TextFindings, *shares: float) -> dict[str, Any]:
    lengths = [64 << index for index in range(len(shares))]
    return {
        "by_length": tuple(
            LengthFindings(min_length=length, max_length=2 * length - 1, expectation=expect(share, 0.5))
            for length, share in zip(lengths, shares, strict=True)
        )
    }


@pytest.mark.parametrize(("share", "helps"), [(0.1, True), (0.8, True), (0.83, False), (1.0, False)])
def test_it_says_whether_it_helps(survivors: SurvivorReport, share: float, helps: bool) -> None:
    found = survivors.targets[1].held_out
    said, paragraph = verdict(survivors, changed(survivors, **reading(found, 0.95, share)))
    assert said is helps
    assert (2 / (1 + share) >= WORTHLESS_SPEEDUP) is helps
    assert ("would not help" in paragraph) is not helps
    assert ("k:8 may help" in paragraph) is helps
    assert f"at most {2 / (1 + share):.2f} times as fast" in paragraph
    assert f"128 to 255 tokens of context {100 * share:.0f} %" in paragraph
    # where it does not help yet but longer contexts read less, that is worth another look
    assert ("measure again with the longest" in paragraph) is (not helps and share < 0.95)


def test_text_of_another_kind_is_pointed_out(survivors: SurvivorReport) -> None:
    target = survivors.targets[1]
    assert target.calibration is not None
    expected = target.calibration.mean_survivors
    same = verdict(survivors, changed(survivors, mean_survivors=1.2 * expected))[1]
    assert "than expected" not in same
    more = verdict(survivors, changed(survivors, mean_survivors=2 * expected))[1]
    assert f"more keys than expected ({2 * expected:.0f} instead of the {expected:.0f} on the calibration text)" in more
    fewer = verdict(survivors, changed(survivors, calibration=False, mean_survivors=3.0))[1]
    assert "fewer keys than expected (3 instead of the 8 aimed at)" in fewer


def test_a_lossy_layer_and_seen_text_are_named(survivors: SurvivorReport) -> None:
    lossy = changed(survivors, head_lost_mass=((0.0,) * 4, (0.0,) * 4, (0.01,) * 4, (0.3,) * 4), mean_lost_mass=0.155)
    paragraph = verdict(survivors, lossy)[1]
    assert "15.5 % of the softmax on average, and 30.0 % in the layer that loses most (layer 3)" in paragraph
    assert "consider serving that layer dense" in paragraph
    fine = changed(survivors, head_lost_mass=((0.0,) * 4,) * 2 + ((0.01,) * 4,) * 2)
    assert "consider serving" not in verdict(survivors, fine)[1]
    assert "not calibrated on" in paragraph
    seen = survivors.model_copy(update={"not_held_out": ("a.txt",)})
    assert "in part calibrated on" in verdict(seen, lossy)[1]


def test_floors_say_what_they_guarantee_and_nothing_of_calibration(survivors: SurvivorReport) -> None:
    paragraph = verdict(survivors, survivors.targets[0])[1]
    assert "The target floor:2 " in paragraph
    assert "No key is skipped whose weight reaches 2 times the average of its row." in paragraph
    assert "keys of a row on average on this text" in paragraph
    assert "calibrat" not in paragraph
    assert "No key is skipped" not in verdict(survivors, survivors.targets[1])[1]
