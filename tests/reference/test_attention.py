from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference.oracle import attend_row, make_inputs, scores_of_row
from vllm_toptheta.reference import (
    AttentionResult,
    Compensation,
    causal_scores,
    dense_attention,
    kth_largest_scores,
    score_threshold,
    top_k_attention,
    top_theta_attention,
)

GROUPS = pytest.mark.parametrize("num_queries_per_kv", [1, 3, 8])
SOFT_CAPS = pytest.mark.parametrize("soft_cap", [None, 2.0])
# of one product of head_size 16 and a sum over 40 values, in float32
FLOAT32 = {"rtol": 1e-5, "atol": 2e-6}


def inputs(num_queries_per_kv: int = 3, *, dtype: torch.dtype = torch.float32, num_queries: int = 11, seed: int = 0):
    return make_inputs(
        seed,
        num_queries=num_queries,
        seq_len=37,
        num_kv_heads=2,
        num_queries_per_kv=num_queries_per_kv,
        head_size=16,
        dtype=dtype,
    )


def assert_same(result: AttentionResult, expected: AttentionResult) -> None:
    assert torch.equal(result.output, expected.output)
    assert torch.equal(result.lost_mass, expected.lost_mass)
    assert torch.equal(result.num_survivors, expected.num_survivors)
    assert torch.equal(result.value_rows_read, expected.value_rows_read)


@settings(derandomize=True, database=None, deadline=None, max_examples=150)
@given(data=st.data())
def test_every_mode_equals_loops_over_python_floats(data: st.DataObject) -> None:
    draw = data.draw
    num_queries = draw(st.integers(1, 4))
    prefix = draw(st.integers(0, 9))
    num_kv_heads, num_queries_per_kv = draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 3]))
    num_heads = num_kv_heads * num_queries_per_kv
    placement = draw(st.sampled_from(["pre_softmax", "post_softmax"]))
    # with whole numbers, scores tie with each other and with the threshold
    integers = placement == "pre_softmax" and draw(st.booleans())
    soft_cap = None if integers else draw(st.sampled_from([None, 1.5]))
    target_k = draw(st.integers(0, 6))
    cap_k = draw(st.none() | st.integers(1, 5))
    phase, num_prompt_tokens = draw(st.sampled_from(["prefill", "decode", "both"])), draw(st.integers(0, 12))
    denominator = draw(st.sampled_from(["none", "exact", "offline", "exp_threshold"]))
    value_mean = draw(st.booleans())
    seed = draw(st.integers(0, 10_000))

    query, key, value = make_inputs(
        seed,
        num_queries=num_queries,
        seq_len=prefix + num_queries,
        num_kv_heads=num_kv_heads,
        num_queries_per_kv=num_queries_per_kv,
        head_size=4,
        integers=integers,
    )
    generator = torch.Generator().manual_seed(seed)
    threshold = torch.rand(num_queries, num_heads, generator=generator, dtype=torch.float64)
    threshold = threshold * 4 - 2 if placement == "pre_softmax" else threshold * 0.5 + 1e-3
    if integers:
        threshold = threshold.round()
    offline_sum = torch.rand(num_heads, generator=generator, dtype=torch.float64) + 0.1
    scale = torch.rand(num_queries, num_heads, generator=generator, dtype=torch.float64) + 0.05
    sinks = None
    if draw(st.booleans()):  # some outweigh every key
        sinks = 6 * torch.rand(num_heads, generator=generator, dtype=torch.float64) - 3

    result = top_theta_attention(
        query,
        key,
        value,
        threshold=threshold,
        target_k=target_k,
        softmax_scale=0.5,
        placement=placement,
        compensation=Compensation(denominator, value_mean, offline_sum, scale),
        cap_k=cap_k,
        logits_soft_cap=soft_cap,
        phase=phase,
        num_prompt_tokens=num_prompt_tokens,
        sinks=sinks,
    )

    for i in range(num_queries):
        n = prefix + i + 1
        in_phase = phase == "both" or (phase == "prefill") == (n <= num_prompt_tokens)
        assert result.thresholded[i].item() == (in_phase and n > target_k)
        rows_read: list[set[int]] = [set() for _ in range(num_kv_heads)]
        for head in range(num_heads):
            kv_head = head // num_queries_per_kv
            row = attend_row(
                scores_of_row(query[i, head].tolist(), key[:n, kv_head].tolist(), 0.5, soft_cap),
                value[:n, kv_head].tolist(),
                threshold=threshold[i, head].item(),
                target_k=target_k if in_phase else n,
                placement=placement,
                denominator=denominator,
                value_mean=value_mean,
                offline_sum=offline_sum[head].item(),
                exp_threshold_scale=scale[i, head].item(),
                cap_k=cap_k,
                sink=None if sinks is None else sinks[head].item(),
            )
            rows_read[kv_head] |= row.survivors
            assert set(result.survivors[i, head].nonzero().flatten().tolist()) == row.survivors
            assert result.num_survivors[i, head] == len(row.survivors)
            assert result.lost_mass[i, head].item() == pytest.approx(row.lost_mass, abs=1e-12)
            assert result.output[i, head].tolist() == pytest.approx(row.output, abs=1e-11)
        assert result.value_rows_read[i].tolist() == [len(rows) for rows in rows_read]


