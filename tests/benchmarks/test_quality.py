"""The kernel, fed a whole text at once, does what the reference does with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.kernels.decode_case import DEVICE, RUNS_HERE, WHY_NOT
from vllm_toptheta.evaluation.route import ReadCounts, TopThetaRoute
from vllm_toptheta.reference import FULL_COMPENSATION
from vllm_toptheta.store import ThresholdCurve

pytestmark = [
    pytest.mark.skipif(not RUNS_HERE, reason=WHY_NOT),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),
]

SEQ_LEN, NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, TARGET_K = 70, 6, 2, 64, 8


@pytest.mark.parametrize("layer", [0, 1])
def test_a_whole_text_on_the_kernel(layer: int) -> None:
    from vllm_toptheta.benchmarks.quality import KernelRoute

    torch.manual_seed(0)
    query, key, value = (
        torch.randn(SEQ_LEN, heads, HEAD_SIZE).half().to(DEVICE) for heads in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)
    )
    coefficients = np.array([0.2, 0.1], np.float32) + np.zeros((2, NUM_HEADS, 1), np.float32)
    curve = ThresholdCurve(TARGET_K, coefficients, TARGET_K + 1, 50)
    reference = TopThetaRoute(
        curve.threshold(np.arange(SEQ_LEN + 1)),
        target_k=TARGET_K,
        dense_layers=[0],
        placement="pre_softmax",
        compensation=FULL_COMPENSATION,
        counts=ReadCounts(SEQ_LEN),
    )
    kernel = KernelRoute(curve, dense_layers=[0])
    options = {"softmax_scale": HEAD_SIZE**-0.5, "soft_cap": None}
    expected = reference.attend(layer, query, key, value, **options)
    actual = kernel.attend(layer, query, key, value, **options)
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0, atol=3e-3)
    if layer == 0:
        assert kernel.rows_cached == 0
    else:
        # pages that are not full yet count as read on the kernel
        assert reference.counts.value_rows_share < kernel.rows_share < 1
        lengths = range(TARGET_K + 1, SEQ_LEN + 1)
        assert kernel.rows_cached == NUM_KV_HEADS * sum(lengths)
