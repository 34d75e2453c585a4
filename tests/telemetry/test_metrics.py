"""What Prometheus scrapes: the totals of the engine, beside vLLM's own metrics, once."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client import REGISTRY, Counter
from prometheus_client.parser import text_string_to_metric_families

from tests.telemetry.ranks import BEYOND, PROMISED, counted, rank
from vllm_toptheta.limits import LOST_MASS_EDGES
from vllm_toptheta.telemetry.metrics import exposition
from vllm_toptheta.telemetry.stats import BeyondEvidence, Promised, Stats, merge

DOCS = Path(__file__).parents[2] / "docs" / "operations.md"


@pytest.fixture
def stats() -> Stats:
    one, other = (
        rank(
            counted(1, [0], [[40], [5]], 0.2, num_short=1),
            counted(2, [0], [[30], [3]], 0.02, num_short=1),
            requests={"dense": 2, "floor": 0},
        ),
        rank(counted(1, [1], [[60], [7]], 0.4, num_short=1), counted(2, [1], [[20], [2]], 0.02, num_short=1)),
    )
    return merge([[one, other]])


def samples(stats: Stats | None) -> dict[tuple[str, str], float]:
    """Value by name and the one label's value."""
    families = text_string_to_metric_families(exposition(stats).decode())
    return {
        (sample.name, ",".join(sample.labels.values())): sample.value
        for family in families
        for sample in family.samples
    }


def test_counters(stats: Stats) -> None:
    found = samples(stats)
    assert found["toptheta_decode_tokens_total", ""] == 2
    assert found["toptheta_decode_steps_total", ""] == 1
    assert found["toptheta_dense_tokens_total", "short_context"] == 1
    assert found["toptheta_requests_total", "dense"] == 2
    assert found["toptheta_requests_total", "floor"] == found["toptheta_asked_tokens_total", ""] == 0
    assert found["toptheta_value_rows_cached_total", "1"] == 2 * 200
    assert found["toptheta_value_rows_read_total", "1"] == 40 + 5 + 60 + 7
    assert found["toptheta_value_rows_read_total", "2"] == 30 + 3 + 20 + 2
    assert found["toptheta_value_bytes_not_read_total", ""] == 128 * (800 - 112 - 55)


def test_keys_are_exposed_where_some_are_not_read(stats: Stats) -> None:
    assert not [name for name, _ in samples(stats) if "keys" in name]
    layers = [counted(layer, [0, 1], [[4, 5]], 0.2, keys_read=[[10 * layer, 3]]) for layer in (1, 2)]
    found = samples(merge([[rank(*layers, mode="shadow")]]))
    assert found["toptheta_keys_read_total", "1"] == 13
    assert found["toptheta_keys_read_total", "2"] == 23
    assert not [name for name, _ in found if "copies" in name]
    layer = counted(1, [0, 1], [[4, 5]], 0.2, keys_read=[[10, 3]], copies_read=[[7, 8]])
    assert samples(merge([[rank(layer, mode="shadow")]]))["toptheta_value_copies_read_total", "1"] == 15


def test_the_histogram_is_cumulative_per_layer(stats: Stats) -> None:
    found = samples(stats)
    counts = [found["toptheta_lost_mass_bucket", f"1,{edge!r}"] for edge in LOST_MASS_EDGES]
    assert counts == [0, 0, 0, 0, 0, 0, 0, 2, 4, 4]  # twice 0.2, twice 0.4
    assert found["toptheta_lost_mass_bucket", "1,+Inf"] == found["toptheta_lost_mass_count", "1"] == 4
    assert found["toptheta_lost_mass_sum", "1"] == pytest.approx(2 * 0.2 + 2 * 0.4)


def test_the_thresholds_are_described(stats: Stats) -> None:
    families = {family.name: family for family in text_string_to_metric_families(exposition(stats).decode())}
    (sample,) = families["toptheta_thresholds_info"].samples
    assert sample.labels == {
        "model": "acme/tiny",
        "mode": "values",
        "target": "k:128",
        "compensation": "sdc+vmc",
        "draft_tokens": "",
        "min_context": "128",
        "min_step_tokens": "0",
        "dense_layers": "0,3",
    }


def test_what_is_promised_is_exposed_where_something_is(stats: Stats) -> None:
    assert not [name for name, _ in samples(stats) if "promised" in name]
    promised = merge([[rank(counted(1, [0, 1], [[4, 5]], 0.2), promised=PROMISED)]])
    found = {name: value for (name, _), value in samples(promised).items() if "promised" in name}
    assert found == {
        "toptheta_promised_loss_percent": 0.5,
        "toptheta_promised_measured_loss_percent": 0.31,
        "toptheta_promised_measured_kl": 0.0005,
        "toptheta_promised_max_tokens": 2048,
        "toptheta_promised_differences": 1,
    }
    of_kl = promised.model_copy(update={"promised": Promised(**{**PROMISED, "max_loss": None, "max_kl": 0.001})})
    assert samples(of_kl)["toptheta_promised_kl", ""] == 0.001
    assert ("toptheta_promised_loss_percent", "") not in samples(of_kl)


def test_what_is_lost_beyond_the_evidence_is_exposed_where_it_is_known(stats: Stats) -> None:
    assert not [name for name, _ in samples(stats) if "beyond" in name]
    beyond = samples(merge([[rank(counted(1, [0, 1], [[4, 5]], 0.2), beyond_evidence=BEYOND)]]))
    assert {key: value for key, value in beyond.items() if "beyond" in key[0]} == {
        ("toptheta_beyond_evidence_share", "1"): 0.08,
        ("toptheta_beyond_evidence_share", "2"): 0.01,
        ("toptheta_beyond_evidence_alarm", ""): 1,
        ("toptheta_beyond_evidence_alarms_total", ""): 2,
    }


def test_vllms_metrics_are_there_with_and_without_ours(stats: Stats) -> None:
    counter = Counter("vllm:of_a_test", "A metric of vLLM.")
    try:
        counter.inc(3)
        assert samples(stats)["vllm:of_a_test_total", ""] == samples(None)["vllm:of_a_test_total", ""] == 3
    finally:
        REGISTRY.unregister(counter)
    assert not any(name.startswith("toptheta") for name, _ in samples(None))


def test_several_api_servers_do_not_add_up_ours(stats: Stats, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # this makes vLLM take the registry that sums over the files of all processes
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    for _ in range(2):  # another server's scrape leaves nothing behind
        assert samples(stats)["toptheta_decode_tokens_total", ""] == 2
    assert not list(tmp_path.iterdir())


def test_every_metric_is_documented(stats: Stats) -> None:
    text = DOCS.read_text()
    promised = Promised(**{**PROMISED, "max_kl": 0.001})
    update = {"promised": promised, "beyond_evidence": BeyondEvidence(**BEYOND)}
    exposed = exposition(stats.model_copy(update=update)).decode()
    families = [family.name for family in text_string_to_metric_families(exposed)]
    for name in families:
        if name.startswith("toptheta"):
            assert f"`{name}" in text