@GROUPS
def test_dense_equals_torch(num_queries_per_kv: int) -> None:
    query, key, value = inputs(num_queries_per_kv)
    num_queries, seq_len = len(query), len(key)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1),
        key.transpose(0, 1).repeat_interleave(num_queries_per_kv, dim=0),
        value.transpose(0, 1).repeat_interleave(num_queries_per_kv, dim=0),
        attn_mask=torch.ones(num_queries, seq_len, dtype=torch.bool).tril(seq_len - num_queries),
        scale=0.3,
    ).transpose(0, 1)
    torch.testing.assert_close(dense_attention(query, key, value, softmax_scale=0.3).output, expected, **FLOAT32)


@SOFT_CAPS
def test_a_sink_is_a_key_without_a_value(soft_cap: float | None) -> None:
    # as gpt-oss computes it: one more column of scores, dropped again after the softmax
    query, key, value = inputs()
    sinks = torch.tensor([-torch.inf, -2.0, 0.0, 1.0, 3.0, 100.0])
    scores = causal_scores(query, key, softmax_scale=0.3, logits_soft_cap=soft_cap)
    columns = torch.cat([scores, sinks[None, :, None].expand(len(query), -1, 1)], dim=-1)
    weights = columns.softmax(dim=-1)[..., :-1]
    expected = torch.einsum("qhn,nhd->qhd", weights, value.repeat_interleave(3, dim=1))
    dense = dense_attention(query, key, value, softmax_scale=0.3, logits_soft_cap=soft_cap, sinks=sinks)
    torch.testing.assert_close(dense.output, expected, **FLOAT32)
    assert torch.equal(dense.lost_mass, torch.zeros_like(dense.lost_mass))
    without = dense_attention(query, key, value, softmax_scale=0.3, logits_soft_cap=soft_cap)
    assert torch.equal(dense.output[:, 0], without.output[:, 0])


