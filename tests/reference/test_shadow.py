"""Shadow keys: how well their scores follow those of the keys, and the edges of the format."""

from __future__ import annotations

import pytest
import torch

from vllm_toptheta.reference import (
    Compensation,
    KeyProjection,
    candidate_keys,
    causal_scores,
    encode_keys,
    fit_projection,
    pack_codes,
    quantize_query,
    shadow_scores,
    top_theta_attention,
    unpack_codes,
)

HEADS, KV_HEADS, HEAD_SIZE = 6, 2, 64


@pytest.fixture
def step() -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys with correlated channels, a mean, and few directions that matter to scores."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.exp(-4 * torch.arange(HEAD_SIZE) / HEAD_SIZE)
    mixing = torch.linalg.qr(torch.randn(KV_HEADS, HEAD_SIZE, HEAD_SIZE, generator=generator)).Q
    keys = torch.randn(2000, KV_HEADS, HEAD_SIZE, generator=generator) * scales
    queries = torch.randn(300, HEADS, HEAD_SIZE, generator=generator)
    return queries, 3 * torch.einsum("nhd,hde->nhe", keys, mixing) + 2.0


def fit(query: torch.Tensor, key: torch.Tensor, num_channels: int) -> KeyProjection:
    grouped = query.unflatten(1, (KV_HEADS, -1))
    centred = key - key.mean(0)
    return fit_projection(
        key.mean(0),
        torch.einsum("nhd,nhe->hde", centred, centred) / len(key),
        torch.einsum("thgd,thge->hde", grouped, grouped) / (len(query) * grouped.shape[2]),
        num_channels=num_channels,
    )


def relative_error(query: torch.Tensor, key: torch.Tensor, projection: KeyProjection) -> float:
    """Mean square of the error of scores, over their variance along the keys."""
    exact = torch.einsum("thgd,nhd->thgn", query.unflatten(1, (KV_HEADS, -1)), key).flatten(1, 2)
    scaled = quantize_query(query, projection, softmax_scale=1.0)
    error = shadow_scores(scaled, encode_keys(key, projection)) - exact
    return float(error.square().mean() / exact.var(dim=-1).mean())


