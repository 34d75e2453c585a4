"""What the kernels' arguments are bound together in; Triton takes named tuples as it takes their fields one by one.

Of integers Triton compiles in whether they are 1 or multiples of 16, which it can be told not to do for plain arguments
only: numbers that change from step to step are no fields. What is known when a kernel is compiled stands in records of
integers alone (`Shape`, `Schedule`, `Tiling`), each of which is one `tl.constexpr`: apart, they would be compared one
by one in every launch. Triton 3.6 takes a field of theirs for a constant everywhere but within a tuple, so a kernel
gives a name to what it makes tensors of.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from vllm_toptheta.kernels.contract import Counters, DecodeStep, LayerCache, LayerCall, ShadowLayer, TailStep, TierLayer


class Tokens(NamedTuple):
    """The sequences of a step and where their keys and values stand.

    Attributes:
        kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size].
        block_table: [num_seqs, max_blocks] int32.
        seq_lens: [num_seqs] int32.
        threshold_offset: [num_seqs] float32, or None.
        query_start_loc: [num_seqs + 1] int32, None where sequences have one new token each.
        stride_block, stride_head, stride_token: Of the cache, elements.
    """

    kv_cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    threshold_offset: torch.Tensor | None
    query_start_loc: torch.Tensor | None
    stride_block: int
    stride_head: int
    stride_token: int

    @classmethod
    def of(cls, step: DecodeStep | TailStep, cache: LayerCache) -> Tokens:
        """Those of a step in a layer's pages."""
        offset, starts = (step.threshold_offset, step.query_start_loc) if isinstance(step, DecodeStep) else (None, None)
        strides = cache.kv_cache.stride()
        return cls(cache.kv_cache, step.block_table, step.seq_lens, offset, starts, *strides[:3])


class Queries(NamedTuple):
    """Queries, and what makes scores and thresholds of them.

    Attributes:
        query: [num_tokens, num_heads, head_size].
        coefficients: [num_heads, NUM_COEFFICIENTS] float32.
        thresholds: [num_tokens, num_heads] float32, to be written before they are read.
        anchor_lse: The same, of the anchors' scores; None where nobody asks.
        sinks: [num_heads] float of any size, or None.
        q_scale, k_scale: [1] float32, or None.
        stride_seq, stride_head: Of the queries, elements.
        num_heads: Query heads.
        softmax_scale: Factor on q . k.
        logits_soft_cap: Of the scores, or None.
    """

    query: torch.Tensor
    coefficients: torch.Tensor
    thresholds: torch.Tensor
    anchor_lse: torch.Tensor | None
    sinks: torch.Tensor | None
    q_scale: torch.Tensor | None
    k_scale: torch.Tensor | None
    stride_seq: int
    stride_head: int
    num_heads: int
    softmax_scale: float
    logits_soft_cap: float | None

    @classmethod
    def of(cls, call: LayerCall, thresholds: torch.Tensor, anchor_lse: torch.Tensor | None = None) -> Queries:
        """Those of a call to a layer with thresholds, and scratch memory for what these are of its tokens."""
        layer, query = call.layer, call.query
        if layer.thresholds is None:
            raise ValueError("thresholds: None, and dense layers are not decoded here")
        return cls(
            query,
            layer.thresholds.coefficients,
            thresholds,
            anchor_lse,
            layer.sinks,
            call.q_scale,
            call.cache.k_scale,
            query.stride(0),
            query.stride(1),
            query.shape[1],
            layer.softmax_scale,
            layer.logits_soft_cap,
        )


class Lists(NamedTuple):
    """What a scan keeps for later: a list for every program and kv head.

    Attributes:
        entries: Of survivors [num_lists, LIST_DEPTH, TILE, GROUP + 1] int32, the bits of a score for each head and the
            position; of candidates [num_lists, LIST_DEPTH, TILE] int32, positions. Light keys are kept like survivors.
        order: Of survivors [num_lists, 2, LIST_DEPTH * TILE] int64, where entries of the list and the rows of their
            tokens start; of candidates [num_lists, LIST_DEPTH * TILE] int32, slots (block * block_size + offset); of
            light keys [num_lists, 2, LIST_DEPTH * TILE] int32, slots, and where entries of the list start.
    """

    entries: torch.Tensor
    order: torch.Tensor


class Pieces(NamedTuple):
    """What programs leave to the merge.

    Attributes:
        output: [num_pieces * num_kv_heads, GROUP, head_size] float32, weighted values.
        stats: [num_pieces * num_kv_heads, 3, GROUP] float32: maximum, kept sum, lost sum.
    """

    output: torch.Tensor
    stats: torch.Tensor


class Counts(NamedTuple):
    """What a step adds to, as of `contract.Counters`; None throughout if nothing is counted.

    Triton 3.6 cannot be asked whether a whole tuple is None, where it has a field that is.
    """

    value_rows_read: torch.Tensor | None = None
    keys_read: torch.Tensor | None = None
    lost_mass: torch.Tensor | None = None
    lost_mass_histogram: torch.Tensor | None = None
    totals: torch.Tensor | None = None
    copies_read: torch.Tensor | None = None

    @classmethod
    def of(cls, counters: Counters | None) -> Counts:
        """Those of a layer."""
        return cls() if counters is None else cls(*counters)