def test_lost_mass_is_that_of_keys_alone() -> None:
    query, key, value = inputs()
    sinks = torch.tensor([-2.0, 0.0, 1.0, 2.0, 3.0, 200.0])
    options = {"threshold": 0.4, "target_k": 0, "softmax_scale": 0.3}
    result = top_theta_attention(query, key, value, sinks=sinks, **options)
    scores = causal_scores(query, key, softmax_scale=0.3)
    weights = torch.cat([scores, sinks[None, :, None].expand(len(query), -1, 1)], dim=-1).softmax(dim=-1)
    lost = weights[..., :-1].where(~result.survivors, 0.0).sum(dim=-1)
    torch.testing.assert_close(result.lost_mass, lost, **FLOAT32)
    kept = weights[..., :-1].where(result.survivors, 0.0).sum(dim=-1)
    torch.testing.assert_close(kept + lost + weights[..., -1], torch.ones_like(lost), **FLOAT32)
    # the same keys survive: a sink changes what they weigh, not how they score
    assert torch.equal(result.survivors, top_theta_attention(query, key, value, **options).survivors)
    assert not bool(result.output[:, 5].any() or result.lost_mass[:, 5].any())


@GROUPS
@SOFT_CAPS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "compensation",
    [
        Compensation(),
        Compensation("none"),
        Compensation("offline", offline_sum=torch.tensor(3.0)),
        Compensation("exp_threshold"),
    ],
    ids=lambda compensation: compensation.denominator,
)
def test_threshold_of_minus_infinity_is_dense_to_the_bit(
    num_queries_per_kv: int, soft_cap: float | None, dtype: torch.dtype, compensation: Compensation
) -> None:
    query, key, value = inputs(num_queries_per_kv, dtype=dtype)
    dense = dense_attention(query, key, value, softmax_scale=0.3, logits_soft_cap=soft_cap)
    sparse = top_theta_attention(
        query,
        key,
        value,
        threshold=-torch.inf,
        target_k=4,
        softmax_scale=0.3,
        compensation=compensation,
        logits_soft_cap=soft_cap,
    )
    assert_same(sparse, dense)
    assert torch.equal(dense.lost_mass, torch.zeros_like(dense.lost_mass))
    assert dense.num_survivors[:, 0].tolist() == list(range(27, 38))


def test_probability_of_zero_is_dense_to_the_bit() -> None:
    query, key, value = inputs()
    sparse = top_theta_attention(
        query, key, value, threshold=0.0, target_k=4, softmax_scale=0.3, placement="post_softmax"
    )
    assert_same(sparse, dense_attention(query, key, value, softmax_scale=0.3))


@GROUPS
@SOFT_CAPS
def test_threshold_between_two_scores_keeps_what_top_k_keeps(num_queries_per_kv: int, soft_cap: float | None) -> None:
    query, key, value = inputs(num_queries_per_kv)
    scores = causal_scores(query, key, softmax_scale=0.3, logits_soft_cap=soft_cap)
    threshold = kth_largest_scores(scores, [5, 6]).mean(dim=-1)
    arguments = {"target_k": 5, "softmax_scale": 0.3, "logits_soft_cap": soft_cap}
    sparse = top_theta_attention(query, key, value, threshold=threshold, **arguments)
    top_k = top_k_attention(query, key, value, **arguments)
    assert torch.equal(sparse.survivors, top_k.survivors)
    assert torch.all(top_k.num_survivors == 5)
    assert_same(sparse, top_k)


def test_top_k_is_a_threshold_at_the_kth_score() -> None:
    query, key, value = inputs()
    key[20] = key[10]  # ties of two keys, now and then at the k-th score
    compensation = Compensation("exp_threshold", exp_threshold_scale=0.2)
    threshold = kth_largest_scores(causal_scores(query, key, softmax_scale=0.3), [5])[..., 0]
    sparse = top_theta_attention(
        query, key, value, threshold=threshold, target_k=5, softmax_scale=0.3, compensation=compensation
    )
    top_k = top_k_attention(query, key, value, target_k=5, softmax_scale=0.3, compensation=compensation)
    assert_same(sparse, top_k)
    assert set(top_k.num_survivors.unique().tolist()) == {5, 6}


def test_ties_survive() -> None:
    query = torch.ones(1, 1, 1)
    key = torch.tensor([1.0, 3.0, 2.0, 2.0, 1.0, 2.0])[:, None, None]
    sparse = top_theta_attention(query, key, key, threshold=2.0, target_k=2, softmax_scale=1.0)
    assert sparse.survivors[0, 0].tolist() == [False, True, True, True, False, True]
    top_k = top_k_attention(query, key, key, target_k=2, softmax_scale=1.0)
    assert_same(top_k, sparse)


