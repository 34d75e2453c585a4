"""The kernel, fed a whole text at once, does what the reference does with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.kernels.decode_case import DEVICE, RUNS_HERE, WHY_NOT
from tests.store_factory import make_store
from vllm_toptheta.calibration.override import AttentionCall
from vllm_toptheta.errors import BenchmarkError
from vllm_toptheta.evaluation.sparse import SparseAttention
from vllm_toptheta.evaluation.sparse_override import ReadCounts, SparseOverride
from vllm_toptheta.evaluation.variants import Variant, store_of
from vllm_toptheta.limits import NUM_ANCHORS

pytestmark = [
    pytest.mark.skipif(not RUNS_HERE, reason=WHY_NOT),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),
]

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE = 3, 1, 64
TARGET_K = 8


@pytest.mark.parametrize(
    ("target", "seq_len", "longest_dense"), [(f"k:{TARGET_K}", 40, TARGET_K), ("floor:2", 150, NUM_ANCHORS)]
)
@pytest.mark.parametrize("layer", [0, 1])
def test_a_whole_text_on_the_kernel(target: str, seq_len: int, longest_dense: int, layer: int, tmp_path: Path) -> None:
    from vllm_toptheta.benchmarks.quality import KernelOverride, served_thresholds

    torch.manual_seed(0)
    query, key, value = (
        torch.randn(seq_len, heads, HEAD_SIZE).half().to(DEVICE) for heads in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)
    )
    # lengths are clamped from 30 on; layer 0 is dense
    stored = make_store(
        tmp_path / "store",
        coefficients=[0.2, 0.1, 0.0],
        num_layers=2,
        num_heads=NUM_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        head_size=HEAD_SIZE,
        target_ks=(TARGET_K,),
        max_length=30,
    )
    variant = Variant(target=target, dense_layers=(0,))
    store = store_of(variant, {"": stored})
    attention = SparseAttention(variant, store, max_length=seq_len, device=DEVICE)
    counts = ReadCounts(seq_len, device=DEVICE)
    reference = SparseOverride(attention, counts=counts)
    kernel = KernelOverride(served_thresholds(variant, store), dense_layers=[0])
    call = AttentionCall(layer, query, key, value, softmax_scale=HEAD_SIZE**-0.5)
    expected, actual = reference.attend(call), kernel.attend(call)
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0, atol=3e-3)
    if layer == 0:
        assert kernel.rows_cached == 0
    else:
        # pages that are not full yet count as read on the kernel
        assert counts.value_rows_share < kernel.rows_share < 1
        assert kernel.rows_cached == NUM_KV_HEADS * sum(range(longest_dense + 1, seq_len + 1))


def test_a_floor_of_zero_is_refused() -> None:
    from vllm_toptheta.benchmarks.quality import served_thresholds

    with pytest.raises(BenchmarkError, match="floors above 0"):
        served_thresholds(Variant(target="floor:0"), None)
