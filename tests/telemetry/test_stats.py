"""Counters and their sum over ranks."""

from __future__ import annotations

import pytest
import torch

from tests.telemetry.ranks import BEYOND, counted, rank
from vllm_toptheta.backend.counters import LayerCounters
from vllm_toptheta.kernels.cpu.scratch import MAX_PENDING, Counted
from vllm_toptheta.limits import LOST_MASS_EDGES
from vllm_toptheta.telemetry.stats import merge


def test_counters_add_up_over_steps() -> None:
    counters = counted(3, [4, 5], [[10, 20], [30, 40]], 0.25)
    totals, rows_read = torch.tensor([1, 0, 50, 1, 0]), torch.tensor([[1, 2]])
    lost_mass = torch.tensor([[0.0, 0.5, 1.0, 1.0]])
    counters.scratch.add(counters.buffers, Counted(totals, torch.tensor([[1]]), rows_read, lost_mass, rows_read))
    first, second = counters.heads()
    assert (first["layer"], first["kv_head"], second["kv_head"]) == (3, 4, 5)
    assert (first["decode_tokens"], first["dense_tokens"], first["rows_cached"]) == (3, 0, 250)
    assert (first["rows_read"], second["rows_read"]) == (41, 62)
    assert first["lost_mass_mean"] == pytest.approx((4 * 0.25 + 0.5) / 6)
    assert second["lost_mass_mean"] == pytest.approx((4 * 0.25 + 2.0) / 6)
    assert counters.buffers.totals.tolist() == [3, 0, 250, 2, 0]
    nothing = torch.zeros(1, 4)
    counters.scratch.add(counters.buffers, Counted(totals, torch.tensor([[1]]), rows_read, nothing, rows_read))
    counters.zero_()
    assert not any(counters.histogram()["counts"])
    assert counters.heads()[0]["rows_read"] == 0


def test_counters_made_in_inference_mode_are_counted_and_zeroed_outside_of_it() -> None:
    with torch.inference_mode():
        counters = counted(3, [4, 5], [[10, 20], [30, 40]], 0.25, keys_read=[[20, 30], [40, 50]])
    assert counters.heads()[0]["rows_read"] == 40
    counters.zero_()
    assert counters.heads()[0]["rows_read"] == 0


def test_keys_are_counted_where_some_are_not_read() -> None:
    one = counted(2, [0, 1], [[7, 8], [1, 2]], 0.5, keys_read=[[20, 30], [4, 5]])
    assert [head["keys_read"] for head in one.heads()] == [24, 35]
    other = counted(2, [0], [[7]], 0.2, keys_read=[[50]])
    stats = merge([[rank(one)], [rank(other)]])
    assert [head.keys_read for head in stats.layers] == [74, 35]
    assert stats.keys_read_share == pytest.approx((74 + 35) / 500)
    one.zero_()
    assert [head["keys_read"] for head in one.heads()] == [0, 0]
    assert merge([[rank(one)]]).keys_read_share is None


def test_copies_are_counted_where_there_are_any() -> None:
    keys = {"keys_read": [[20, 30], [4, 5]]}
    one = counted(2, [0, 1], [[7, 8], [1, 2]], 0.5, **keys, copies_read=[[40, 50], [6, 7]])
    assert [head["copies_read"] for head in one.heads()] == [46, 57]
    stats = merge([[rank(one)], [rank(counted(3, [0, 1], [[7, 8], [1, 2]], 0.5, **keys))]])
    assert [head.copies_read for head in stats.layers] == [46, 57, None, None]
    assert stats.copies_read_share == pytest.approx((46 + 57) / 400)
    one.zero_()
    assert [head["copies_read"] for head in one.heads()] == [0, 0]


def test_in_mode_values_no_keys_are_counted() -> None:
    stats = merge([[rank(counted(2, [0], [[7]], 0.5))], [rank(counted(2, [0], [[5]], 0.2))]])
    assert (stats.layers[0].keys_read, stats.keys_read_share) == (None, None)


