"""Tiers against dense attention and against thresholds alone, and the format of copies."""

from __future__ import annotations

import pytest
import torch

from vllm_toptheta.reference import (
    causal_scores,
    copy_keys,
    copy_scores,
    copy_values,
    dense_attention,
    key_centre,
    relative_threshold,
    tiered_attention,
    top_theta_attention,
)
from vllm_toptheta.rotation import rotation

SCALE = 0.125
HEAD_SIZES = [64, 80, 96, 128, 256]


def tensors(
    seq_len: int = 700, num_queries: int = 3, head_size: int = 64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seq_len)
    query = 1.5 * torch.randn(num_queries, 6, head_size, generator=generator)
    key = torch.randn(seq_len, 2, head_size, generator=generator) + 3 * torch.randn(2, head_size, generator=generator)
    return query, key, torch.randn(seq_len, 2, head_size, generator=generator)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_the_rotation_keeps_products_and_spreads_a_large_channel(head_size: int) -> None:
    turn = rotation(head_size)
    torch.testing.assert_close(turn @ turn.mT, torch.eye(head_size), rtol=0, atol=1e-5)
    # one channel, or a constant: what rows of a model have and levels in common suffer from
    size = head_size & -head_size
    assert float((100 * torch.eye(head_size) @ turn.mT).abs().max()) <= 100 * (2 / size) ** 0.5
    constant = torch.ones(head_size) @ turn.mT
    assert float(constant.abs().max()) < 0.8 * head_size**0.5


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_scores_of_copies_are_near_the_exact_ones(head_size: int) -> None:
    query, key, _ = tensors(head_size=head_size)
    exact = causal_scores(query, key, softmax_scale=SCALE, logits_soft_cap=30.0)
    copies = copy_scores(query, copy_keys(key, key_centre(key)), softmax_scale=SCALE, logits_soft_cap=30.0)
    visible = exact > -torch.inf
    error, spread = (copies - exact)[visible].std(), exact[visible].std()
    # a step of 2 max / 16, an even error in it, and for products with 8 bits nearly nothing
    assert float(error) < 0.13 * float(spread)
    assert abs(float((copies - exact)[visible].mean())) < 0.01 * float(spread)


def test_a_copy_of_a_value_loses_nothing_in_its_direction() -> None:
    *_, value = tensors()
    copies = copy_values(value)
    decoded = copies.decoded()
    torch.testing.assert_close((decoded * value).sum(-1), (value * value).sum(-1), rtol=2e-3, atol=0)
    assert sorted(copies.codes.unique().tolist()) == [0, 1, 2, 3]
    assert float((decoded - value).norm() / value.norm()) < 0.42


@pytest.mark.parametrize("rows", [torch.zeros(20, 2, 64), torch.full((20, 2, 64), 1e-9), torch.full((20, 2, 64), 6e4)])
def test_extreme_rows_have_finite_copies(rows: torch.Tensor) -> None:
    keys, values = copy_keys(rows, torch.zeros(2, 64)), copy_values(rows)
    assert bool(values.decoded().isfinite().all())
    query = torch.randn(1, 2, 64, generator=torch.Generator().manual_seed(1))
    scores = copy_scores(query, keys, softmax_scale=SCALE)
    assert bool(scores.isfinite().all())
    expected = causal_scores(query, rows, softmax_scale=SCALE)
    torch.testing.assert_close(scores, expected, rtol=0.3, atol=1e-6 + 0.1 * float(expected.abs().max()))


def test_everything_heavy_is_dense_attention() -> None:
    query, key, value = tensors()
    dense = dense_attention(query, key, value, softmax_scale=SCALE)
    result = tiered_attention(query, key, value, weight_floor=1e-9, heavy=0.0, block_size=16, softmax_scale=SCALE)
    torch.testing.assert_close(result.output, dense.output, rtol=1e-4, atol=1e-5)
    assert result.exact[-1].all()


SINKS = torch.tensor([-3.0, 0.0, 2.0, 4.0, 6.0, 8.0])


@pytest.mark.parametrize("sinks", [None, SINKS], ids=["without sinks", "with sinks"])
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("weight_floor", [0.5, 2.0, 8.0])
def test_with_exact_scores_it_reads_what_thresholds_read(
    weight_floor: float, block_size: int, sinks: torch.Tensor | None
) -> None:
    query, key, value = tensors()
    scores = causal_scores(query, key, softmax_scale=SCALE)
    theta = relative_threshold(scores, torch.arange(698, 701), weight_floor, sinks=sinks)
    alone = top_theta_attention(query, key, value, threshold=theta, target_k=0, softmax_scale=SCALE, sinks=sinks)
    tiers = tiered_attention(
        query, key, value, weight_floor=weight_floor, heavy=0.007, block_size=block_size, softmax_scale=SCALE,
        score_copies=scores, sinks=sinks,
    )  # fmt: skip
    assert torch.equal(tiers.survivors, alone.survivors)
    torch.testing.assert_close(tiers.lost_mass, alone.lost_mass, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(tiers.true_lost_mass, tiers.lost_mass, rtol=1e-4, atol=1e-6)
    # what differs are 2 bits of values that hold little
    assert float((tiers.output - alone.output).norm() / alone.output.norm()) < 0.05


def test_heavy_keys_and_both_ends_are_exact() -> None:
    query, key, value = tensors(seq_len=411, num_queries=1)
    copies = copy_scores(query, copy_keys(key, key_centre(key)), softmax_scale=SCALE)[0]
    result = tiered_attention(query, key, value, weight_floor=2.0, heavy=0.01, block_size=32, softmax_scale=SCALE)
    exact = causal_scores(query, key, softmax_scale=SCALE)[0]
    anchors = torch.cat([exact[:, :16], exact[:, -128:]], dim=1).logsumexp(dim=1)
    wanted = (copies >= (anchors + torch.tensor(0.01).log())[:, None]).unflatten(0, (2, 3)).any(1)
    wanted[:, :16] = wanted[:, -128:] = True
    assert torch.equal(result.exact[0], wanted)
    assert bool((result.survivors & ~result.exact.repeat_interleave(3, dim=1)).any())


def test_rows_of_anchors_alone_are_dense() -> None:
    query, key, value = tensors(seq_len=145)
    dense = dense_attention(query, key, value, softmax_scale=SCALE)
    result = tiered_attention(query, key, value, weight_floor=40.0, heavy=0.5, block_size=16, softmax_scale=SCALE)
    torch.testing.assert_close(result.output[:2], dense.output[:2], rtol=1e-4, atol=1e-5)
    assert result.lost_mass[:2].max() < 1e-6
    assert bool((result.lost_mass[2] > 0).all())


def test_rows_do_not_depend_on_each_other() -> None:
    query, key, value = tensors()
    options = {"weight_floor": 2.0, "heavy": 0.01, "block_size": 16, "softmax_scale": SCALE}
    together = tiered_attention(query, key, value, **options)
    alone = tiered_attention(query[:1], key[:698], value[:698], **options)
    torch.testing.assert_close(together.output[:1], alone.output, rtol=1e-5, atol=1e-6)
    assert torch.equal(together.survivors[:1, :, :698], alone.survivors)
