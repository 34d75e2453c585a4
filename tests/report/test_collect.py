from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.calibration.tiny_model import architecture, random_tokens, tiny_model
from vllm_toptheta import store
from vllm_toptheta.evaluation.sparse import SparseAttention
from vllm_toptheta.evaluation.variants import Variant
from vllm_toptheta.limits import NUM_ANCHORS
from vllm_toptheta.reference import top_theta_attention
from vllm_toptheta.report import collect as collect_module
from vllm_toptheta.report.collect import SurvivorCounts, collect

ARCHITECTURE = store.Architecture(num_layers=2, num_heads=4, num_kv_heads=2, head_size=8, rope={})


def test_counts_are_those_of_a_loop_over_rows_and_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect_module, "RECENT_TOKENS", 6)
    torch.manual_seed(0)
    seq_len, k = 30, 5
    query, key, value = torch.randn(seq_len, 4, 8), torch.randn(seq_len, 2, 8), torch.randn(seq_len, 2, 8)
    whole = SurvivorCounts(ARCHITECTURE, dense_length=k, max_length=seq_len)
    parts = SurvivorCounts(ARCHITECTURE, dense_length=k, max_length=seq_len)

    def attend(start: int, stop: int):  # type: ignore[no-untyped-def]
        return top_theta_attention(
            query[start:stop], key[:stop], value[:stop], threshold=0.8, target_k=k, softmax_scale=0.5
        )

    result = attend(0, seq_len)
    whole.add(1, result, start=0)
    for start, stop in ((0, 4), (4, 7), (7, 22), (22, 30)):
        parts.add(1, attend(start, stop), start=start)

    positions, keys = np.zeros((4, 3), int), np.zeros(3, int)
    histogram = np.zeros((4, seq_len + 1), int)
    for row in range(k, seq_len):
        for head in range(4):
            kept = [j for j in range(row + 1) if result.survivors[row, head, j]]
            histogram[head, len(kept)] += 1
            for j in kept:
                positions[head, 0 if j < 4 else 2 if j > row - 6 else 1] += 1
        for j in range(row + 1):
            keys[0 if j < 4 else 2 if j > row - 6 else 1] += 1
    for counts in (whole, parts):
        assert counts.rows.tolist() == [0, seq_len - k]
        assert (counts.rows_by_survivors[1] == histogram).all()
        assert (counts.survivors_by_position[1] == positions).all()
        assert (counts.keys_by_position[1] == keys).all()
        np.testing.assert_allclose(counts.lost_mass[1], result.lost_mass[k:].double().sum(0), rtol=1e-5)
        assert (counts.value_rows_read[1].sum(axis=1) == result.value_rows_read[k:].sum(0).numpy()).all()
        assert counts.value_rows_cached[1].sum() == sum(range(k + 1, seq_len + 1))
        assert not counts.rows_by_survivors[0].any()
    assert (whole.value_rows_read == parts.value_rows_read).all()
    # the buckets hold the rows of their lengths
    edges = whole.bucket_edges
    assert whole.value_rows_cached[1].tolist() == [
        sum(range(low, high)) for low, high in zip(edges[:-1], edges[1:], strict=True)
    ]


def test_a_floor_of_zero_keeps_everything() -> None:
    model = tiny_model()
    attention = SparseAttention(Variant(target="floor:0", dense_layers=(0,)), max_length=160)
    sequences = [random_tokens(160), random_tokens(160, seed=1)]
    counts = collect(model, sequences, attention, architecture=architecture(model))
    assert counts.rows.tolist() == [0, 32, 32, 32]
    assert (counts.rows_by_survivors[1:, :, NUM_ANCHORS + 1 :] == 2).all()
    assert not counts.lost_mass.any()
    assert (counts.value_rows_read == counts.value_rows_cached[:, None]).all()
    assert (counts.survivors_by_position[1:] == counts.keys_by_position[1:, None]).all()


def test_a_result_without_survivors_is_refused() -> None:
    torch.manual_seed(0)
    result = top_theta_attention(
        torch.randn(9, 4, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 8), threshold=0.0, target_k=2, softmax_scale=1.0
    )
    counts = SurvivorCounts(ARCHITECTURE, dense_length=2, max_length=9)
    with pytest.raises(ValueError, match="survivors"):
        counts.add(0, replace(result, survivors=None), start=0)