def test_steps_are_counted_many_at_once() -> None:
    together = LayerCounters(1, [0], num_queries_per_kv=2)
    masses = torch.rand(3 * MAX_PENDING + 5, 1, 2, generator=torch.Generator().manual_seed(0))
    counts = []
    for step, lost_mass in enumerate(masses):
        totals, rows_read = torch.tensor([1, step % 2, 10, 1, 0]), torch.tensor([[step]])
        step_counted = Counted(totals, torch.tensor([[1 - step % 2]]), rows_read, lost_mass, rows_read)
        together.scratch.add(together.buffers, step_counted)
        counts.append(int(together.buffers.totals[0]))
    # while they are pending, the buffers stand still
    assert sorted(set(counts)) == [0, MAX_PENDING, 2 * MAX_PENDING, 3 * MAX_PENDING]
    histogram = together.histogram()
    sparse = masses[::2].flatten()
    assert together.buffers.totals.tolist() == [len(masses), len(masses) // 2, 10 * len(masses), len(masses), 0]
    assert together.buffers.value_rows_read.tolist() == [sum(range(len(masses)))]
    assert histogram["counts"] == [
        int(((sparse <= edge) & (sparse > below)).sum())
        for below, edge in zip((-1.0, *LOST_MASS_EDGES), LOST_MASS_EDGES, strict=False)
    ]
    assert histogram["sum"] == pytest.approx(float(sparse.double().sum()))


def test_short_sequences_count_neither_in_the_mean_nor_in_the_histogram() -> None:
    counters = counted(1, [0], [[100], [10], [10]], 0.3, num_short=1)
    (head,) = counters.heads()
    assert (head["decode_tokens"], head["dense_tokens"]) == (3, 1)
    assert head["lost_mass_mean"] == pytest.approx(0.3)
    assert sum(counters.histogram()["counts"]) == 2 * 2
    assert counters.histogram()["sum"] == pytest.approx(4 * 0.3)


def test_tokens_of_requests_with_a_setting_of_their_own_count_neither() -> None:
    counters = counted(1, [0], [[100], [10], [20]], 0.3, num_short=1, num_asked=1)
    (head,) = counters.heads()
    assert (head["decode_tokens"], head["dense_tokens"], head["asked_tokens"]) == (3, 1, 1)
    assert head["lost_mass_mean"] == pytest.approx(0.3)
    assert head["rows_read"] == 130  # they are read all the same
    assert sum(counters.histogram()["counts"]) == 2


def test_buckets_are_powers_of_two_that_include_their_upper_edge() -> None:
    counters = LayerCounters(1, [0], num_queries_per_kv=4)
    masses = torch.tensor([[0.0, 2.0**-9, 2.0**-8, 1.0], [0.3, 0.5, 0.51, 1.0]])
    ones = torch.ones(2, 1, dtype=torch.int64)
    counters.scratch.add(counters.buffers, Counted(torch.tensor([2, 0, 9, 1, 0]), ones, ones, masses, ones))
    assert LOST_MASS_EDGES[0] == 2.0**-9
    assert LOST_MASS_EDGES[-1] == 1.0
    assert counters.histogram()["counts"] == [2, 1, 0, 0, 0, 0, 0, 0, 2, 3]
    for mass, edge in ((0.0, 0), (0.3, 8), (0.5, 8), (0.51, 9)):
        assert mass <= LOST_MASS_EDGES[edge]
        assert edge == 0 or mass > LOST_MASS_EDGES[edge - 1]


def test_an_idle_layer_has_lost_nothing() -> None:
    (record,) = LayerCounters(1, [0], 3).heads()
    assert record["lost_mass_mean"] == 0
    stats = merge([[rank(LayerCounters(1, [0], 3))]])
    assert (stats.rows_read_share, stats.bytes_not_read, stats.decode_tokens) == (None, 0, 0)


def test_ranks_hold_different_heads_and_stages_different_layers() -> None:
    stats = merge(
        [
            [
                rank(counted(2, [1], [[7]], 0.5)),
                rank(counted(2, [0], [[5]], 0.1), counted(1, [0], [[9]], 0.0)),
            ]
        ]
    )
    assert [(head.layer, head.kv_head, head.rows_read) for head in stats.layers] == [(1, 0, 9), (2, 0, 5), (2, 1, 7)]
    assert stats.dense_layers == [0, 3]
    assert stats.rows_read_share == pytest.approx(21 / 300)
    assert stats.bytes_not_read == (300 - 21) * 128
    assert [(one.layer, sum(one.counts)) for one in stats.lost_mass] == [(1, 2), (2, 4)]
    assert stats.lost_mass[1].sum == pytest.approx(2 * 0.5 + 2 * 0.1)
    # both ranks decoded the same token
    assert (stats.decode_tokens, stats.decode_steps, stats.dense_tokens) == (1, 1, {"short_context": 0})


def test_a_kv_head_on_two_ranks_is_summed() -> None:
    one, other = counted(2, [0], [[7], [7]], 0.5), counted(2, [0], [[5]], 0.2)
    (head,) = merge([[rank(one), rank(other)]]).layers
    assert (head.decode_tokens, head.rows_cached, head.rows_read) == (3, 300, 19)
    assert head.lost_mass_mean == pytest.approx((2 * 0.5 + 0.2) / 3)


def test_what_is_beyond_the_evidence_is_that_of_the_rank_that_is_worse_off() -> None:
    layer = counted(2, [0], [[7]], 0.5)
    assert merge([[rank(layer)]]).beyond_evidence is None
    worse = [{"layer": 2, "lost_mass_p99": 0.2, "share": 0.5}, {"layer": 3, "lost_mass_p99": 0.2, "share": 0.0}]
    other = {**BEYOND, "is_alarming": False, "alarms": 1, "layers": worse}
    found = merge([[rank(layer, beyond_evidence=BEYOND), rank(layer, beyond_evidence=other), rank()]]).beyond_evidence
    assert found is not None
    assert (found.is_alarming, found.alarms, found.max_share) == (True, 2, 0.03)
    assert [(one.layer, one.share) for one in found.layers] == [(1, 0.08), (2, 0.5), (3, 0.0)]


def test_requests_are_counted_once_on_all_ranks_of_a_replica() -> None:
    one, other = (counted(2, [head], [[7], [7]], 0.5, num_asked=1) for head in (0, 1))
    replica = [rank(one, requests={"dense": 2}), rank(other, requests={"dense": 2, "floor": 1})]
    stats = merge([replica, [rank(counted(2, [0], [[5]], 0.2), requests={"dense": 1})]])
    assert (stats.requests, stats.asked_tokens) == ({"dense": 3, "floor": 1}, 1)
    assert stats.layers[0].lost_mass_mean == pytest.approx((0.5 + 0.2) / 2)


def test_replicas_decode_different_tokens() -> None:
    pipeline_stage_of_dense_layers = rank()
    stats = merge(
        [
            [rank(counted(2, [0], [[7], [7]], 0.5, num_short=1)), pipeline_stage_of_dense_layers],
            [rank(counted(2, [0], [[5], [5], [5]], 0.2))],
        ]
    )
    assert (stats.decode_tokens, stats.decode_steps, stats.dense_tokens) == (5, 2, {"short_context": 1})
    assert stats.layers[0].rows_read == 29
