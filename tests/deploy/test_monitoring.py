"""The Grafana dashboard asks for metrics that exist, in expressions that Prometheus can read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import promql_parser
import pytest
import yaml

from tests.deploy.image import ROOT
from tests.telemetry.ranks import BEYOND, PROMISED, counted, rank
from vllm_toptheta.telemetry.metrics import StatsCollector
from vllm_toptheta.telemetry.stats import Promised, merge

GRAFANA = ROOT / "deploy/grafana"
DASHBOARD = json.loads((GRAFANA / "dashboards/toptheta.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
# Grafana replaces these before Prometheus sees them
BUILT_IN = {"$__rate_interval": "1m", "$instance": "server:8000"}


def expressions() -> Iterator[str]:
    for panel in PANELS:
        for target in panel["targets"]:
            expression = target["expr"]
            for variable, value in BUILT_IN.items():
                expression = expression.replace(variable, value)
            yield expression


def selectors(node: Any) -> Iterator[promql_parser.VectorSelector]:
    """Yield the metrics that an expression reads."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node
        return
    for name in ("expr", "lhs", "rhs", "vector_selector"):
        if (child := getattr(node, name, None)) is not None:
            yield from selectors(child)
    for child in getattr(node, "args", None) or []:
        yield from selectors(child)


def exposed_by_us() -> dict[str, set[str]]:
    """The names of our samples and their labels, as /metrics spells them."""
    names: dict[str, set[str]] = {}
    guarded = [{"layer": 1, "max_lost_mass": 0.5, "share_above": 0.2, "alarms": 1, "lowered_by": 0.5}]
    report = rank(counted(1, [0], [[30]], 0.1), promised=PROMISED, beyond_evidence=BEYOND, guarded=guarded)
    stats = merge([[report]])
    promised = Promised(**{**PROMISED, "max_kl": 0.001})
    for family in StatsCollector(stats.model_copy(update={"promised": promised})).collect():
        for sample in family.samples:
            names.setdefault(sample.name, set()).update(sample.labels)
    return names


def exposed_by_vllm() -> set[str]:
    """The names of vLLM's metrics, read off its source: a registry exists only in a server."""
    from vllm.v1.metrics import loggers

    with open(loggers.__file__, encoding="utf-8") as source:
        return set(re.findall(r'"(vllm:\w+)"', source.read()))


def test_every_expression_reads_existing_metrics_by_existing_labels() -> None:
    ours, theirs = exposed_by_us(), exposed_by_vllm()
    read = set()
    for expression in expressions():
        tree = promql_parser.parse(expression)
        for selector in selectors(tree):
            read.add(selector.name)
            if selector.name.startswith("vllm:"):
                assert re.sub(r"_(total|bucket)$", "", selector.name) in theirs, expression
            else:
                labels = ours[selector.name]
                grouped = re.findall(r"by \((\w+)\)", expression)
                assert set(grouped) <= labels, expression
    assert {name for name in read if not name.startswith("vllm:")} >= {
        "toptheta_beyond_evidence_alarm",
        "toptheta_beyond_evidence_share",
        "toptheta_decode_tokens_total",
        "toptheta_dense_tokens_total",
        "toptheta_guard_lowered_by",
        "toptheta_lost_mass_bucket",
        "toptheta_promised_differences",
        "toptheta_promised_loss_percent",
        "toptheta_promised_max_tokens",
        "toptheta_promised_measured_kl",
        "toptheta_promised_measured_loss_percent",
        "toptheta_thresholds_info",
        "toptheta_value_bytes_not_read_total",
        "toptheta_value_rows_cached_total",
        "toptheta_value_rows_read_total",
    }


def test_panels_have_a_place_of_their_own_and_a_title() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
        assert panel["title"]
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_panels_use_the_provisioned_source(panel: dict[str, Any]) -> None:
    provisioned = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yaml").read_text())
    (source,) = provisioned["datasources"]
    for place in (panel, *panel["targets"]):
        assert place["datasource"] == {"type": source["type"], "uid": source["uid"]}
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def test_grafana_finds_the_dashboard() -> None:
    compose = yaml.safe_load((ROOT / "deploy/compose/compose.yaml").read_text())
    (provider,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/toptheta.yaml").read_text())["providers"]
    mounts = dict(volume.split(":")[:2] for volume in compose["services"]["grafana"]["volumes"])
    assert mounts["../grafana/dashboards"] == provider["options"]["path"]
    assert mounts["../grafana/provisioning"] == "/etc/grafana/provisioning"
    home = compose["services"]["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/toptheta.json"
