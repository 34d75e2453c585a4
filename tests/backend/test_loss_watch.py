"""What live traffic loses beyond the evidence: which layers can be watched, and when an alarm begins and ends."""

from __future__ import annotations

import pytest

from vllm_toptheta.backend.loss_watch import CALM, MAX_SHARE, LossWatch
from vllm_toptheta.backend.rank_report import beyond_evidence
from vllm_toptheta.limits import LOST_MASS_EDGES, NUM_LOST_MASS_BUCKETS, first_bucket_above
from vllm_toptheta.telemetry.stats import BeyondEvidence


@pytest.mark.parametrize("lost_mass", [0.0, 2.0**-9, 0.1, 0.25, 0.26, 0.5, 0.51, 1.0])
def test_a_bucket_is_above_if_all_of_it_is(lost_mass: float) -> None:
    first = first_bucket_above(lost_mass)
    assert LOST_MASS_EDGES[first - 1] >= lost_mass
    assert first == 1 or LOST_MASS_EDGES[first - 2] < lost_mass


def test_a_layer_that_no_bucket_lies_above_is_not_watched() -> None:
    assert LossWatch({0: 0.5, 1: 0.51, 2: 0.01}).known == {0: 0.5, 2: 0.01}
    assert first_bucket_above(0.5) == NUM_LOST_MASS_BUCKETS - 1


def test_an_alarm_begins_once_and_ends_when_it_is_calm() -> None:
    watch = LossWatch({1: 0.1, 2: 0.2})
    assert (watch.share, watch.observe({1: 0.0, 2: 2 * MAX_SHARE}), watch.share) == (None, False, MAX_SHARE)
    shares = [(0.2, True), (0.3, False), (MAX_SHARE, False), (CALM * MAX_SHARE, True), (MAX_SHARE, False), (0.04, True)]
    for share, changes in shares:
        assert watch.observe({1: share, 2: share}) == changes
    assert (watch.is_alarming, watch.alarms) == (True, 2)


def test_what_workers_report() -> None:
    assert beyond_evidence(set()) is None
    one, other = LossWatch({1: 0.1, 2: 0.2, 5: 0.3}), LossWatch({3: 0.1})
    one.observe({1: 0.2, 2: 0.3})
    report = BeyondEvidence.model_validate(beyond_evidence([one, other]))
    assert (report.max_share, report.is_alarming, report.alarms) == (MAX_SHARE, True, 1)
    assert [(layer.layer, layer.lost_mass_p99, layer.share) for layer in report.layers] == [
        (1, 0.1, 0.2),
        (2, 0.2, 0.3),
    ]
