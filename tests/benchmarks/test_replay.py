"""The kernel reads the rows that a pattern keeps, and no others."""

from __future__ import annotations

import pytest
import torch

from tests.benchmarks.test_patterns import recorded
from tests.kernels.decode_case import DEVICE, RUNS_HERE, WHY_NOT
from vllm_toptheta.benchmarks.inputs import Anchors, Inputs
from vllm_toptheta.benchmarks.patterns import Batch
from vllm_toptheta.benchmarks.registry import toptheta
from vllm_toptheta.kernels.pages import padded_page_bytes

pytestmark = [
    pytest.mark.skipif(not RUNS_HERE, reason=WHY_NOT),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),
]


@pytest.mark.parametrize("anchors", ["followed", "scored", "none"])
def test_the_kernel_reads_what_a_pattern_keeps(anchors: Anchors) -> None:
    lens, num_kv_heads, group, head_size, block_size = [304, 290], 2, 2, 64, 16
    pages = [-(-length // block_size) for length in lens]
    width, content = 2 * head_size, num_kv_heads * block_size * 2 * head_size
    stride = padded_page_bytes(2 * content, num_kv_heads, head_size) // 2
    torch.manual_seed(0)
    memory = torch.randn((1 + sum(pages)) * stride, device=DEVICE).half()
    cache = memory.as_strided(
        (1 + sum(pages), num_kv_heads, block_size, width), (stride, width, num_kv_heads * width, 1)
    )
    table = torch.zeros(2, max(pages), dtype=torch.int32, device=DEVICE)
    for row, blocks in enumerate((torch.randperm(sum(pages)) + 1).int().split(pages)):
        table[row, : len(blocks)] = blocks
    inputs = Inputs(
        query=torch.randn(2, num_kv_heads * group, head_size, device=DEVICE).half(),
        kv_cache=cache,
        block_table=table,
        seq_lens=torch.tensor(lens, dtype=torch.int32, device=DEVICE),
        max_seq_len=max(lens),
        absolute=torch.zeros(num_kv_heads * group, 4, device=DEVICE),
        relative=torch.zeros(num_kv_heads * group, 4, device=DEVICE),
    )
    pattern = recorded((304, 290))
    kept = pattern.survivors(0, Batch(lens, num_kv_heads, group))
    replayed = inputs.replay(kept)
    replayed.write_tails()
    call, counters = toptheta(replayed, anchors=anchors)
    call()
    expected = [of_row.any(dim=1) for of_row in kept]
    for of_row, length in zip(expected, lens, strict=True):
        of_row[:, length // block_size * block_size :] = True  # pages that are not full count as read
    rows = sum(of_row.sum(dim=1) for of_row in expected)
    assert counters.value_rows_read.tolist() == rows.tolist()
    assert 0 < int(rows.sum()) < num_kv_heads * sum(lens) / 2
