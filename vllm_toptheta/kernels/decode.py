"""Top-Theta attention of one new token per sequence over the paged KV cache, on the GPU.

`decode` launches `split_kernel` and `merge_kernel`; what they count goes into `DecodeCounters`, what they need as
scratch memory comes from a `DecodeWorkspace`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_toptheta.kernels.arguments import expect
from vllm_toptheta.kernels.launch import (
    TRITON_DTYPES,
    launch_merge,
    launch_options,
    schedule_arguments,
    schedule_unit,
    split_arguments,
    step_arguments,
)
from vllm_toptheta.kernels.rules import RULE_FIELDS
from vllm_toptheta.kernels.split import split_kernel
from vllm_toptheta.kernels.survivors import LIST_DEPTH
from vllm_toptheta.kernels.tiles import ROW_ALIGNMENT
from vllm_toptheta.kernels.tuning import LaunchConfig, has_dependent_launch, launch_config, num_multiprocessors
from vllm_toptheta.limits import HEAD_SIZES, MAX_QUERIES_PER_KV, NUM_LOST_MASS_BUCKETS

FLOAT8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class DecodeCounters:
    """What decoding read and lost since the buffers were zeroed; the kernels add to them.

    Attributes:
        rows_read: [num_kv_heads] int64, value rows fetched; a sequence's open page counts as read.
        lost_mass: [num_heads] float64, sum over tokens at level 0 of the softmax mass of the keys that did not survive.
        lost_mass_histogram: [num_heads, num_buckets] int64, tokens at level 0 not kept dense by their lost mass: bucket
            num_buckets - 1 - i holds what lies in (2^-(i + 1), 2^-i], and bucket 0 also everything below.
        totals: [5] int64: tokens decoded, those among them at level 0 and kept dense, cached rows summed over tokens,
            steps that decoded, tokens at other levels.
    """

    rows_read: torch.Tensor
    lost_mass: torch.Tensor
    lost_mass_histogram: torch.Tensor
    totals: torch.Tensor

    @classmethod
    def allocate(cls, num_heads: int, num_kv_heads: int, device: torch.device | str) -> DecodeCounters:
        """Zeroed counters of a layer."""
        return cls(
            rows_read=torch.zeros(num_kv_heads, dtype=torch.int64, device=device),
            lost_mass=torch.zeros(num_heads, dtype=torch.float64, device=device),
            lost_mass_histogram=torch.zeros(num_heads, NUM_LOST_MASS_BUCKETS, dtype=torch.int64, device=device),
            totals=torch.zeros(5, dtype=torch.int64, device=device),
        )

    def zero_(self) -> None:
        """Start counting anew."""
        for buffer in (self.rows_read, self.lost_mass, self.lost_mass_histogram, self.totals):
            buffer.zero_()


@dataclass(frozen=True)
class DecodeWorkspace:
    """Scratch memory of a `decode` call; what it holds before and after means nothing. See `split_kernel`.

    One workspace serves any number of layers, one after the other, and any batch of at most the sequences that it was
    made for.
    """

    survivors: torch.Tensor
    order: torch.Tensor
    partial_output: torch.Tensor
    partial_stats: torch.Tensor

    @staticmethod
    def spec(
        max_num_seqs: int, num_heads: int, num_kv_heads: int, head_size: int, config: LaunchConfig, num_sms: int
    ) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        """Shape and dtype of each tensor, in the order of the fields."""
        group = num_heads // num_kv_heads
        num_programs = config.num_programs(num_kv_heads, num_sms)
        num_lists, num_pieces = num_programs * num_kv_heads, (num_programs + max_num_seqs) * num_kv_heads
        return (
            ((num_lists, LIST_DEPTH, config.tile, group + 1), torch.int32),
            ((num_lists, 2, LIST_DEPTH * config.tile), torch.int32),
            ((num_pieces, group, head_size), torch.float32),
            ((num_pieces, 3, group), torch.float32),
        )

    @classmethod
    def allocate(
        cls,
        max_num_seqs: int,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        *,
        kv_dtype: torch.dtype,
        device: torch.device | str,
        config: LaunchConfig | None = None,
    ) -> DecodeWorkspace:
        """A workspace for batches of at most `max_num_seqs` sequences."""
        config = config or launch_config(head_size, kv_dtype.itemsize, device)
        num_sms = num_multiprocessors(torch.device(device))
        spec = cls.spec(max_num_seqs, num_heads, num_kv_heads, head_size, config, num_sms)
        return cls(*(torch.empty(shape, dtype=dtype, device=device) for shape, dtype in spec))


def decode(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    output: torch.Tensor,
    workspace: DecodeWorkspace,
    coefficients: torch.Tensor,
    min_length: int,
    max_length: int,
    min_sparse_context: int,
    softmax_scale: float,
    rules: torch.Tensor | None = None,
    logits_soft_cap: float | None = None,
    q_scale: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    denominator_compensation: bool = True,
    value_sum: torch.Tensor | None = None,
    counters: DecodeCounters | None = None,
    config: LaunchConfig | None = None,
) -> None:
    """One new token per sequence: score every cached key, read only the value rows that some head of the group keeps.

    Two launches whose grids depend on shapes only; nothing is allocated and the host waits for nothing, so the call
    can be captured in a CUDA graph. Lengths are read on the device. A sequence of length 0 is padding, its output
    rows are zero. Bits of the output do not depend on what `workspace` held.

    Args:
        query: [num_seqs, num_heads, head_size] of the output's dtype or float8, last axis dense.
        kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size], keys in front of values on the last axis, which
            is dense; strides of blocks and tokens are multiples of 16 elements. Of the output's dtype, or
            float8_e4m3fn or float8_e5m2.
        block_table: [num_seqs, max_blocks] int32, physical block of each logical block, last axis dense; entries
            behind a sequence's end are not read.
        seq_lens: [num_seqs] int32, cached tokens of each sequence including the new one.
        output: [num_seqs, num_heads, head_size] bfloat16 or float16, the dtype of the products, last axis dense,
            written.
        workspace: For at least as many sequences, and for the same `config`.
        coefficients: [num_heads, degree + 1] float32, ascending powers of ln n: theta(n) in scaled logits. With
            `rules`, [num_levels, num_heads, degree + 1].
        min_length, max_length: Lengths to which n is clamped in theta(n), tokens; of no effect with `rules`.
        min_sparse_context: Sequences of at most that many tokens keep every key; of no effect with `rules`.
        softmax_scale: Factor on q . k.
        rules: [at least num_seqs, RULE_FIELDS] int32, contiguous, what each sequence is decoded by (`kernels.rules`);
            None if all are at level 0.
        logits_soft_cap: Cap c of c * tanh(s / c), or None.
        q_scale, k_scale, v_scale: One float32 each, factors on the query and on stored keys and values; None for 1.
        denominator_compensation: Sum the softmax denominator over all keys instead of the survivors.
        value_sum: [num_blocks, num_kv_heads, head_size] float32, last axis dense: running sums of the stored values of
            full pages (`kernels.pages`), for the value-mean compensation; None switches it off. The page that the
            new token fills is written.
        counters: Added to; None counts nothing.
        config: Launch parameters instead of the table's.

    Raises:
        ValueError: A shape, dtype or stride is not as described; the message starts with the argument's name.
    """
    num_seqs, num_heads, head_size = query.shape
    num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
    check_step(query, kv_cache, block_table, seq_lens, output, coefficients, rules, value_sum)
    if num_seqs == 0:
        return
    config = config or launch_config(head_size, kv_cache.element_size(), query.device)
    num_programs = config.num_programs(num_kv_heads, num_multiprocessors(query.device))
    if len(workspace.partial_stats) < (num_programs + num_seqs) * num_kv_heads:
        raise ValueError(f"workspace: made for fewer than {num_seqs} sequences, or for other launch parameters")
    early_merge = config.early_merge and has_dependent_launch(query.device)
    unit = schedule_unit(config.tile, block_size)
    step = step_arguments(
        query,
        kv_cache,
        block_table,
        seq_lens,
        partial_output=workspace.partial_output,
        partial_stats=workspace.partial_stats,
        min_sparse_context=min_sparse_context,
        rules=rules,
        value_sum=value_sum,
        counters=counters,
        unit=unit,
    )
    schedule = schedule_arguments(config, unit)
    split_kernel[(num_kv_heads, num_programs)](
        EARLY_MERGE=early_merge,
        **split_arguments(
            query,
            output=output,
            survivors=workspace.survivors,
            order=workspace.order,
            coefficients=coefficients,
            min_length=min_length,
            max_length=max_length,
            softmax_scale=softmax_scale,
            logits_soft_cap=logits_soft_cap,
            q_scale=q_scale,
            k_scale=k_scale,
            counters=counters,
            config=config,
        ),
        **step,
        **schedule,
        **launch_options(config.num_warps, config.max_registers),
    )
    launch_merge(
        step | schedule,
        output=output,
        value_sum=value_sum,
        v_scale=v_scale,
        counters=counters,
        denominator_compensation=denominator_compensation,
        num_programs=num_programs,
        num_warps=config.merge_warps,
        is_early=early_merge,
    )


def check_step(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    output: torch.Tensor,
    coefficients: torch.Tensor,
    rules: torch.Tensor | None,
    value_sum: torch.Tensor | None,
) -> None:
    """Raise a ValueError unless the tensors are as `decode` describes them."""
    num_seqs, num_heads, head_size = query.shape
    num_blocks, num_kv_heads, _, content = kv_cache.shape
    dtype = output.dtype
    if dtype not in TRITON_DTYPES:
        raise ValueError(f"output: dtype is {dtype}, expected bfloat16 or float16")
    if query.dtype not in (dtype, *FLOAT8_DTYPES):
        raise ValueError(f"query: dtype is {query.dtype}, expected {dtype} or float8")
    if head_size not in HEAD_SIZES:
        raise ValueError(f"query: head_size is {head_size}, expected one of {', '.join(map(str, HEAD_SIZES))}")
    if num_heads % num_kv_heads or num_heads // num_kv_heads > MAX_QUERIES_PER_KV:
        raise ValueError(
            f"query: {num_heads} heads over {num_kv_heads} kv heads, expected groups of 1 to {MAX_QUERIES_PER_KV}"
        )
    if kv_cache.dtype not in (dtype, *FLOAT8_DTYPES):
        raise ValueError(f"kv_cache: dtype is {kv_cache.dtype}, expected {dtype} or float8")
    if content != 2 * head_size:
        raise ValueError(f"kv_cache: last axis is {content}, expected {2 * head_size}")
    expect("block_table", block_table, (num_seqs, block_table.shape[1]), torch.int32)
    expect("seq_lens", seq_lens, (num_seqs,), torch.int32)
    expect("output", output, (num_seqs, num_heads, head_size), dtype)
    levels = () if rules is None else coefficients.shape[:1]
    expect("coefficients", coefficients, (*levels, num_heads, coefficients.shape[-1]), torch.float32)
    if rules is not None:
        expect("rules", rules, (max(num_seqs, len(rules)), RULE_FIELDS), torch.int32)
    for name, tensor in (("coefficients", coefficients), ("rules", rules)):
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name}: not contiguous")
    if value_sum is not None:
        expect("value_sum", value_sum, (num_blocks, num_kv_heads, head_size), torch.float32)
    if kv_cache.stride(0) % ROW_ALIGNMENT.value or kv_cache.stride(2) % ROW_ALIGNMENT.value:
        raise ValueError(
            f"kv_cache: strides of blocks and tokens are {kv_cache.stride(0)} and {kv_cache.stride(2)} elements, "
            f"expected multiples of {ROW_ALIGNMENT.value}"
        )
    for name, tensor in (("query", query), ("kv_cache", kv_cache)):
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name}: last axis has stride {tensor.stride(-1)}, expected 1")
