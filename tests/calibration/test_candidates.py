"""What shadow keys do in sampled rows, against the reference and against loops."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.calibration.test_capture import random_attention, with_and_without_sinks
from tests.calibration.test_measure import LargestTensor, median_thresholds
from vllm_toptheta.calibration.candidates import (
    MARGIN_EDGES,
    AlwaysRead,
    CandidateRows,
    key_moments,
    measure_candidates,
    shortfall_histogram,
)
from vllm_toptheta.calibration.override import AttentionCall
from vllm_toptheta.reference import (
    Compensation,
    KeyProjection,
    candidate_keys,
    causal_scores,
    encode_keys,
    fit_projection,
    quantize_query,
    row_lse,
    shadow_scores,
    top_theta_attention,
)

ENDS = AlwaysRead(num_sink=2, num_recent=5, block_size=16)
LENGTHS = torch.tensor([20, 21, 64, 65, 149, 150])


def fitted(query: Tensor, key: Tensor, num_channels: int = 4) -> KeyProjection:
    moments = key_moments(query, key)
    return fit_projection(
        moments.key_mean, moments.key_covariance, moments.query_moment, num_channels=min(num_channels, key.shape[-1])
    )


def candidate_rows(
    soft_cap: float | None = None, sinks: Tensor | None = None, **options: Any
) -> tuple[CandidateRows, Tensor]:
    """Sampled rows of random attention, and the thresholds of all rows."""
    query, key, value = random_attention()
    thresholds = median_thresholds(query, key, "pre_softmax", soft_cap)
    rows = CandidateRows(
        AttentionCall(0, query, key, value, 0.25, soft_cap, sinks),
        LENGTHS,
        thresholds[LENGTHS - 1],
        projection=fitted(query, key),
        always_read=ENDS,
        **options,
    )
    return rows, thresholds


def test_moments_are_those_of_the_group() -> None:
    query, key, _ = random_attention(30)
    moments = key_moments(query[3:], key[2:])
    group = query.shape[1] // key.shape[1]
    for kv_head in range(key.shape[1]):
        keys = key[2:, kv_head]
        queries = query[3:, kv_head * group : (kv_head + 1) * group].flatten(0, 1)
        torch.testing.assert_close(moments.key_mean[kv_head], keys.mean(0))
        torch.testing.assert_close(moments.key_covariance[kv_head], torch.cov(keys.T, correction=0))
        torch.testing.assert_close(moments.query_moment[kv_head], queries.T @ queries / len(queries))
    assert moments.num_keys == 28


@with_and_without_sinks
@pytest.mark.parametrize("soft_cap", [None, 5.0])
@pytest.mark.parametrize("block_bytes", [1, 1 << 14, None])
def test_candidates_leave_unread_what_the_reference_says(
    soft_cap: float | None, block_bytes: int | None, sinks: Tensor | None
) -> None:
    rows, thresholds = candidate_rows(soft_cap, sinks, block_bytes=block_bytes)
    query, key, num_heads = rows.call.query, rows.call.key, rows.call.query.shape[1]
    margin = torch.linspace(0.0, 0.3, num_heads)
    found = measure_candidates(rows, margin)
    shadows = shadow_scores(
        quantize_query(query, rows.projection, softmax_scale=0.25),
        encode_keys(key, rows.projection),
        logits_soft_cap=soft_cap,
    )
    candidates = candidate_keys(shadows, thresholds - margin, num_kv_heads=key.shape[1], **vars(ENDS))
    of_heads = candidates.repeat_interleave(num_heads // key.shape[1], dim=1)
    options: dict[str, Any] = {"target_k": 0, "softmax_scale": 0.25, "logits_soft_cap": soft_cap, "sinks": sinks}
    sampled = LENGTHS - 1
    scores = causal_scores(query, key, softmax_scale=0.25, logits_soft_cap=soft_cap)
    weights = (scores - row_lse(scores, sinks).unsqueeze(-1)).exp()
    unread_mass = weights.masked_fill(of_heads, 0.0).sum(-1)[sampled]
    torch.testing.assert_close(found.unread_mass.T, unread_mass)
    num_unread = sampled[:, None] + 1 - of_heads[sampled].sum(-1)
    level = (thresholds - row_lse(scores, sinks))[sampled].exp()
    torch.testing.assert_close(found.estimate.T, num_unread * level)
    # with r = 1, the reference loses what is made of these
    expected = top_theta_attention(
        query, key, key, threshold=thresholds, candidates=of_heads, compensation=Compensation("candidates"), **options
    )
    assert torch.equal(found.candidates.T, expected.keys_read[sampled])
    not_lost = (weights * expected.survivors).sum(-1)[sampled] + (1 - weights.sum(-1)[sampled])
    with_estimate = 1 - not_lost / (1 - unread_mass + num_unread * level)
    torch.testing.assert_close(expected.lost_mass[sampled], with_estimate)


@with_and_without_sinks
@pytest.mark.parametrize("block_bytes", [1, None])
def test_a_margin_holds_what_the_histogram_says(block_bytes: int | None, sinks: Tensor | None) -> None:
    rows, thresholds = candidate_rows(None, sinks, block_bytes=block_bytes)
    histogram = shortfall_histogram(rows)
    query, key = rows.call.query, rows.call.key
    scores = causal_scores(query, key, softmax_scale=0.25)
    shadows = shadow_scores(
        quantize_query(query, rows.projection, softmax_scale=0.25), encode_keys(key, rows.projection)
    )
    sampled = LENGTHS - 1
    always = ENDS.mask(sampled + 1, len(key))[:, None]
    theta = thresholds[sampled][..., None]
    weights = (scores - row_lse(scores, sinks).unsqueeze(-1)).exp()
    mass = weights[sampled] * (scores[sampled] >= theta)
    for index in (0, 1, 100, 200, 300, len(MARGIN_EDGES) - 1):
        held = mass * (always | (shadows[sampled] >= theta - MARGIN_EDGES[index]))
        total = histogram[:, : index + 1].sum(-1) / 2**40
        torch.testing.assert_close(total, held.sum(dim=(0, 2)), rtol=1e-4, atol=1e-4)
    assert len(histogram[:, :300].sum(-1).unique()) == query.shape[1]


def test_edges_ascend_from_no_margin() -> None:
    assert MARGIN_EDGES[0] == 0
    assert bool((MARGIN_EDGES.diff() > 0).all())
    assert 900 < MARGIN_EDGES[-1] < 1100


def test_shortfalls_beyond_the_largest_margin_are_counted_there() -> None:
    rows, _ = candidate_rows()
    histogram = shortfall_histogram(replace(rows, thresholds=torch.full_like(rows.thresholds, -1e6)))
    assert not histogram[:, 1:].any()
    worthless = replace(rows.projection, decoder=rows.projection.decoder * 1e6)
    histogram = shortfall_histogram(replace(rows, projection=worthless))
    assert bool((histogram[:, -1] > 0).all())


def test_the_same_rows_give_the_same_integers() -> None:
    rows, _ = candidate_rows()
    whole, pieces = shortfall_histogram(rows), shortfall_histogram(replace(rows, block_bytes=1))
    # products of other shapes round otherwise, but what is added up is not rounded again
    assert int((whole.sum(-1) - pieces.sum(-1)).abs().max()) < 2**22
    assert torch.equal(whole, shortfall_histogram(rows))


@pytest.mark.parametrize("seq_len", [256, 1024])
def test_no_tensor_grows_with_the_square_of_the_length(seq_len: int) -> None:
    query, key, value = random_attention(seq_len)
    lengths = torch.arange(65, seq_len + 1)
    rows = CandidateRows(
        AttentionCall(0, query, key, value, softmax_scale=0.25),
        lengths,
        torch.zeros(len(lengths), query.shape[1]),
        projection=fitted(query, key),
        always_read=ENDS,
        block_bytes=1 << 16,
    )
    with LargestTensor() as largest:
        shortfall_histogram(rows)
        measure_candidates(rows, torch.zeros(query.shape[1]))
    assert largest.num_bytes <= max(2 << 16, query.nbytes)


def test_nothing_waits_for_the_device_or_mixes_devices() -> None:
    """Tensors without data, on a device of their own: a number that the host asks for is an error."""
    rows, _ = candidate_rows(soft_cap=5.0, block_bytes=1 << 14)
    projection = KeyProjection(*(tensor.to("meta") for tensor in vars(rows.projection).values()))
    query, key, thresholds = (tensor.to("meta") for tensor in (rows.call.query, rows.call.key, rows.thresholds))
    call = replace(rows.call, query=query, key=key)
    rows = replace(rows, call=call, thresholds=thresholds, projection=projection)
    results = [
        key_moments(query, key).key_covariance,
        shortfall_histogram(rows),
        measure_candidates(rows, torch.zeros(query.shape[1], device="meta")).candidates,
    ]
    assert all(result.is_meta for result in results)
