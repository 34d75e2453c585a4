import numpy as np
import pytest

from vllm_toptheta import store
from vllm_toptheta.report.collect import SurvivorCounts
from vllm_toptheta.report.findings import expect, summarise

ARCHITECTURE = store.Architecture(num_layers=2, num_heads=2, num_kv_heads=1, head_size=8, rope={})
TEXT = [store.TextSource(name="a.txt", sha256="0" * 64, num_characters=3)]


def test_bytes_and_speed_follow_from_the_share_of_values_read() -> None:
    assert expect(1.0, 0.5).attention_speedup == expect(1.0, 0.5).step_speedup == 1
    nothing = expect(0.0, 1.0)
    assert (nothing.bytes_share, nothing.attention_speedup, nothing.step_speedup) == (0.5, 2, 2)
    third = expect(1 / 3, 0.6)
    assert third.bytes_share == pytest.approx(2 / 3)
    assert third.attention_speedup == pytest.approx(1.5)
    assert third.step_speedup == pytest.approx(1 / (0.4 + 0.6 * 2 / 3))
    assert expect(0.2, 0.0).step_speedup == 1


def test_dense_layers_count_in_full_where_bytes_are_counted_and_not_at_all_elsewhere() -> None:
    counts = SurvivorCounts(ARCHITECTURE, dense_length=4, max_length=100)
    counts.rows[1] = 100
    counts.rows_by_survivors[1, 0, [0, 10]] = [4, 96]
    counts.rows_by_survivors[1, 1, [10, 50]] = [90, 10]
    counts.survivors_by_position[1] = [[200, 300, 460], [400, 400, 600]]
    counts.keys_by_position[1] = [400, 1000, 3600]
    counts.lost_mass[1] = [10.0, 30.0]
    counts.value_rows_cached[1] = 1000
    counts.value_rows_read[1, 0] = np.arange(len(counts.bucket_edges) - 1)[::-1] * 100
    found = summarise(counts, text=TEXT, dense_layers=(0,), attention_share=0.5)
    assert found.num_rows == 100
    assert found.mean_survivors == pytest.approx((960 + 1400) / 200)
    assert found.p95_survivors == 10
    assert found.no_survivor_share == pytest.approx(4 / 200)
    assert found.mean_lost_mass == pytest.approx(0.2)
    assert found.worst_layer == (1, pytest.approx(0.2))
    assert found.head_mean_survivors == ((0.0, 0.0), (9.6, 14.0))
    assert found.head_p95_survivors == ((0.0, 0.0), (10.0, 50.0))
    assert found.head_lost_mass == ((0.0, 0.0), (0.1, 0.3))
    assert found.sparse_value_rows_share == pytest.approx(0.25)
    assert found.group_value_rows_share == ((1.0,), (pytest.approx(0.25),))
    shares = [rows.expectation.value_rows_share for rows in found.by_length]
    assert shares == pytest.approx([0.75, 0.7, 0.65, 0.6, 0.55, 0.5])
    assert found.longest.max_length == 100
    assert found.by_length[0].min_length == 5
    assert sum(found.position_shares[1]) == pytest.approx(1)
    assert found.position_rates[1] == pytest.approx([600 / 800, 700 / 2000, 1060 / 7200])
