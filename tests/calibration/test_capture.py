from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vllm_toptheta.calibration.capture import largest_with_kth, observe_top_k
from vllm_toptheta.calibration.override import AttentionCall, row_blocks, windowed_attention
from vllm_toptheta.reference import (
    Placement,
    causal_scores,
    dense_attention,
    kth_largest_scores,
    row_lse,
    top_k_attention,
)


def random_attention(seq_len: int = 150, num_heads: int = 6, num_kv_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seq_len)
    return (
        2 * torch.randn(seq_len, num_heads, 16),
        torch.randn(seq_len, num_kv_heads, 16),
        torch.randn(seq_len, num_kv_heads, 16),
    )


SINKS = torch.linspace(-3.0, 6.0, 6)
with_and_without_sinks = pytest.mark.parametrize("sinks", [None, SINKS], ids=["without sinks", "with sinks"])


@with_and_without_sinks
@pytest.mark.parametrize("soft_cap", [None, 5.0])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
def test_observation_agrees_with_the_reference(num_kv_heads: int, soft_cap: float | None, sinks: Tensor | None) -> None:
    query, key, value = random_attention(num_kv_heads=num_kv_heads)
    call = AttentionCall(0, query, key, value, 0.25, soft_cap, sinks)
    options: dict[str, Any] = {"softmax_scale": 0.25, "logits_soft_cap": soft_cap, "sinks": sinks}
    expected_scores = kth_largest_scores(
        causal_scores(query, key, softmax_scale=0.25, logits_soft_cap=soft_cap), [8, 32]
    ).permute(2, 1, 0)

    output, kth_scores = observe_top_k(call, target_ks=(8, 32), sparse_k=8, block_bytes=1 << 14)
    expected = top_k_attention(query, key, value, target_k=8, **options).output
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(kth_scores, expected_scores)

    # after the softmax, and with ks in no order
    _, log_probabilities = observe_top_k(call, target_ks=(8, 32, 8), sparse_k=32, placement="post_softmax")
    log_denominator = row_lse(causal_scores(query, key, softmax_scale=0.25, logits_soft_cap=soft_cap), sinks).T
    torch.testing.assert_close(log_probabilities, expected_scores[[0, 1, 0]] - log_denominator)

    output, kth_scores = observe_top_k(call, target_ks=(8, 32), sparse_k=None)
    expected = dense_attention(query, key, value, **options).output
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(kth_scores, expected_scores)


def test_blocks_change_nothing() -> None:
    call = AttentionCall(0, *random_attention(), softmax_scale=0.25)
    whole, *others = [
        observe_top_k(call, target_ks=(4, 20), sparse_k=20, block_bytes=block_bytes)
        for block_bytes in (1 << 30, 1 << 16, 1 << 12, 1)
    ]
    for output, kth_scores in others:
        torch.testing.assert_close(output, whole[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(kth_scores, whole[1])


@pytest.mark.parametrize("placement", ["pre_softmax", "post_softmax"])
@pytest.mark.parametrize("sparse_k", [None, 4])
def test_rows_that_are_not_observed_change_nothing(sparse_k: int | None, placement: Placement) -> None:
    call = AttentionCall(0, *random_attention(), softmax_scale=0.25)
    lengths = np.array([1, 7, 8, 30, len(call.key)])
    options: dict[str, Any] = {"target_ks": (4, 20), "sparse_k": sparse_k, "placement": placement}
    output, kth_scores = observe_top_k(call, block_bytes=1 << 12, **options)
    sampled_output, sampled = observe_top_k(call, lengths=lengths, block_bytes=1 << 12, **options)
    torch.testing.assert_close(sampled_output, output)
    torch.testing.assert_close(sampled, kth_scores[..., lengths - 1])


@pytest.mark.parametrize("k", [1, 3, 31, 32, 200, 333])
@pytest.mark.parametrize("seq_len", [333, 512, 1000])
def test_the_largest_are_exact(seq_len: int, k: int) -> None:
    scores = torch.randn(2, 5, seq_len, generator=torch.Generator().manual_seed(k))
    scores[0, 0] = scores[0, 0].round()  # ties
    scores[0, 1, seq_len // 2 :] = -torch.inf
    largest, kth = largest_with_kth(scores, k)
    expected = scores.sort(descending=True).values[..., :k]
    assert torch.equal(largest.sort(descending=True).values, expected)
    assert torch.equal(kth, expected[..., -1])


@pytest.mark.parametrize("block_bytes", [1, 1000, 100_000, 1 << 30])
def test_row_blocks_cover_every_row_once_within_the_bound(block_bytes: int) -> None:
    for first in (0, 499, 123):
        blocks = list(row_blocks(3, 500, block_bytes, start=first))
        assert [row for start, stop in blocks for row in range(start, stop)] == list(range(first, 500))
        assert all(3 * 4 * (stop - start) * stop <= block_bytes or stop == start + 1 for start, stop in blocks)


def test_a_call_in_blocks_is_the_whole_call() -> None:
    query, key, value = random_attention()
    call = AttentionCall(3, query[100:], key, value, 0.25, 5.0)
    blocks = list(call.blocks(1 << 14))
    assert len(blocks) > 3
    assert torch.equal(torch.cat([block.query for block in blocks]), call.query)
    row = 100
    for block in blocks:
        assert (block.layer_idx, block.softmax_scale, block.soft_cap, block.num_before) == (3, 0.25, 5.0, row)
        row += len(block.query)
        assert torch.equal(block.key, key[:row])
        assert torch.equal(block.value, value[:row])
    assert row == len(key)


@pytest.mark.parametrize("sliding_window", [1, 7, 64, 1000])
def test_windowed_attention_sees_the_last_keys_only(sliding_window: int) -> None:
    query, key, value = random_attention()
    seq_len = len(query)
    distance = torch.arange(seq_len)[:, None] - torch.arange(seq_len)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(tensor.transpose(0, 1)[None] for tensor in (query, key, value)),
        attn_mask=(distance >= 0) & (distance < sliding_window),
        scale=0.25,
        enable_gqa=True,
    )
    actual = windowed_attention(AttentionCall(0, query, key, value, softmax_scale=0.25), sliding_window)
    torch.testing.assert_close(actual, expected[0].transpose(0, 1), rtol=1e-4, atol=1e-5)
    sinking = windowed_attention(AttentionCall(0, query, key, value, 0.25, sinks=SINKS), sliding_window)
    for row in (0, 6, 100):
        seen = slice(max(0, row + 1 - sliding_window), row + 1)
        alone = dense_attention(query[row : row + 1], key[seen], value[seen], softmax_scale=0.25, sinks=SINKS)
        torch.testing.assert_close(sinking[row : row + 1], alone.output, rtol=1e-4, atol=1e-5)
    # of the last rows alone, behind keys that came before them
    last = windowed_attention(AttentionCall(0, query[-9:], key, value, softmax_scale=0.25), sliding_window)
    torch.testing.assert_close(last, actual[-9:], rtol=1e-4, atol=1e-5)
