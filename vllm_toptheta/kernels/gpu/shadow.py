"""Top-Theta attention of one new token per sequence that reads most keys as shadows, on the GPU.

`decode_shadow` launches `query_kernel`, `shadow_split_kernel` and `merge_kernel`. It answers what `decode.decode` does,
but for two things: a key can be missed whose shadow scores more than the margin below its own score, and the softmax
denominator knows keys that were not read by their number instead of their scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from vllm_toptheta.kernels.arguments import expect
from vllm_toptheta.kernels.codec import ShadowProjection
from vllm_toptheta.kernels.gpu.codes import TOKENS_PER_STEP
from vllm_toptheta.kernels.gpu.launch import (
    launch_merge,
    launch_options,
    schedule_arguments,
    schedule_unit,
    split_arguments,
    step_arguments,
)
from vllm_toptheta.kernels.gpu.shadow_query import query_kernel
from vllm_toptheta.kernels.gpu.shadow_split import shadow_split_kernel
from vllm_toptheta.kernels.gpu.tuning import (
    LaunchConfig,
    ShadowConfig,
    has_dependent_launch,
    launch_config,
    num_multiprocessors,
)
from vllm_toptheta.kernels.gpu.values import DecodeCounters, DecodeWorkspace, check_step

MIN_ROW_BYTES = 32  # of a row of codes: the depth of a product of int8
MIN_COLUMNS = 8  # of a product on tensor cores
MIN_ROWS = 16


@dataclass(frozen=True)
class ShadowWorkspace:
    """Scratch memory of a `decode_shadow` call; what it holds before and after means nothing.

    One workspace serves any number of layers, one after the other, and any batch of at most the sequences that it was
    made for.
    """

    query_codes: torch.Tensor
    floors: torch.Tensor
    candidates: torch.Tensor
    order: torch.Tensor
    survivors: torch.Tensor
    survivor_order: torch.Tensor
    partial_output: torch.Tensor
    partial_stats: torch.Tensor

    @staticmethod
    def spec(
        max_num_seqs: int,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        code_bytes: int,
        config: ShadowConfig,
        exact_config: LaunchConfig,
        num_sms: int,
    ) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        """Shape and dtype of each tensor, in the order of the fields."""
        sizes = max_num_seqs, num_heads, num_kv_heads, head_size
        exact = DecodeWorkspace.spec(*sizes, exact_config, num_sms)
        num_lists = config.num_programs(num_kv_heads, num_sms) * num_kv_heads
        num_pieces = max(num_lists + max_num_seqs * num_kv_heads, exact[-1][0][0])
        return (
            ((max_num_seqs, num_heads, 2 * code_bytes), torch.int8),
            ((max_num_seqs, num_heads), torch.int32),
            ((num_lists, config.list_depth, config.tile), torch.int32),
            ((num_lists, config.list_depth * config.tile), torch.int32),
            *exact[:2],
            *(((num_pieces, *shape[1:]), dtype) for shape, dtype in exact[2:]),
        )

    @classmethod
    def allocate(
        cls,
        max_num_seqs: int,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        code_bytes: int,
        *,
        kv_dtype: torch.dtype,
        device: torch.device | str,
        config: ShadowConfig | None = None,
    ) -> ShadowWorkspace:
        """A workspace for batches of at most `max_num_seqs` sequences."""
        num_sms = num_multiprocessors(torch.device(device))
        exact_config = launch_config(head_size, kv_dtype.itemsize, device)
        sizes = max_num_seqs, num_heads, num_kv_heads, head_size, code_bytes
        spec = cls.spec(*sizes, config or ShadowConfig(), exact_config, num_sms)
        return cls(*(torch.empty(shape, dtype=dtype, device=device) for shape, dtype in spec))


def decode_shadow(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    codes: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    output: torch.Tensor,
    workspace: ShadowWorkspace,
    projection: ShadowProjection,
    coefficients: torch.Tensor,
    margin: torch.Tensor,
    log_scale: torch.Tensor,
    min_length: int,
    max_length: int,
    min_sparse_context: int,
    num_sink: int,
    num_recent: int,
    softmax_scale: float,
    rules: torch.Tensor | None = None,
    logits_soft_cap: float | None = None,
    q_scale: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    denominator_compensation: bool = True,
    value_sum: torch.Tensor | None = None,
    counters: DecodeCounters | None = None,
    keys_read: torch.Tensor | None = None,
    config: ShadowConfig | None = None,
) -> None:
    """One new token per sequence: score every shadow key, read the exact keys of candidates and survivors' value rows.

    A token is a candidate if its shadow reaches threshold minus margin for some head of the group, if it is one of the
    first `num_sink` or the last `num_recent`, or if it lies in the page of the new token. Candidates whose exact score
    reaches a head's threshold are its survivors. The others enter its softmax denominator by their scores, and keys
    that are no candidates as r(n) * exp(threshold) each, where n is the length of the sequence.

    A step of few tokens, or of short sequences, as `config` says, is faster if all keys are read: it is answered as by
    `decode.decode`.

    Three launches whose grids depend on shapes only; nothing is allocated and the host waits for nothing, so the call
    can be captured in a CUDA graph. Any number of candidates is right, however unlikely. A sequence of length 0 is
    padding, its output rows are zero. Bits of the output do not depend on what `workspace` held.

    Args:
        query, kv_cache, block_table, seq_lens, output: As for `decode.decode`.
        codes: [num_blocks, num_kv_heads, block_size, code_bytes] uint8, pages of a head dense (`pages.codes_view`), of
            all full pages (`shadow_codes.write_codes`). Those of a page that the new token fills are written.
        workspace: For at least as many sequences, and for the same `config`.
        projection: Of the layer, what `codes` were written with.
        coefficients, min_length, max_length, min_sparse_context, softmax_scale, rules, logits_soft_cap, q_scale,
        k_scale, v_scale, value_sum, counters: As for `decode.decode`; the lost mass that is counted is an estimate as
        far as it lies in keys that were not read.
        margin: [num_heads] float32, contiguous, scaled logits, after the soft cap if there is one. With `rules`,
            [num_levels, num_heads].
        log_scale: [num_heads, 2] float32, contiguous: ln r = c_0 + c_1 ln n, n clamped as for theta(n). With `rules`,
            [num_levels, num_heads, 2].
        num_sink, num_recent: Tokens at either end that are always candidates.
        denominator_compensation: Whether discarded keys enter the softmax denominator.
        keys_read: [num_kv_heads] int64, exact keys fetched are added to it; None together with `counters`.
        config: Launch parameters instead of the defaults.

    Raises:
        ValueError: A shape, dtype or stride is not as described; the message starts with the argument's name.
    """
    num_seqs, num_heads, head_size = query.shape
    num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
    code_bytes, group = projection.code_bytes, num_heads // num_kv_heads
    check_step(query, kv_cache, block_table, seq_lens, output, coefficients, rules, value_sum)
    expect("codes", codes, (num_blocks, num_kv_heads, block_size, code_bytes), torch.uint8)
    levels = () if rules is None else coefficients.shape[:1]
    expect("margin", margin, (*levels, num_heads), torch.float32)
    expect("log_scale", log_scale, (*levels, num_heads, 2), torch.float32)
    for name, tensor in (("margin", margin), ("log_scale", log_scale)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: not contiguous")
    if tuple(projection.encoder.shape[:2]) != (num_kv_heads, head_size):
        raise ValueError(f"projection: of {list(projection.encoder.shape[:2])}, expected {[num_kv_heads, head_size]}")
    row_tokens = max(1, MIN_ROW_BYTES // code_bytes)
    if codes.stride(2) != code_bytes or codes.stride(0) % 16 or codes.data_ptr() % 16:
        raise ValueError(f"codes: strides {codes.stride()}, expected dense tokens and blocks at multiples of 16 bytes")
    if block_size % row_tokens:
        raise ValueError(f"codes: pages of {block_size} tokens, expected a multiple of {row_tokens}")
    if (counters is None) != (keys_read is None):
        raise ValueError("keys_read: comes with counters, or not at all")
    if keys_read is not None:
        expect("keys_read", keys_read, (num_kv_heads,), torch.int64)
    if num_seqs == 0:
        return
    config = config or ShadowConfig()
    exact_config = launch_config(head_size, kv_cache.element_size(), query.device)
    num_sms = num_multiprocessors(query.device)
    num_programs = config.num_programs(num_kv_heads, num_sms)
    num_exact_programs = exact_config.num_programs(num_kv_heads, num_sms)
    num_pieces = (max(num_programs, num_exact_programs) + num_seqs) * num_kv_heads
    if len(workspace.partial_stats) < num_pieces or len(workspace.floors) < num_seqs:
        raise ValueError(f"workspace: made for fewer than {num_seqs} sequences, or for other launch parameters")
    early = config.early_launch and has_dependent_launch(query.device)
    columns = MIN_ROWS if config.heads_first else MIN_COLUMNS
    # pages, if the tiles of either kernel consist of them
    unit = max(schedule_unit(tile, block_size) for tile in (config.tile, exact_config.tile))
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
    exact = split_arguments(
        query,
        output=output,
        survivors=workspace.survivors,
        order=workspace.survivor_order,
        coefficients=coefficients,
        min_length=min_length,
        max_length=max_length,
        softmax_scale=softmax_scale,
        logits_soft_cap=logits_soft_cap,
        q_scale=q_scale,
        k_scale=k_scale,
        counters=counters,
        config=exact_config,
    )
    exact_schedule = schedule_arguments(exact_config, unit)
    shadows: dict[str, Any] = {
        "query_codes_ptr": workspace.query_codes,
        "floors_ptr": workspace.floors,
        "codes_ptr": codes,
        "keys_read_ptr": keys_read,
        "stride_code_block": codes.stride(0),
        "stride_code_head": codes.stride(1),
        "few_tokens": config.few_tokens * num_programs,
        "short_length": config.short_length,
        "CODE_BYTES": code_bytes,
        "EARLY_SPLIT": early,
    }
    query_kernel[(num_kv_heads, num_exact_programs)](
        margin_ptr=margin,
        decoder_ptr=projection.decoder,
        key_mean_ptr=projection.key_mean,
        encoder_ptr=projection.encoder,
        code_offset_ptr=projection.code_offset,
        TOKENS=min(TOKENS_PER_STEP, triton.next_power_of_2(block_size)),
        **exact,
        **exact_schedule,
        **shadows,
        **step,
        **launch_options(exact_config.num_warps, exact_config.max_registers),
    )
    schedule = {"MIN_WORK": max(1, config.min_work * config.tile // unit), "DENSE_WORK": config.dense_work}
    scan: dict[str, Any] = {
        "list_ptr": workspace.candidates,
        "order_ptr": workspace.order,
        "G_PAD": max(config.min_group, triton.next_power_of_2(group)),
        "TILE": config.tile,
        "DENSE_TILE": config.dense_tile,
        "CHUNK_TILES": config.chunk_tiles,
        "LIST_DEPTH": config.list_depth,
        "SCAN_STAGES": config.scan_stages,
        "DENSE_STAGES": config.dense_stages,
    }
    both = {name: value for name, value in exact.items() if name not in (*scan, "GATHER_STAGES", "IN_PLACE")}
    shadow_split_kernel[(num_kv_heads, num_programs)](
        log_scale_ptr=log_scale,
        num_sink=num_sink,
        num_recent=num_recent,
        ROW_TOKENS=row_tokens,
        COLUMN_HEADS=max(triton.next_power_of_2(group), columns // row_tokens),
        WALK_TILE=config.walk_tile,
        WALK_STAGES=config.walk_stages,
        FLOAT=config.product == "float16",
        HEADS_FIRST=config.heads_first,
        ALL_VALUES=config.all_values,
        ON_GPU=query.is_cuda,
        EARLY_MERGE=early,
        **scan,
        **both,
        **schedule,
        **shadows,
        **step,
        **launch_options(config.num_warps, config.max_registers, is_early=early),
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
        is_early=early,
        choice={
            "few_tokens": shadows["few_tokens"],
            "num_exact_programs": num_exact_programs,
            "short_length": config.short_length,
            "EXACT_MIN_WORK": exact_schedule["MIN_WORK"],
            "EXACT_DENSE_WORK": exact_schedule["DENSE_WORK"],
        },
    )
