"""Top-Theta attention over a paged KV cache: every sequence is gathered and given to the contiguous form.

Only the first seq_len slots of a sequence are read, so what unwritten slots and unused pages hold, NaN included,
changes nothing. The cache may have any strides.
"""

from typing import NotRequired, TypedDict, Unpack

import torch
from torch import Tensor

from vllm_toptheta.reference.attention import AttentionResult, Placement, top_theta_attention
from vllm_toptheta.reference.compensation import FULL_COMPENSATION, Compensation
from vllm_toptheta.reference.thresholds import Phase, per_row

__all__ = ["gather_sequence", "paged_top_theta_attention"]


def gather_sequence(kv_cache: Tensor, block_row: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
    """Returns the contiguous keys and values of one sequence.

    Args:
        kv_cache: `[num_blocks, num_kv_heads, block_size, 2 * head_size]`, K then V of a token on the last axis.
        block_row: `[max_blocks]` int, the blocks of the sequence in order; entries past its last block are not read.
        seq_len: tokens of the sequence that are in the cache.

    Returns:
        key and value, each `[seq_len, num_kv_heads, head_size]` of the dtype of the cache.

    Raises:
        ValueError: the row has too few blocks for `seq_len`.
    """
    _, num_kv_heads, block_size, width = kv_cache.shape
    num_blocks = -(-seq_len // block_size)
    if num_blocks > block_row.shape[0]:
        raise ValueError(f"seq_lens: {seq_len} tokens need {num_blocks} blocks, the table has {block_row.shape[0]}")
    pages = kv_cache[block_row[:num_blocks].long()]
    tokens = pages.transpose(1, 2).reshape(num_blocks * block_size, num_kv_heads, width)[:seq_len]
    key, value = tokens.chunk(2, dim=-1)
    return key, value


class SequenceOptions(TypedDict):
    """Arguments of `attention.top_theta_attention` that are the same for all sequences of a batch."""

    target_k: int
    softmax_scale: float
    placement: NotRequired[Placement]
    cap_k: NotRequired[int | None]
    logits_soft_cap: NotRequired[float | None]
    phase: NotRequired[Phase]
    sinks: NotRequired[Tensor | None]


def paged_top_theta_attention(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    *,
    threshold: Tensor | float,
    compensation: Compensation = FULL_COMPENSATION,
    num_prompt_tokens: Tensor | None = None,
    **options: Unpack[SequenceOptions],
) -> AttentionResult:
    """`attention.top_theta_attention` for a batch of sequences in a paged cache.

    The query tokens of a sequence are its last positions, and their keys and values are in the cache already. A
    threshold of minus infinity is dense attention.

    Args:
        query: `[num_tokens, num_heads, head_size]` float, the tokens of all sequences one after the other.
        kv_cache: `[num_blocks, num_kv_heads, block_size, 2 * head_size]` float, K then V of a token on the last axis.
        block_table: `[num_seqs, max_blocks]` int.
        seq_lens: `[num_seqs]` int, tokens of each sequence in the cache, those of this call included.
        query_start_loc: `[num_seqs + 1]` int, where the tokens of each sequence start in `query`.
        threshold: theta, a number or a tensor that broadcasts to `[num_tokens, num_heads]`.
        compensation: what makes up for the discarded keys; its tensors broadcast to `[num_tokens, num_heads]`.
        num_prompt_tokens: `[num_seqs]` int, tokens of each sequence that are its prompt; None for no prompts.
        **options: the same for all sequences, as in the contiguous form; `target_k` and `softmax_scale` are required.

    Returns:
        The result over all tokens, without the survivor mask. Tokens of a sequence of length 0, and tokens that
        belong to no sequence, are padding: their rows are zero.

    Raises:
        ValueError: the arguments do not fit each other; the message starts with the name of one.
    """
    num_tokens, num_heads, head_size = query.shape
    if kv_cache.shape[-1] != 2 * head_size:
        raise ValueError(f"kv_cache: last axis is {kv_cache.shape[-1]}, head_size of query is {head_size}")
    dtype = torch.promote_types(torch.result_type(query, kv_cache), torch.float32)
    lost_mass = torch.zeros(num_tokens, num_heads, dtype=dtype, device=query.device)
    output = torch.zeros(query.shape, dtype=dtype, device=query.device)
    true_lost_mass = torch.zeros_like(lost_mass)
    num_survivors = torch.zeros_like(lost_mass, dtype=torch.int64)
    value_rows_read = num_survivors.new_zeros(num_tokens, kv_cache.shape[1])
    keys_read = torch.zeros_like(value_rows_read)

    thresholded = torch.zeros(num_tokens, dtype=torch.bool, device=query.device)

    theta = per_row("threshold", threshold, lost_mass)
    starts = query_start_loc.tolist()
    prompts = torch.zeros_like(seq_lens) if num_prompt_tokens is None else num_prompt_tokens
    for block_row, seq_len, prompt, start, stop in zip(
        block_table, seq_lens.tolist(), prompts.tolist(), starts[:-1], starts[1:], strict=True
    ):
        if seq_len == 0 or start == stop:
            continue
        tokens = slice(start, stop)
        key, value = gather_sequence(kv_cache, block_row, seq_len)
        result = top_theta_attention(
            query[tokens],
            key,
            value,
            threshold=theta[tokens],
            compensation=compensation.select_rows(tokens, lost_mass),
            num_prompt_tokens=prompt,
            **options,
        )
        output[tokens] = result.output
        num_survivors[tokens] = result.num_survivors
        value_rows_read[tokens] = result.value_rows_read
        keys_read[tokens] = result.keys_read
        lost_mass[tokens] = result.lost_mass
        true_lost_mass[tokens] = result.true_lost_mass
        thresholded[tokens] = result.thresholded
    return AttentionResult(
        output=output,
        num_survivors=num_survivors,
        value_rows_read=value_rows_read,
        keys_read=keys_read,
        lost_mass=lost_mass,
        true_lost_mass=true_lost_mass,
        thresholded=thresholded,
        survivors=None,
    )
