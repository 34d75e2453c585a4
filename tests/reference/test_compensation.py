import pytest
import torch
from torch import Tensor

from tests.reference.oracle import make_inputs
from vllm_toptheta.reference import (
    AttentionResult,
    Compensation,
    causal_value_mean,
    dense_attention,
    top_theta_attention,
)


def attend(query: Tensor, key: Tensor, value: Tensor, threshold: float, compensation: Compensation) -> AttentionResult:
    return top_theta_attention(
        query, key, value, threshold=threshold, target_k=4, softmax_scale=0.3, compensation=compensation
    )


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return make_inputs(1, num_queries=13, seq_len=67, num_kv_heads=2, num_queries_per_kv=3, head_size=16, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threshold", [-torch.inf, -1.0, 0.0, 0.5, 2.0, torch.inf])
@pytest.mark.parametrize("constant", [4.0, -0.3])
def test_exact_denominator_and_value_mean_preserve_a_constant(
    dtype: torch.dtype, threshold: float, constant: float
) -> None:
    # weights and lost mass add up to one, so nothing is left but the rounding of that sum
    query, key, value = inputs(dtype)
    result = attend(query, key, torch.full_like(value, constant), threshold, Compensation())
    error = (result.output / torch.tensor(constant, dtype=dtype) - 1).abs().max().item()
    assert error <= 8 * torch.finfo(dtype).eps


def test_value_mean_without_what_was_lost_changes_nothing() -> None:
    query, key, value = inputs()
    with_mean = attend(query, key, value, 0.5, Compensation("none", value_mean=True))
    without = attend(query, key, value, 0.5, Compensation("none", value_mean=False))
    assert torch.equal(with_mean.output, without.output)
    assert torch.all(without.lost_mass == 0)


@pytest.mark.parametrize(
    "compensation",
    [
        Compensation("none"),
        Compensation("exact"),
        Compensation("offline", offline_sum=torch.linspace(0, 2, 6)),
        Compensation("exp_threshold"),
        Compensation("exp_threshold", exp_threshold_scale=0.0),
    ],
    ids=["none", "exact", "offline", "exp_threshold", "exp_threshold of nothing"],
)
@pytest.mark.parametrize("threshold", [1000.0, torch.inf])
def test_rows_without_survivors_give_the_mean_of_the_values(compensation: Compensation, threshold: float) -> None:
    query, key, value = inputs()
    result = attend(query, key, value, threshold, compensation)
    assert torch.all(result.num_survivors == 0)
    assert torch.all(result.lost_mass == 1)
    mean = causal_value_mean(value, len(query)).repeat_interleave(3, dim=1)
    assert torch.equal(result.output, mean)


def test_rows_without_survivors_give_zero_without_the_mean() -> None:
    query, key, value = inputs()
    result = attend(query, key, value, 1000.0, Compensation("exact", value_mean=False))
    assert torch.equal(result.output, torch.zeros_like(result.output))


def test_value_mean_covers_the_rows_that_the_query_sees() -> None:
    value = torch.arange(12.0).view(6, 2, 1)
    for num_queries in (1, 4, 6):
        expected = torch.stack([value[: 6 - num_queries + i + 1].mean(dim=0) for i in range(num_queries)])
        torch.testing.assert_close(causal_value_mean(value, num_queries), expected)


def test_exact_lost_mass_is_the_dense_weight_of_the_discarded() -> None:
    query, key, value = inputs(torch.float64)
    # the identity as values turns outputs into weights
    identity = torch.eye(67, dtype=torch.float64)[:, None, :].expand(67, 2, 67)
    sparse = attend(query, key, identity, 0.5, Compensation("exact", value_mean=False))
    dense = dense_attention(query, key, identity, softmax_scale=0.3)
    torch.testing.assert_close(sparse.output, dense.output * sparse.survivors)
    torch.testing.assert_close(sparse.lost_mass, (dense.output * ~sparse.survivors).sum(dim=-1))


def test_tensors_of_heads_and_of_rows_agree() -> None:
    query, key, value = inputs()
    per_head = torch.linspace(0.1, 0.6, 6)
    for denominator in ("offline", "exp_threshold"):
        of_heads = attend(query, key, value, 0.5, Compensation(denominator, True, per_head, per_head))
        rows = per_head.expand(13, 6)
        of_rows = attend(query, key, value, 0.5, Compensation(denominator, True, rows, rows))
        assert torch.equal(of_heads.output, of_rows.output)


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("denominator", {"denominator": "sometimes"}),
        ("offline_sum", {"denominator": "offline"}),
        ("offline_sum", {"denominator": "offline", "offline_sum": torch.tensor([0.1, -0.1])}),
        ("exp_threshold_scale", {"denominator": "exp_threshold", "exp_threshold_scale": -1.0}),
    ],
)
def test_what_is_missing_or_negative_is_named(field: str, arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"^{field}: "):
        Compensation(**arguments)


@pytest.mark.parametrize("denominator", ["offline", "exp_threshold"])
def test_what_does_not_broadcast_is_named(denominator: str) -> None:
    quantity = torch.ones(5)
    field = {"offline": "offline_sum", "exp_threshold": "exp_threshold_scale"}[denominator]
    with pytest.raises(ValueError, match=f"^{field}: shape \\[5\\] does not broadcast"):
        attend(*inputs(), 0.5, Compensation(denominator, True, quantity, quantity))
