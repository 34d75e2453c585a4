"""Running value sums in the page tails, for steps that fill any number of pages: prefill chunks, mixed batches.

A page's sum is its predecessor's sum plus its own rows, written by whichever step fills the page, never by adding one
token at a time. So a step repeated, or a token rejected and replaced, leaves the same sums, up to rounding.
`merge.merge_kernel` does the same for the page that a decoded token fills.

vLLM shares the pages of a prefix as soon as they are scheduled, so a sequence may stand on pages that another one fills
in the same step. Their sums cannot be read while they are written: it adds up their rows itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_toptheta.kernels.contract import LayerCache, TailStep
from vllm_toptheta.kernels.gpu.filled_pages import filled_pages
from vllm_toptheta.kernels.gpu.records import Tokens, next_power_of_2

TOKENS_PER_STEP = 128
SEQS_PER_STEP = 128
HEAD_SLICE = 64  # channels of a program


@triton.jit
def _first_unwritten_page(
    table, first_page, tokens, query_start_loc_ptr, num_seqs, stride_table_seq, BLOCK_SIZE: tl.constexpr,
    SEQS: tl.constexpr,
):  # fmt: skip
    """The first page of a sequence that any sequence fills in this step.

    Pages with equal blocks at one position have equal blocks in front of it, so the pages that others fill are those
    from the least position at which one of them begins on a block of this sequence.
    """
    unwritten = first_page
    for start in range(0, num_seqs, SEQS):
        other = start + tl.arange(0, SEQS)
        mask = other < num_seqs
        seq_lens = tl.load(tokens.seq_lens + other, mask=mask, other=0)
        starts = tl.load(query_start_loc_ptr + other, mask=mask, other=0)
        query_lens = tl.load(query_start_loc_ptr + other + 1, mask=mask, other=0) - starts
        page = tl.maximum(seq_lens - query_lens, 0) // BLOCK_SIZE
        mask &= (page < seq_lens // BLOCK_SIZE) & (page < first_page)
        theirs = tl.load(tokens.block_table + other.to(tl.int64) * stride_table_seq + page, mask=mask, other=-1)
        ours = tl.load(table + page, mask=mask, other=-2)
        unwritten = tl.minimum(unwritten, tl.min(tl.where(theirs == ours, page, first_page), axis=0))
    return unwritten


@triton.jit(do_not_specialize=("num_seqs", "stride_table_seq"))
def _write_value_sums_kernel(
    tokens,  # Tokens
    value_sum_ptr,  # [num_blocks, num_kv_heads, head_size] float32
    query_start_loc_ptr,  # [num_seqs + 1] int32
    stride_sum_block,
    stride_sum_head,
    num_seqs,
    stride_table_seq,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_PAD: tl.constexpr,
    SLICE: tl.constexpr,
    PAGES: tl.constexpr,
    SEQS: tl.constexpr,
):
    seq = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    first_page, end_page = filled_pages(tokens, query_start_loc_ptr, seq, BLOCK_SIZE)
    if first_page >= end_page:
        return

    offs_d = tl.program_id(2) * SLICE + tl.arange(0, SLICE)
    offs_b = tl.arange(0, BLOCK_PAD)
    mask_d = offs_d < HEAD_SIZE
    table = tokens.block_table + seq * stride_table_seq
    values = tokens.kv_cache + kv_head * tokens.stride_head + HEAD_SIZE
    sums = value_sum_ptr + kv_head * stride_sum_head + offs_d
    unwritten = _first_unwritten_page(
        table, first_page, tokens, query_start_loc_ptr, num_seqs, stride_table_seq, BLOCK_SIZE, SEQS
    )
    previous = tl.load(table + tl.maximum(unwritten - 1, 0)).to(tl.int64)
    running = tl.load(sums + previous * stride_sum_block, mask=mask_d, other=0.0)
    # a sequence's first page has no predecessor, and what was loaded for it may be anything
    running = tl.where(unwritten > 0, running, 0.0)
    for start in range(unwritten, end_page, PAGES):
        page = start + tl.arange(0, PAGES)
        mask_p = page < end_page
        block = tl.load(table + page, mask=mask_p, other=0).to(tl.int64)
        rows = tl.load(
            values
            + (block * tokens.stride_block)[:, None, None]
            + (offs_b * tokens.stride_token)[None, :, None]
            + offs_d[None, None, :],
            mask=mask_p[:, None, None] & (offs_b < BLOCK_SIZE)[None, :, None] & mask_d[None, None, :],
            other=0.0,
        )
        page_sums = tl.sum(rows.to(tl.float32), axis=1)
        tl.store(
            sums[None, :] + (block * stride_sum_block)[:, None],
            running[None, :] + tl.cumsum(page_sums, axis=0),
            mask=(mask_p & (page >= first_page))[:, None] & mask_d[None, :],
        )
        running += tl.sum(page_sums, axis=0)


def write_value_sums(step: TailStep, cache: LayerCache) -> None:
    """Write the running value sum of every page that this step's tokens fill; see `tails.write_tails`.

    The sums are of the stored values, without a scale.
    """
    kv_cache, value_sum = cache.kv_cache, cache.value_sum
    if value_sum is None:
        return
    _, num_kv_heads, block_size, content = kv_cache.shape
    head_size, num_seqs = content // 2, len(step.seq_lens)
    block_pad = next_power_of_2(block_size)
    _write_value_sums_kernel[(num_seqs, num_kv_heads, triton.cdiv(head_size, HEAD_SLICE))](
        Tokens.of(step, cache),
        value_sum,
        step.query_start_loc,
        value_sum.stride(0),
        value_sum.stride(1),
        num_seqs,
        step.block_table.stride(0),
        BLOCK_SIZE=block_size,
        HEAD_SIZE=head_size,
        BLOCK_PAD=block_pad,
        SLICE=HEAD_SLICE,
        PAGES=max(1, TOKENS_PER_STEP // block_pad),
        SEQS=SEQS_PER_STEP,
        num_warps=4,
    )