class Shadow(NamedTuple):
    """Shadow keys of a layer, and what a step compares them with.

    Attributes:
        codes: [num_blocks, num_kv_heads, block_size, CODE_BYTES] uint8.
        query_codes: [num_seqs, num_heads, 2 * CODE_BYTES] int8.
        floors: [num_seqs, num_heads] int32, thresholds minus margins in codes.
        encoder, code_offset, decoder, key_mean: As of `ShadowCodec`.
        margin: [num_heads] float32.
        log_unread_ratio: [num_heads, 2] float32.
        stride_block, stride_head: Of the codes, bytes.
    """

    codes: torch.Tensor
    query_codes: torch.Tensor | None
    floors: torch.Tensor | None
    encoder: torch.Tensor
    code_offset: torch.Tensor
    decoder: torch.Tensor
    key_mean: torch.Tensor
    margin: torch.Tensor
    log_unread_ratio: torch.Tensor
    stride_block: int
    stride_head: int

    @classmethod
    def of(
        cls,
        layer: ShadowLayer,
        codes: torch.Tensor,
        compared: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Shadow:
        """Those of a layer; without scratch memory for `query_codes` and `floors`, to be written only."""
        codec, (query_codes, floors) = layer.codec, compared or (None, None)
        return cls(
            codes,
            query_codes,
            floors,
            codec.encoder,
            codec.code_offset,
            codec.decoder,
            codec.key_mean,
            layer.margin,
            layer.log_unread_ratio,
            codes.stride(0),
            codes.stride(1),
        )


class Copies(NamedTuple):
    """Copies of a layer's keys and values, and what a step compares them with.

    Attributes:
        codes: [num_blocks, num_kv_heads, block_size, code_bytes] uint8, filled as `kernels.pages` says.
        steps: The same memory as float16.
        rotation: [head_size, head_size] float32.
        query_codes: [num_seqs, num_heads, head_size] int8.
        query_terms: [num_seqs, num_heads, 3] float32, scale, middle and offset: with the sum of products of codes and
            the step of a key, its score is offset + scale * step * (sum - middle).
        stride_block, stride_head: Of the codes, bytes.
    """

    codes: torch.Tensor
    steps: torch.Tensor
    rotation: torch.Tensor
    query_codes: torch.Tensor | None
    query_terms: torch.Tensor | None
    stride_block: int
    stride_head: int

    @classmethod
    def of(
        cls,
        layer: TierLayer,
        codes: torch.Tensor,
        compared: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Copies:
        """Those of a layer; without scratch memory for `query_codes` and `query_terms`, to be written only."""
        strides, (query_codes, query_terms) = codes.stride(), compared or (None, None)
        return cls(
            codes, codes.view(torch.float16), layer.codec.rotation, query_codes, query_terms, strides[0], strides[1]
        )


class Shape(NamedTuple):
    """A layer's sizes, and what is computed of it.

    Attributes:
        BLOCK_SIZE, HEAD_SIZE: Tokens of a page, channels of a head.
        GROUP: Queries of a sequence that share a kv head: its query heads, for each new token after the other.
        D_PAD: HEAD_SIZE up to a power of two.
        FLOAT16: Whether products are of float16 instead of bfloat16.
        RELATIVE: Whether thresholds follow the scores of anchors.
        VALUE_MEAN: Whether the lost mass is given to the mean value.
        CODE_BYTES: Bytes of a token's codes in a page's tail; 0 without.
        QUERY_LEN: New tokens of a sequence, at most.
    """

    BLOCK_SIZE: int
    HEAD_SIZE: int
    GROUP: int
    D_PAD: int
    FLOAT16: bool
    RELATIVE: bool
    VALUE_MEAN: bool
    CODE_BYTES: int
    QUERY_LEN: int = 1

    @classmethod
    def of(cls, call: LayerCall, max_query_len: int = 1) -> Shape:
        """Those of a call to a layer with thresholds."""
        _, num_heads, head_size = call.query.shape
        _, num_kv_heads, block_size, _ = call.cache.kv_cache.shape
        thresholds = call.layer.thresholds
        return cls(
            block_size,
            head_size,
            num_heads // num_kv_heads * max_query_len,
            next_power_of_2(head_size),
            call.output.dtype == torch.float16,
            thresholds is not None and thresholds.is_relative,
            call.cache.value_sum is not None,
            call.layer.code_bytes,
            max_query_len,
        )


class Schedule(NamedTuple):
    """How a step is shared out (`schedule.py`).

    Attributes:
        UNIT: Tokens of a unit of work.
        MIN_WORK: Units that are worth a program.
        DENSE_WORK: Work of a unit of a sequence that keeps everything.
        SEQ_BLOCK: Sequences that there is room for.
        PIECE_WORK: Units that a program does in the time that a piece takes beside them; 0 where that is not known.
    """

    UNIT: int
    MIN_WORK: int
    DENSE_WORK: int
    SEQ_BLOCK: int
    PIECE_WORK: int = 0


class Tiling(NamedTuple):
    """Sizes and depths of a program's loops; see `LaunchConfig`.

    Attributes:
        TILE, SCAN_STAGES: Of the scan.
        G_PAD: Columns that the group's heads are padded to.
        CHUNK_TILES, LIST_DEPTH: Of the lists.
        DENSE_TILE, DENSE_STAGES: Of the loop that keeps everything.
        GATHER_TILE, GATHER_STAGES: Of the gather of survivors, or the walk of candidates.
        ON_GPU: Whether threads store what they hold, by instructions that the interpreter does not know.
    """

    TILE: int
    SCAN_STAGES: int
    G_PAD: int
    CHUNK_TILES: int
    LIST_DEPTH: int
    DENSE_TILE: int
    DENSE_STAGES: int
    GATHER_TILE: int
    GATHER_STAGES: int
    ON_GPU: bool


def next_power_of_2(number: int) -> int:
    """The least power of two that is not below; Triton's own takes its time to be called on the host."""
    return 1 << (number - 1).bit_length()
