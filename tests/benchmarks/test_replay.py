"""The kernel reads the rows that a pattern keeps, and no others."""

from __future__ import annotations

import pytest
import torch

from tests.benchmarks.test_patterns import recorded
from tests.kernels.decode_case import DEVICE, RUNS_HERE, WHY_NOT
from vllm_toptheta.benchmarks.inputs import Anchors, Inputs
from vllm_toptheta.benchmarks.patterns import Batch
from vllm_toptheta.benchmarks.registry import toptheta, toptheta_by_tiers
from vllm_toptheta.kernels.codec import tier_bytes
from vllm_toptheta.kernels.pages import padded_page_bytes

pytestmark = [
    pytest.mark.skipif(not RUNS_HERE, reason=WHY_NOT),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),
]


LENS, NUM_KV_HEADS, GROUP, HEAD_SIZE, BLOCK_SIZE = [304, 290], 2, 2, 64, 16


def random_inputs(code_bytes: int = 0, query_len: int = 1) -> Inputs:
    """A step on random pages, as `Inputs.random` makes them on GPUs."""
    pages = [-(-length // BLOCK_SIZE) for length in LENS]
    width, content = 2 * HEAD_SIZE, NUM_KV_HEADS * BLOCK_SIZE * 2 * HEAD_SIZE
    page_codes = NUM_KV_HEADS * BLOCK_SIZE * code_bytes
    stride = padded_page_bytes(2 * content, NUM_KV_HEADS, HEAD_SIZE, code_bytes=page_codes) // 2
    torch.manual_seed(0)
    memory = torch.randn((1 + sum(pages)) * stride, device=DEVICE).half()
    cache = memory.as_strided(
        (1 + sum(pages), NUM_KV_HEADS, BLOCK_SIZE, width), (stride, width, NUM_KV_HEADS * width, 1)
    )
    table = torch.zeros(2, max(pages), dtype=torch.int32, device=DEVICE)
    for row, blocks in enumerate((torch.randperm(sum(pages)) + 1).int().split(pages)):
        table[row, : len(blocks)] = blocks
    return Inputs(
        query=torch.randn(2 * query_len, NUM_KV_HEADS * GROUP, HEAD_SIZE, device=DEVICE).half(),
        kv_cache=cache,
        block_table=table,
        seq_lens=torch.tensor(LENS, dtype=torch.int32, device=DEVICE),
        max_seq_len=max(LENS),
        absolute=torch.zeros(NUM_KV_HEADS * GROUP, 4, device=DEVICE),
        relative=torch.zeros(NUM_KV_HEADS * GROUP, 4, device=DEVICE),
        query_len=query_len,
    )


def rows_of(kept: list[torch.Tensor]) -> torch.Tensor:
    """Value rows that are read where these survive, [num_kv_heads]."""
    expected = [of_row.any(dim=1) for of_row in kept]
    for of_row, length in zip(expected, LENS, strict=True):
        of_row[:, length // BLOCK_SIZE * BLOCK_SIZE :] = True  # pages that are not full count as read
    return torch.stack([of_row.sum(dim=1) for of_row in expected]).sum(dim=0)


@pytest.mark.parametrize("anchors", ["followed", "scored", "none"])
def test_the_kernel_reads_what_a_pattern_keeps(anchors: Anchors) -> None:
    kept = recorded((304, 290)).survivors(0, Batch(LENS, NUM_KV_HEADS, GROUP))
    replayed = random_inputs().replay(kept)
    replayed.write_tails()
    call, counters = toptheta(replayed, anchors=anchors)
    call()
    rows = rows_of(kept)
    assert counters.value_rows_read.tolist() == rows.tolist()
    assert 0 < int(rows.sum()) < NUM_KV_HEADS * sum(LENS) / 2


def test_so_it_does_for_several_new_tokens() -> None:
    kept = recorded((304, 290)).survivors(0, Batch(LENS, NUM_KV_HEADS, GROUP))
    # of the second sequence no anchor, so that its last keys are kept, by each new token its own and those before
    kept[1][..., :16] = kept[1][..., -131:] = False
    replayed = random_inputs(query_len=4).replay(kept)
    replayed.write_tails()
    call, counters = toptheta(replayed)
    call()
    kept[1][..., -4:] = True
    rows = rows_of(kept)
    # the first new token of the second sequence opens the page before
    rows += 290 // BLOCK_SIZE * BLOCK_SIZE - 287 // BLOCK_SIZE * BLOCK_SIZE
    # of the first one, the page before is open too
    rows += 16 - torch.stack([kept[0][head, :, 288:304].any(dim=0).sum() for head in range(NUM_KV_HEADS)])
    rows -= torch.stack([kept[1][head, :, 272:288].any(dim=0).sum() for head in range(NUM_KV_HEADS)])
    assert counters.value_rows_read.tolist() == rows.tolist()
    assert int(counters.totals[0]) == 8


@pytest.mark.parametrize("heavy_share", [0.0, 0.3, 1.0])
def test_by_tiers_it_reads_as_much_of_which_the_light_part_as_copies(heavy_share: float) -> None:
    kept = recorded((304, 290)).survivors(0, Batch(LENS, NUM_KV_HEADS, GROUP))
    replayed = random_inputs(tier_bytes(HEAD_SIZE)).replay(kept, heavy_share=heavy_share)
    call, counters = toptheta_by_tiers(replayed)
    call()
    assert counters.copies_read is not None
    assert (counters.value_rows_read + counters.copies_read).tolist() == rows_of(kept).tolist()
    assert bool(counters.copies_read.any()) == (heavy_share < 1.0)