def test_scores_follow_those_of_the_keys(step: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key = step
    # 16 levels of a normal variable leave 1.15 % of its variance
    assert relative_error(query, key, fit(query, key, HEAD_SIZE)) < 0.016
    half, quarter = (relative_error(query, key, fit(query, key, size)) for size in (32, 16))
    assert half < 0.04
    assert half < quarter < 0.2


def test_directions_that_queries_do_not_have_cost_nothing(step: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key = step
    query[..., HEAD_SIZE // 2 :] = 0.0
    key[..., HEAD_SIZE // 2 :] *= 100.0
    assert relative_error(query, key, fit(query, key, 32)) < 0.04


def test_decoding_what_was_encoded_gives_the_keys_back(step: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key = step
    projection = fit(query, key, HEAD_SIZE)
    codes = encode_keys(key, projection)
    decoded = projection.key_mean + torch.einsum("nhr,hrd->nhd", codes.float() - 7.5, projection.decoder)
    assert float((decoded - key).square().mean() / key.var(dim=0).mean()) < 0.03


def test_keys_without_variance_have_finite_codes() -> None:
    moment = torch.eye(HEAD_SIZE)[None]
    projection = fit_projection(torch.ones(1, HEAD_SIZE), torch.zeros_like(moment), moment, num_channels=32)
    key = torch.ones(3, 1, HEAD_SIZE)
    scaled = quantize_query(torch.zeros(1, 2, HEAD_SIZE), projection, softmax_scale=1.0)
    assert all(bool(tensor.isfinite().all()) for tensor in (projection.encoder, projection.decoder))
    assert shadow_scores(scaled, encode_keys(key, projection)).tolist() == [[[0.0] * 3] * 2]


@pytest.mark.parametrize("num_channels", [0, 33, 66])
def test_other_numbers_of_channels_are_refused(num_channels: int) -> None:
    moment = torch.eye(HEAD_SIZE)[None]
    with pytest.raises(ValueError, match="^num_channels: "):
        fit_projection(torch.zeros(1, HEAD_SIZE), moment, moment, num_channels=num_channels)


def test_bytes_hold_two_channels() -> None:
    codes = torch.tensor([[1, 2, 3, 15, 0, 9, 12, 7]], dtype=torch.uint8)
    assert pack_codes(codes).tolist() == [[0x01, 0x92, 0xC3, 0x7F]]
    assert torch.equal(unpack_codes(pack_codes(codes)), codes)


def test_candidates_are_wanted_by_any_head_or_at_an_end() -> None:
    scores = torch.zeros(4, 100)
    scores[1, 40] = scores[2, 41] = 1.0
    floor = torch.full((4,), 0.5)
    options = {"num_kv_heads": 2, "num_sink": 2, "num_recent": 3, "block_size": 16}
    found = candidate_keys(scores, floor, **options)
    assert found[0].nonzero().flatten().tolist() == [0, 1, 40, 96, 97, 98, 99]
    assert found[1].nonzero().flatten().tolist() == [0, 1, 41, 96, 97, 98, 99]
    # the page of the last token, which has just become full
    assert candidate_keys(scores[:, :96], floor, **options)[0].nonzero().flatten().tolist() == [
        0,
        1,
        40,
        *range(80, 96),
    ]


def test_only_candidates_survive(step: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key = step
    query = query[:1]
    scores = causal_scores(query, key, softmax_scale=0.1)
    candidates = torch.zeros_like(scores, dtype=torch.bool)
    candidates[..., ::2] = True
    options = {"threshold": scores.median(), "target_k": 10, "softmax_scale": 0.1}
    result = top_theta_attention(query, key, key, candidates=candidates, **options)
    everything = top_theta_attention(query, key, key, **options)
    assert torch.equal(result.survivors, everything.survivors & candidates)
    # a row that is too short for thresholds keeps all keys
    short = top_theta_attention(query, key[:5], key[:5], candidates=candidates[..., :5], **options)
    assert short.num_survivors.unique().tolist() == [5]


def test_candidates_of_several_queries_are_those_of_each() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, floor = torch.randn(40, 4, 70, generator=generator), torch.randn(40, 4, generator=generator)
    options = {"num_kv_heads": 2, "num_sink": 2, "num_recent": 3, "block_size": 16}
    together = candidate_keys(scores, floor, **options)
    assert together.shape == (40, 2, 70)
    for row in range(40):
        seen = 31 + row
        assert torch.equal(together[row, :, :seen], candidate_keys(scores[row, :, :seen], floor[row], **options))
        assert not together[row, :, seen:].any()


def test_what_is_read_and_truly_lost_is_told(step: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key = step
    query, key = query[:3], key[:200]
    scores = causal_scores(query, key, softmax_scale=0.1)
    candidates = torch.zeros_like(scores, dtype=torch.bool)
    candidates[..., ::2] = True
    options = {"threshold": scores[..., :197].median(), "target_k": 198, "softmax_scale": 0.1, "candidates": candidates}
    exact = top_theta_attention(query, key, key, **options)
    assert exact.keys_read.tolist() == [[198, 198], [100, 100], [100, 100]]
    assert torch.equal(exact.true_lost_mass, exact.lost_mass)
    estimated = Compensation("candidates", exp_threshold_scale=0.5)
    others = [
        top_theta_attention(query, key, key, **options, compensation=estimated),
        # shadows that score as their keys do
        top_theta_attention(query, key, key, **options, compensation=Compensation("shadow"), shadow_scores=scores),
    ]
    for result in others:
        torch.testing.assert_close(result.true_lost_mass, exact.lost_mass)
    weights = (scores - scores.amax(dim=-1, keepdim=True)).exp()
    known = (weights * (candidates | (torch.arange(198, 201) == 198)[:, None, None])).sum(dim=-1)
    num_unread = torch.tensor([0, 99, 100])[:, None]
    missing = 0.5 * num_unread * (options["threshold"] - scores.amax(dim=-1)).exp()
    kept = (weights * exact.survivors).sum(dim=-1)
    torch.testing.assert_close(others[0].lost_mass, 1 - kept / (known + missing))
    assert not torch.allclose(others[0].lost_mass, exact.lost_mass)
    torch.testing.assert_close(others[1].lost_mass, exact.lost_mass)
    torch.testing.assert_close(others[1].output, exact.output)
    with pytest.raises(ValueError, match="^candidates: "):
        top_theta_attention(query, key, key, **options | {"candidates": None}, compensation=estimated)
    with pytest.raises(ValueError, match="^shadow_scores: "):
        top_theta_attention(query, key, key, **options, compensation=Compensation("shadow"))


def test_an_estimate_far_above_every_score_does_not_overflow(step: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key = step
    query, key = query[:1], key[:50]
    scores = causal_scores(query, key, softmax_scale=0.1)
    candidates = torch.zeros_like(scores, dtype=torch.bool)
    result = top_theta_attention(
        query,
        key,
        key,
        threshold=0.0,
        target_k=8,
        softmax_scale=0.1,
        compensation=Compensation("shadow"),
        candidates=candidates,
        shadow_scores=scores + 1e4,
    )
    assert bool(result.output.isfinite().all())
    assert result.lost_mass.tolist() == [[1.0] * HEADS]
