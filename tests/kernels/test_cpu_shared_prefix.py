"""Pages of sequences that stand on a prefix which another sequence computes in the same step."""

from __future__ import annotations

import pytest
import torch

from vllm_toptheta.kernels.contract import Layer, LayerCache, TailStep
from vllm_toptheta.kernels.cpu.batch import prepare_tails
from vllm_toptheta.kernels.cpu.cache import split_cache
from vllm_toptheta.kernels.cpu.tails import write_tails

BLOCK_SIZE, NUM_KV_HEADS, HEAD_SIZE = 4, 2, 8


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_a_prefix_computed_in_the_same_step(order: tuple[int, ...]) -> None:
    # vLLM shares blocks as soon as they are scheduled: 0 fills 3 and 5, 1 stands on them and fills 2, 2 on all of these
    tables = torch.tensor([[3, 5, 0, 0], [3, 5, 2, 0], [3, 5, 2, 6]])
    context_lens, seq_lens = torch.tensor([0, 8, 12]), torch.tensor([8, 12, 16])
    generator = torch.Generator().manual_seed(0)
    kv_cache = torch.randn(8, NUM_KV_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE, generator=generator)
    value_sum = torch.full((8, NUM_KV_HEADS, HEAD_SIZE), torch.nan)  # what stood there before is of another sequence
    rows = list(order)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), (seq_lens - context_lens)[rows].cumsum(0)])
    step = prepare_tails(TailStep(tables[rows], seq_lens[rows], starts, max_query_len=8), BLOCK_SIZE)
    write_tails(step, LayerCache(kv_cache, value_sum), Layer(1.0))
    _, values = split_cache(kv_cache)
    expected = values[[3, 5, 2, 6]].sum(dim=2).cumsum(dim=0)
    torch.testing.assert_close(value_sum[[3, 5, 2, 6]], expected)
