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
from vllm_toptheta.kernels.decode import (
    MIN_BLOCK_SIZE,
    TRITON_DTYPES,
    DecodeCounters,
    check_step,
    launch_merge,
    sequence_block,
)
from vllm_toptheta.kernels.projection import ShadowProjection
from vllm_toptheta.kernels.shadow_codes import TOKENS_PER_STEP
from vllm_toptheta.kernels.shadow_query import query_kernel
from vllm_toptheta.kernels.shadow_split import MIN_ROW_BYTES, shadow_split_kernel
from vllm_toptheta.kernels.tuning import ShadowConfig, has_dependent_launch, num_multiprocessors

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
        num_sms: int,
    ) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        """Shape and dtype of each tensor, in the order of the fields."""
        group = num_heads // num_kv_heads
        num_programs = config.num_programs(num_kv_heads, num_sms)
        num_lists, num_pieces = num_programs * num_kv_heads, (num_programs + max_num_seqs) * num_kv_heads
        return (
            ((max_num_seqs, num_heads, 2 * code_bytes), torch.int8),
            ((max_num_seqs, num_heads), torch.int32),
            ((num_lists, config.list_depth, config.tile), torch.int32),
            ((num_lists, config.list_depth * config.tile), torch.int32),
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
        code_bytes: int,
        *,
        device: torch.device | str,
        config: ShadowConfig | None = None,
    ) -> ShadowWorkspace:
        """A workspace for batches of at most `max_num_seqs` sequences."""
        num_sms = num_multiprocessors(torch.device(device))
        sizes = max_num_seqs, num_heads, num_kv_heads, head_size, code_bytes
        spec = cls.spec(*sizes, config or ShadowConfig(), num_sms)
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
    num_programs = config.num_programs(num_kv_heads, num_multiprocessors(query.device))
    if len(workspace.partial_stats) < (num_programs + num_seqs) * num_kv_heads or len(workspace.floors) < num_seqs:
        raise ValueError(f"workspace: made for fewer than {num_seqs} sequences, or for other launch parameters")
    early = config.early_launch and has_dependent_launch(query.device)
    columns = MIN_ROWS if config.heads_first else MIN_COLUMNS
    # pieces begin at page boundaries where pages fill a tile, because then block numbers are loaded page by page
    unit = block_size if config.tile % block_size == 0 else MIN_BLOCK_SIZE
    shared: dict[str, Any] = {
        "block_table_ptr": block_table,
        "seq_lens_ptr": seq_lens,
        "rules_ptr": rules,
        "kv_cache_ptr": kv_cache,
        "stride_kv_block": kv_cache.stride(0),
        "stride_kv_head": kv_cache.stride(1),
        "stride_kv_token": kv_cache.stride(2),
        "stride_table_seq": block_table.stride(0),
        "BLOCK_SIZE": block_size,
        "HEAD_SIZE": head_size,
        "GROUP": group,
        "D_PAD": triton.next_power_of_2(head_size),
    }
    scores: dict[str, Any] = {
        "query_ptr": query,
        "query_codes_ptr": workspace.query_codes,
        "floors_ptr": workspace.floors,
        "codes_ptr": codes,
        "coefficients_ptr": coefficients,
        "q_scale_ptr": q_scale,
        "k_scale_ptr": k_scale,
        "stride_query_seq": query.stride(0),
        "stride_query_head": query.stride(1),
        "stride_code_block": codes.stride(0),
        "stride_code_head": codes.stride(1),
        "min_length": min_length,
        "max_length": max_length,
        "softmax_scale": softmax_scale,
        "soft_cap": logits_soft_cap or 0.0,
        "NUM_COEFFICIENTS": coefficients.shape[-1],
        "CODE_BYTES": code_bytes,
        "SOFT_CAP": logits_soft_cap is not None,
        "HAS_Q_SCALE": q_scale is not None,
        "HAS_K_SCALE": k_scale is not None,
        "EARLY_SPLIT": early,
    }
    pieces: dict[str, Any] = {
        "partial_output_ptr": workspace.partial_output,
        "partial_stats_ptr": workspace.partial_stats,
        "num_seqs": num_seqs,
        "min_sparse_context": min_sparse_context,
        "UNIT": unit,
        "MIN_WORK": max(1, config.min_work * config.tile // unit),
        "SEQ_BLOCK": sequence_block(num_seqs),
        "DENSE_WORK": config.dense_work,
        "VALUE_MEAN": value_sum is not None,
        "COUNT": counters is not None,
        "EARLY_MERGE": early,
    }
    query_kernel[(num_seqs, num_kv_heads)](
        margin_ptr=margin,
        decoder_ptr=projection.decoder,
        key_mean_ptr=projection.key_mean,
        encoder_ptr=projection.encoder,
        code_offset_ptr=projection.code_offset,
        TOKENS=min(TOKENS_PER_STEP, triton.next_power_of_2(block_size)),
        num_warps=4,
        **scores,
        **shared,
    )
    shadow_split_kernel[(num_kv_heads, num_programs)](
        log_scale_ptr=log_scale,
        list_ptr=workspace.candidates,
        order_ptr=workspace.order,
        keys_read_ptr=keys_read,
        rows_read_ptr=None if counters is None else counters.rows_read,
        num_sink=num_sink,
        num_recent=num_recent,
        G_PAD=max(config.min_group, triton.next_power_of_2(group)),
        ROW_TOKENS=row_tokens,
        COLUMN_HEADS=max(triton.next_power_of_2(group), columns // row_tokens),
        TILE=config.tile,
        DENSE_TILE=config.dense_tile,
        CHUNK_TILES=config.chunk_tiles,
        LIST_DEPTH=config.list_depth,
        WALK_TILE=config.walk_tile,
        SCAN_STAGES=config.scan_stages,
        WALK_STAGES=config.walk_stages,
        DENSE_STAGES=config.dense_stages,
        COMPUTE=TRITON_DTYPES[output.dtype],
        FLOAT=config.product == "float16",
        HEADS_FIRST=config.heads_first,
        ALL_VALUES=config.all_values,
        ON_GPU=query.is_cuda,
        num_warps=config.num_warps,
        **({"maxnreg": config.max_registers} if config.max_registers else {}),
        **({"launch_pdl": True} if early else {}),
        **scores,
        **pieces,
        **shared,
    )
    launch_merge(
        pieces | shared,
        output=output,
        value_sum=value_sum,
        v_scale=v_scale,
        counters=counters,
        denominator_compensation=denominator_compensation,
        num_programs=num_programs,
        num_warps=config.merge_warps,
    )