def test_rows_of_at_most_k_keys_are_dense() -> None:
    query, key, value = inputs(num_queries=37)
    dense = dense_attention(query, key, value, softmax_scale=0.3)
    for sparse in (
        top_theta_attention(query, key, value, threshold=torch.inf, target_k=9, softmax_scale=0.3, cap_k=2),
        top_k_attention(query, key, value, target_k=9, softmax_scale=0.3),
    ):
        assert torch.equal(sparse.output[:9], dense.output[:9])
        assert torch.all(sparse.lost_mass[:9] == 0)
        assert torch.all(sparse.num_survivors[9:] < 10)


def test_top_k_is_dense_outside_its_phase() -> None:
    query, key, value = inputs(num_queries=37)
    dense = dense_attention(query, key, value, softmax_scale=0.3)
    sparse = top_k_attention(query, key, value, target_k=5, softmax_scale=0.3)
    decode = top_k_attention(query, key, value, target_k=5, softmax_scale=0.3, phase="decode", num_prompt_tokens=20)
    prefill = top_k_attention(query, key, value, target_k=5, softmax_scale=0.3, phase="prefill", num_prompt_tokens=20)
    assert torch.equal(decode.output, torch.cat([dense.output[:20], sparse.output[20:]]))
    assert torch.equal(prefill.output, torch.cat([sparse.output[:20], dense.output[20:]]))
    assert decode.thresholded.tolist() == [position >= 20 for position in range(37)]
    assert prefill.thresholded.tolist() == [5 <= position < 20 for position in range(37)]
    assert torch.all(decode.num_survivors[20:] == 5)


def test_top_k_of_more_keys_than_there_are_is_dense() -> None:
    query, key, value = inputs()
    top_k = top_k_attention(query, key, value, target_k=100, softmax_scale=0.3)
    assert_same(top_k, dense_attention(query, key, value, softmax_scale=0.3))


def test_post_softmax_keeps_what_the_converted_threshold_keeps() -> None:
    query, key, value = inputs()
    probability = torch.tensor([0.01, 0.02, 0.03, 0.05, 0.1, 0.9])
    scores = causal_scores(query, key, softmax_scale=0.3)
    post = top_theta_attention(
        query, key, value, threshold=probability, target_k=4, softmax_scale=0.3, placement="post_softmax"
    )
    pre = top_theta_attention(
        query,
        key,
        value,
        threshold=score_threshold(scores, probability.expand(11, 6)),
        target_k=4,
        softmax_scale=0.3,
    )
    assert_same(post, pre)
    assert torch.equal(post.survivors, scores.softmax(dim=-1) >= probability[:, None])


def test_value_rows_read_is_the_union_over_the_group() -> None:
    query = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]])
    key = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])[:, None, :].expand(4, 2, 2)
    result = top_theta_attention(query, key, key, threshold=1.0, target_k=1, softmax_scale=1.0)
    assert result.num_survivors.tolist() == [[2, 2, 2, 2]]
    assert result.value_rows_read.tolist() == [[3, 2]]


