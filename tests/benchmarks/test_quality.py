"""The kernel, fed a whole text at once, does what the reference does with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.kernels.decode_case import DEVICE, RUNS_HERE, WHY_NOT
from tests.store_factory import make_store
from vllm_toptheta.evaluation.route import ReadCounts, SparseRoute
from vllm_toptheta.evaluation.sparse import SparseAttention
from vllm_toptheta.evaluation.variants import Variant
from vllm_toptheta.selection import ServedThresholds

pytestmark = [
    pytest.mark.skipif(not RUNS_HERE, reason=WHY_NOT),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),
]

SEQ_LEN, NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, TARGET_K = 40, 6, 2, 64, 8


@pytest.mark.parametrize("layer", [0, 1])
def test_a_whole_text_on_the_kernel(layer: int, tmp_path: Path) -> None:
    from vllm_toptheta.benchmarks.quality import KernelRoute

    torch.manual_seed(0)
    query, key, value = (
        torch.randn(SEQ_LEN, heads, HEAD_SIZE).half().to(DEVICE) for heads in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)
    )
    # lengths are clamped from 30 on; layer 0 is dense
    store = make_store(
        tmp_path / "store",
        coefficients=[0.2, 0.1, 0.0],
        num_layers=2,
        num_heads=NUM_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        head_size=HEAD_SIZE,
        target_ks=(TARGET_K,),
        max_length=30,
    )
    variant = Variant(target=f"k:{TARGET_K}")
    attention = SparseAttention(variant, store, max_length=SEQ_LEN, device=DEVICE)
    reference = SparseRoute(attention, counts=ReadCounts(SEQ_LEN, device=DEVICE))
    kernel = KernelRoute(ServedThresholds.calibrated(store.curve(TARGET_K)), dense_layers=[0])
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
