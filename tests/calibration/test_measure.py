"""What thresholds keep and lose, against the reference."""

from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.calibration.test_capture import random_attention, with_and_without_sinks
from vllm_toptheta.calibration.capture import observe_top_k
from vllm_toptheta.calibration.measure import ROW_MEASURES, measure_rows
from vllm_toptheta.calibration.override import AttentionCall
from vllm_toptheta.reference import causal_scores, row_lse, top_theta_attention

PlacementName = Literal["pre_softmax", "post_softmax"]


def median_thresholds(
    query: Tensor, key: Tensor, placement: PlacementName, soft_cap: float | None, sinks: Tensor | None = None
) -> Tensor:
    """Between scores, `[seq_len, num_heads]`, in the unit of the placement, so that rounding decides nothing."""
    scores = causal_scores(query, key, softmax_scale=0.25, logits_soft_cap=soft_cap)
    if placement == "post_softmax":
        scores = scores - row_lse(scores, sinks).unsqueeze(-1)
    ordered = scores.sort(dim=-1, descending=True).values
    return torch.where(ordered[..., 9].isinf(), ordered[..., 0] - 1, (ordered[..., 8] + ordered[..., 9]) / 2)


@with_and_without_sinks
@pytest.mark.parametrize("placement", ["pre_softmax", "post_softmax"])
@pytest.mark.parametrize("soft_cap", [None, 5.0])
@pytest.mark.parametrize("block_bytes", [1, 1 << 14, None])
def test_rows_are_measured_as_the_reference_does(
    placement: PlacementName, soft_cap: float | None, block_bytes: int | None, sinks: Tensor | None
) -> None:
    query, key, value = random_attention()
    thresholds = median_thresholds(query, key, placement, soft_cap, sinks)
    output, measures = measure_rows(
        AttentionCall(0, query, key, value, 0.25, soft_cap, sinks),
        thresholds=thresholds,
        dense_length=16,
        placement=placement,
        block_bytes=block_bytes,
    )
    expected = top_theta_attention(
        query,
        key,
        value,
        threshold=thresholds.exp() if placement == "post_softmax" else thresholds,
        target_k=16,
        softmax_scale=0.25,
        placement=placement,
        logits_soft_cap=soft_cap,
        sinks=sinks,
    )
    torch.testing.assert_close(output, expected.output, rtol=1e-4, atol=1e-5)
    assert ROW_MEASURES == ("offline_sum", "exp_threshold_scale")
    offline_sum, scale = measures

    scores = causal_scores(query, key, softmax_scale=0.25, logits_soft_cap=soft_cap)
    assert expected.survivors is not None
    discarded = ~expected.survivors & (scores > -torch.inf)
    largest = scores.amax(dim=-1) if sinks is None else torch.maximum(scores.amax(dim=-1), sinks)
    relative = (scores - largest.unsqueeze(-1)).exp() * discarded
    torch.testing.assert_close(offline_sum.T, relative.sum(dim=-1), rtol=1e-4, atol=1e-6)
    theta = thresholds + row_lse(scores, sinks) if placement == "post_softmax" else thresholds
    mean = ((scores - theta[..., None]).exp() * discarded).sum(dim=-1) / discarded.sum(dim=-1)
    torch.testing.assert_close(scale.T, mean, rtol=1e-3, atol=1e-6, equal_nan=True)
    assert scale[:, :16].isnan().all()


def test_a_threshold_above_every_score_loses_everything() -> None:
    call = AttentionCall(0, *random_attention(), softmax_scale=0.25)
    thresholds = torch.full((len(call.query), 6), 1e4)
    output, measures = measure_rows(call, thresholds=thresholds, dense_length=4)
    assert bool((measures[0, :, 4:] >= 1).all())  # the largest score is among what is lost
    assert not measures[1, :, 4:].any()
    assert output.isfinite().all()


def test_little_that_is_lost_is_measured_exactly() -> None:
    """One key takes nearly all: as a difference of sums near 1, what the others have would be rounding."""
    query, key, value = torch.ones(40, 1, 1), torch.zeros(40, 1, 1), torch.randn(40, 1, 1)
    key[0] = 24.0
    call = AttentionCall(0, query, key, value, softmax_scale=1.0)
    _, measures = measure_rows(call, thresholds=torch.full((40, 1), 1.0), dense_length=1)
    lengths = torch.arange(2.0, 41.0)
    torch.testing.assert_close(measures[0, 0, 1:], (lengths - 1) * torch.tensor(-24.0).exp())
    torch.testing.assert_close(measures[1, 0, 1:], torch.tensor(-1.0).exp().expand(39), rtol=1e-4, atol=0)


class LargestTensor(TorchDispatchMode):
    """Remembers the bytes of the largest tensor that any operation makes."""

    num_bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.untyped_storage().nbytes() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.num_bytes = max([self.num_bytes, *sizes])
        return result


@pytest.mark.parametrize("seq_len", [256, 1024])
def test_no_tensor_grows_with_the_square_of_the_length(seq_len: int) -> None:
    call = AttentionCall(0, *random_attention(seq_len), softmax_scale=0.25)
    block_bytes = 1 << 16
    with LargestTensor() as largest:
        observe_top_k(call, target_ks=(8, 64), sparse_k=8, block_bytes=block_bytes)
        measure_rows(call, thresholds=torch.zeros(seq_len, 6), dense_length=8, block_bytes=block_bytes)
    # booleans that become indices are eight times as large as those of a block
    assert largest.num_bytes <= max(2 * block_bytes, call.query.nbytes)