@pytest.mark.parametrize("cap_k", [None, 3])
@pytest.mark.parametrize("size", [1, 4])
def test_chunks_of_queries_give_the_result_of_one_call(size: int, cap_k: int | None) -> None:
    query, key, value = inputs()
    threshold = torch.linspace(0.2, 0.6, 11 * 6).view(11, 6)
    compensation = Compensation("exp_threshold", exp_threshold_scale=0.1)
    prefix = len(key) - len(query)

    def attend(rows: slice) -> AttentionResult:
        return top_theta_attention(
            query[rows],
            key[: prefix + rows.stop],
            value[: prefix + rows.stop],
            threshold=threshold[rows],
            target_k=30,
            softmax_scale=0.3,
            compensation=compensation,
            cap_k=cap_k,
        )

    whole = attend(slice(0, 11))
    chunks = [attend(slice(start, min(start + size, 11))) for start in range(0, 11, size)]
    assert torch.equal(torch.cat([chunk.num_survivors for chunk in chunks]), whole.num_survivors)
    assert torch.equal(torch.cat([chunk.value_rows_read for chunk in chunks]), whole.value_rows_read)
    torch.testing.assert_close(torch.cat([chunk.output for chunk in chunks]), whole.output, **FLOAT32)
    torch.testing.assert_close(torch.cat([chunk.lost_mass for chunk in chunks]), whole.lost_mass, **FLOAT32)


def test_arithmetic_is_float32_at_least() -> None:
    query, key, value = inputs(dtype=torch.bfloat16)
    assert_same(
        dense_attention(query, key, value, softmax_scale=0.3),
        dense_attention(query.float(), key.float(), value.float(), softmax_scale=0.3),
    )
    query, key, value = inputs(dtype=torch.float64)
    assert dense_attention(query, key, value, softmax_scale=0.3).output.dtype == torch.float64


def test_keys_of_the_future_do_not_count_even_as_nan() -> None:
    query, key, value = inputs()
    key[-1] = torch.nan
    scores = causal_scores(query, key, softmax_scale=0.3)
    assert torch.all(scores[:-1, :, -1] == -torch.inf)


@pytest.mark.parametrize(
    ("field", "call"),
    [
        ("query", lambda q, k, v: dense_attention(q, k[:5], v[:5], softmax_scale=1.0)),
        ("query", lambda q, k, v: dense_attention(q[:0], k, v, softmax_scale=1.0)),
        ("query", lambda q, k, v: dense_attention(q[:, :5], k, v, softmax_scale=1.0)),
        ("key", lambda q, k, v: dense_attention(q, k[..., :8], v, softmax_scale=1.0)),
        ("value", lambda q, k, v: dense_attention(q, k, v[:-1], softmax_scale=1.0)),
        ("logits_soft_cap", lambda q, k, v: dense_attention(q, k, v, softmax_scale=1.0, logits_soft_cap=0.0)),
        ("target_ks", lambda q, k, v: top_k_attention(q, k, v, target_k=0, softmax_scale=1.0)),
        (
            "threshold",
            lambda q, k, v: top_theta_attention(q, k, v, threshold=torch.zeros(5), target_k=1, softmax_scale=1.0),
        ),
        (
            "threshold",
            lambda q, k, v: top_theta_attention(q, k, v, threshold=float("nan"), target_k=1, softmax_scale=1.0),
        ),
        (
            "threshold",
            lambda q, k, v: top_theta_attention(
                q, k, v, threshold=-0.1, target_k=1, softmax_scale=1.0, placement="post_softmax"
            ),
        ),
        (
            "placement",
            lambda q, k, v: top_theta_attention(
                q, k, v, threshold=0.1, target_k=1, softmax_scale=1.0, placement="softmax"
            ),
        ),
        ("sinks", lambda q, k, v: dense_attention(q, k, v, softmax_scale=1.0, sinks=torch.zeros(5))),
        (
            "sinks",
            lambda q, k, v: top_theta_attention(
                q, k, v, threshold=0.1, target_k=1, softmax_scale=1.0, placement="post_softmax", sinks=torch.zeros(5)
            ),
        ),
        ("cap_k", lambda q, k, v: top_theta_attention(q, k, v, threshold=0.1, target_k=1, softmax_scale=1.0, cap_k=0)),
    ],
)
def test_what_does_not_fit_is_named(field: str, call: Callable[..., AttentionResult]) -> None:
    with pytest.raises(ValueError, match=f"^{field}: "):
        call(*inputs())
