import pytest
import torch

from vllm_toptheta.calibration.override import AttentionCall
from vllm_toptheta.errors import EvaluationError
from vllm_toptheta.evaluation import Variant
from vllm_toptheta.evaluation.sparse import SparseAttention
from vllm_toptheta.limits import NUM_ANCHORS
from vllm_toptheta.reference import causal_scores, dense_attention, relative_threshold, top_theta_attention


@pytest.mark.parametrize(("num_rows", "seq_len"), [(1, 400), (30, 400), (400, 400), (8, 150), (10, 12)])
@pytest.mark.parametrize("soft_cap", [None, 5.0])
@pytest.mark.parametrize("sinks", [None, torch.linspace(-2.0, 5.0, 4)], ids=["without sinks", "with sinks"])
def test_relative_thresholds_are_those_of_the_reference(
    num_rows: int, seq_len: int, soft_cap: float | None, sinks: torch.Tensor | None
) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(n, h, 16) for n, h in ((num_rows, 4), (seq_len, 2), (seq_len, 2)))
    attention = SparseAttention(Variant(target="floor:2.5"), max_length=seq_len)
    call = AttentionCall(0, query, key, value, softmax_scale=1.0, soft_cap=soft_cap, sinks=sinks)
    result = attention.attend(call, num_prompt_tokens=seq_len - num_rows)
    scores = causal_scores(query, key, softmax_scale=1.0, logits_soft_cap=soft_cap)
    expected = top_theta_attention(
        query,
        key,
        value,
        threshold=relative_threshold(scores, torch.arange(seq_len - num_rows + 1, seq_len + 1), 2.5, sinks=sinks),
        target_k=NUM_ANCHORS,
        softmax_scale=1.0,
        logits_soft_cap=soft_cap,
        sinks=sinks,
    )
    torch.testing.assert_close(result.output, expected.output)
    assert torch.equal(result.survivors, expected.survivors)
    dense = dense_attention(query, key, value, softmax_scale=1.0, logits_soft_cap=soft_cap, sinks=sinks)
    assert torch.equal(result.output, dense.output) == (seq_len <= NUM_ANCHORS)


def test_calibrated_terms_need_calibrated_thresholds() -> None:
    with pytest.raises(EvaluationError, match="compensations: offline needs what only calibrated thresholds have"):
        SparseAttention(Variant(target="floor:3", compensation="offline"), max_length=10)
