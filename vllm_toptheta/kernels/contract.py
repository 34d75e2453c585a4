"""What the backend hands to the kernels, and what they hand back: the same records on GPUs and on CPUs, in all modes.

    decode(step, call, scratch)        new tokens of sequences; writes `call.output` and adds to the layer's counters
    write_tails(step, cache, layer)    the tails of all pages that a step's tokens fill

`kernels.gpu` and `kernels.cpu` have both; on GPUs `decode` stands there three times: for mode `values`, and for mode
`shadow` with shadow keys and with copies of keys and values. A `DecodeStep` is made once for all layers, a `Layer` once
for all steps; a `LayerCall` brings the two together with this step's tensors.

A key survives whose score reaches

    theta(n) = a + b ln n + c (ln n)^2 + slope * anchor_lse + offset

with four coefficients a head. Calibrated thresholds have slope 0; relative ones have slope 1, b = -1 and
a = ln weight_floor (`reference.relative`). The offset is the sequence's own: 0 is the server's setting, and only such
sequences enter the statistics of what was lost; minus infinity keeps every key; with relative thresholds, it is ln of
how many times the server's weight floor was asked for.

Attention sinks, a logit for each head, are terms of anchor_lse and of the softmax denominator, and no lost mass.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from vllm_toptheta.kernels.codec import ShadowCodec, TierCodec
from vllm_toptheta.kernels.pages import codes_view, tail_row_view, value_sum_view
from vllm_toptheta.limits import MAX_QUERY_LEN, NUM_ANCHORS, NUM_FIRST_ANCHORS, NUM_LOST_MASS_BUCKETS

NUM_COEFFICIENTS = 4  # a, b, c, slope
NUM_TOTALS = 5
FLOAT8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


class DecodeStep(NamedTuple):
    """One step of the engine, for all layers.

    Attributes:
        block_table: [num_seqs, max_blocks] int32, physical block of each logical block, last axis dense; entries behind
            a sequence's end are not read.
        seq_lens: [num_seqs] int32, cached tokens of each sequence including new ones; 0 is padding, whose output rows
            are zero.
        max_dense_len: Sequences of at most that many tokens keep every key; at least the number of anchors where
            thresholds are relative.
        min_step_tokens: In a step of fewer tokens, over all its sequences, all keep every key.
        length_range: Lengths, in tokens, to which n is clamped in what is calibrated: r(n), and theta(n) where
            thresholds are not relative.
        threshold_offset: [at least num_seqs] float32, contiguous, scaled logits; None if all are 0.
        query_start_loc: [num_seqs + 1] int32, where the new tokens of each sequence start; None if each has one. More
            are drafts that are verified. GPUs take them in mode `values`; elsewhere each is a sequence of its own.
        max_query_len: New tokens of a sequence, at most; `MAX_QUERY_LEN` at most.
        prepared: `cpu.batch.Batch`, what CPUs work out once for all layers; None on GPUs.
    """

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    max_dense_len: int = 0
    min_step_tokens: int = 0
    length_range: tuple[int, int] = (1, 2**31 - 1)
    threshold_offset: torch.Tensor | None = None
    query_start_loc: torch.Tensor | None = None
    max_query_len: int = 1
    prepared: Any = None


class TailStep(NamedTuple):
    """One step of the engine whose tokens may fill any number of pages.

    Attributes:
        block_table, seq_lens: As of `DecodeStep`; all tokens of the step are counted.
        query_start_loc: [num_seqs + 1] int32, where the tokens of each sequence start in this step.
        max_query_len: About how many tokens a sequence has in this step, for the number of programs on GPUs.
        prepared: `cpu.batch.ClosedPages`, or None if no page becomes full; None on GPUs.
    """

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    max_query_len: int
    prepared: Any = None


class LayerThresholds(NamedTuple):
    """When a key survives in a layer.

    Attributes:
        coefficients: [num_heads, 4] float32, contiguous: a, b, c and slope, scaled logits. The guard moves a.
        is_relative: Whether a slope is not 0, so that anchors are scored.
    """

    coefficients: torch.Tensor
    is_relative: bool = False


class ShadowLayer(NamedTuple):
    """What a layer's shadow keys are, and how they are judged.

    Attributes:
        codec: What codes are written with.
        margin: [num_heads] float32, contiguous, scaled logits, after the soft cap if there is one: how far a shadow may
            fall below the threshold.
        log_unread_ratio: [num_heads, 2] float32, contiguous: ln r = c_0 + c_1 ln n.
    """

    codec: ShadowCodec
    margin: torch.Tensor
    log_unread_ratio: torch.Tensor


class TierLayer(NamedTuple):
    """What the copies of a layer's keys and values are, and which keys they are not enough for.

    Attributes:
        codec: What copies are written with.
        log_heavy: ln of what a key weighs at least that is read exactly, over what the anchors of its row, and its
            sink, weigh.
    """

    codec: TierCodec
    log_heavy: float


class Counters(NamedTuple):
    """What decoding read and lost in a layer since the buffers were zeroed; decoding adds to them.

    Attributes:
        value_rows_read: [num_kv_heads] int64, value rows fetched; a sequence's open page counts as read.
        keys_read: [num_kv_heads] int64, exact keys fetched; None in mode `values`, which fetches all.
        lost_mass: [num_heads] float64, softmax mass of the keys that did not survive, summed over tokens at offset 0.
        lost_mass_histogram: [num_heads, NUM_LOST_MASS_BUCKETS] int64, tokens at offset 0 not kept dense by their lost
            mass; bucket i holds what is at most `LOST_MASS_EDGES[i]` and above the edge before.
        totals: [5] int64: tokens decoded, those among them at offset 0 and kept dense, cached rows summed over tokens
            (those of one `DecodeStep` and sequence count them once, as they read them), steps that decoded, tokens at
            other offsets.
        copies_read: [num_kv_heads] int64, copies of values fetched; None where a layer has none.
    """

    value_rows_read: torch.Tensor
    keys_read: torch.Tensor | None
    lost_mass: torch.Tensor
    lost_mass_histogram: torch.Tensor
    totals: torch.Tensor
    copies_read: torch.Tensor | None = None

    @classmethod
    def allocate(
        cls,
        num_heads: int,
        num_kv_heads: int,
        device: torch.device | str = "cpu",
        *,
        counts_keys: bool = False,
        counts_copies: bool = False,
    ) -> Counters:
        """Zeroed counters of a layer."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            value_rows_read=zeros(num_kv_heads),
            keys_read=zeros(num_kv_heads) if counts_keys else None,
            lost_mass=zeros(num_heads, dtype=torch.float64),
            lost_mass_histogram=zeros(num_heads, NUM_LOST_MASS_BUCKETS),
            totals=zeros(NUM_TOTALS),
            copies_read=zeros(num_kv_heads) if counts_copies else None,
        )

    def zero_(self) -> None:
        """Start counting anew."""
        for buffer in self:
            if buffer is not None:
                buffer.zero_()


class Layer(NamedTuple):
    """A layer on one rank, fixed once it is bound.

    Attributes:
        softmax_scale: Factor on q . k.
        logits_soft_cap: Cap c of c * tanh(s / c), or None.
        sliding_window: Number of most recent keys that are seen, or None for all; only where there are no thresholds.
        denominator_compensation: Whether the softmax denominator is that of all keys instead of the survivors.
        value_mean_compensation: Whether the lost mass is given to the mean value.
        thresholds: None in a dense layer.
        shadow: None where keys are not screened by calibrated shadow keys.
        tiers: None where there are no copies of keys and values. A layer has one of the two, or, in mode `values`,
            neither.
        counters: None counts nothing.
        sinks: [num_heads] float of any size, contiguous: logits that softmax_scale and the soft cap do not apply to;
            None in a model without. The model's own parameter, so that weights loaded anew count.
        head_programs: [num_kv_heads] int32, the programs that each kv head has of all that a GPU's kernel in CUDA
            C++ is launched with, at least 1 (`gpu.balance`); None if each has as many.
    """

    softmax_scale: float
    logits_soft_cap: float | None = None
    sliding_window: int | None = None
    denominator_compensation: bool = True
    value_mean_compensation: bool = True
    thresholds: LayerThresholds | None = None
    shadow: ShadowLayer | None = None
    tiers: TierLayer | None = None
    counters: Counters | None = None
    sinks: torch.Tensor | None = None
    head_programs: torch.Tensor | None = None

    @property
    def code_bytes(self) -> int:
        """Bytes of a token's codes in a page's tail; 0 without."""
        part = self.shadow or self.tiers
        return 0 if part is None else part.codec.code_bytes


class LayerCache(NamedTuple):
    """A layer's pages and the views of their tails.

    Attributes:
        kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size]. On GPUs keys in front of values on the last
            axis, which is dense, strides of blocks and tokens multiples of 16 elements, and of the output's dtype or
            float8; CPUs fill a page as `cpu.cache.split_cache` says.
        value_sum: [num_blocks, num_kv_heads, head_size] float32, last axis dense: running sums of the stored values of
            full pages (`kernels.pages`); None without the value-mean compensation.
        codes: [num_blocks, num_kv_heads, block_size, code_bytes] uint8, pages of a head dense: shadow keys or copies of
            full pages (`kernels.pages`); None in mode `values`.
        k_scale, v_scale: One float32 each, factors on stored keys and values; None for 1.
    """

    kv_cache: torch.Tensor
    value_sum: torch.Tensor | None = None
    codes: torch.Tensor | None = None
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        kv_cache: torch.Tensor,
        layer: Layer,
        *,
        has_tail_row: bool = False,
        k_scale: torch.Tensor | None = None,
        v_scale: torch.Tensor | None = None,
    ) -> LayerCache:
        """The cache of a layer, with the tails that the layer has.

        Args:
            kv_cache: As above, or with a row behind each page's tokens.
            layer: The layer; without codes where there is such a row.
            has_tail_row: Whether there is.
            k_scale, v_scale: As above.

        Raises:
            ValueError: The pages have no room for them.
        """
        has_sums = layer.thresholds is not None and layer.value_mean_compensation
        if has_tail_row:
            sums = tail_row_view(kv_cache) if has_sums else None
            return cls(kv_cache[:, :, :-1], sums, None, k_scale, v_scale)
        return cls(
            kv_cache,
            value_sum_view(kv_cache) if has_sums else None,
            codes_view(kv_cache, layer.code_bytes) if layer.code_bytes else None,
            k_scale,
            v_scale,
        )


class LayerCall(NamedTuple):
    """A layer in a step.

    Attributes:
        query: [num_tokens, num_heads, head_size], last axis dense, of the output's dtype or float8; a token for each
            sequence, or as `DecodeStep.query_start_loc` says.
        output: The same shape, last axis dense, written. On GPUs bfloat16 or float16, the dtype of the products; on
            CPUs float32 too.
        cache: The layer's pages; on GPUs, decoding writes the tail of a page that its token fills.
        layer: The layer.
        q_scale: One float32, factor on the query; None for 1.
    """

    query: torch.Tensor
    output: torch.Tensor
    cache: LayerCache
    layer: Layer
    q_scale: torch.Tensor | None = None


def expect(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise a ValueError unless a tensor has this shape and dtype."""
    if tensor.shape != shape or tensor.dtype != dtype:
        raise ValueError(f"{name}: {list(tensor.shape)} {tensor.dtype}, expected {list(shape)} {dtype}")


def check(step: DecodeStep, call: LayerCall) -> None:
    """See that the tensors of a layer's step fit each other.

    Raises:
        ValueError: A shape, dtype or stride is not as the records describe it; the message starts with the field's
            name.
    """
    layer, kv_cache = call.layer, call.cache.kv_cache
    num_tokens, num_heads, head_size = call.query.shape
    num_seqs = num_tokens if step.query_start_loc is None else len(step.query_start_loc) - 1
    num_kv_heads, content = kv_cache.shape[1], kv_cache.shape[3]
    if num_heads % num_kv_heads:
        raise ValueError(f"query: {num_heads} heads over {num_kv_heads} kv heads, expected groups of equal size")
    if content != 2 * head_size:
        raise ValueError(f"kv_cache: last axis is {content}, expected {2 * head_size}")
    _check_query_lens(step, num_tokens, num_seqs)
    expect("block_table", step.block_table, (num_seqs, step.block_table.shape[1]), torch.int32)
    expect("seq_lens", step.seq_lens, (num_seqs,), torch.int32)
    expect("output", call.output, (num_tokens, num_heads, head_size), call.output.dtype)
    for name, tensor in (("query", call.query), ("kv_cache", kv_cache)):
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name}: last axis has stride {tensor.stride(-1)}, expected 1")
    if step.threshold_offset is not None:
        rows = max(num_seqs, len(step.threshold_offset))
        expect("threshold_offset", step.threshold_offset, (rows,), torch.float32)
        _expect_contiguous("threshold_offset", step.threshold_offset)
    if layer.sinks is not None:
        if tuple(layer.sinks.shape) != (num_heads,) or not layer.sinks.is_floating_point():
            raise ValueError(f"sinks: {list(layer.sinks.shape)} {layer.sinks.dtype}, expected [{num_heads}] of floats")
        _expect_contiguous("sinks", layer.sinks)
    if layer.thresholds is not None:
        expect("coefficients", layer.thresholds.coefficients, (num_heads, NUM_COEFFICIENTS), torch.float32)
        _expect_contiguous("coefficients", layer.thresholds.coefficients)
        if layer.thresholds.is_relative and step.max_dense_len < NUM_ANCHORS:
            raise ValueError(f"max_dense_len: {step.max_dense_len}, expected {NUM_ANCHORS} or more, the anchors")
        if layer.head_programs is not None:
            expect("head_programs", layer.head_programs, (num_kv_heads,), torch.int32)
        if layer.shadow is not None:
            _check_shadow(layer.shadow, num_heads)
        if layer.tiers is not None and not layer.thresholds.is_relative:
            raise ValueError("thresholds: calibrated, expected relative ones where there are copies")
        if layer.code_bytes and step.max_query_len > 1:
            raise ValueError(f"max_query_len: {step.max_query_len}, expected 1 where keys are skipped")
        if layer.code_bytes and layer.counters is not None:
            _check_key_counters(layer.counters, num_kv_heads, has_copies=layer.tiers is not None)
    check_tails(call.cache, layer)


def _check_query_lens(step: DecodeStep, num_tokens: int, num_seqs: int) -> None:
    most = step.max_query_len
    if not 1 <= most <= (1 if step.query_start_loc is None else MAX_QUERY_LEN):
        raise ValueError(f"max_query_len: {most}, expected 1, or with query_start_loc up to {MAX_QUERY_LEN}")
    if step.query_start_loc is not None:
        expect("query_start_loc", step.query_start_loc, (num_seqs + 1,), torch.int32)
    if num_tokens > num_seqs * most:
        raise ValueError(f"query: {num_tokens} tokens, expected {most} for each of {num_seqs} sequences, at most")


def _check_shadow(shadow: ShadowLayer, num_heads: int) -> None:
    expect("margin", shadow.margin, (num_heads,), torch.float32)
    expect("log_unread_ratio", shadow.log_unread_ratio, (num_heads, 2), torch.float32)
    _expect_contiguous("margin", shadow.margin)
    _expect_contiguous("log_unread_ratio", shadow.log_unread_ratio)


def _check_key_counters(counters: Counters, num_kv_heads: int, *, has_copies: bool) -> None:
    for name in ("keys_read", "copies_read") if has_copies else ("keys_read",):
        counter = getattr(counters, name)
        if counter is None:
            raise ValueError(f"{name}: None, expected counters with one where keys are skipped")
        expect(name, counter, (num_kv_heads,), torch.int64)


def check_tails(cache: LayerCache, layer: Layer) -> None:
    """See that the tails of a layer's pages fit its cache.

    Raises:
        ValueError: As for `check`.
    """
    num_blocks, num_kv_heads, block_size, content = cache.kv_cache.shape
    head_size = content // 2
    if cache.value_sum is not None:
        expect("value_sum", cache.value_sum, (num_blocks, num_kv_heads, head_size), torch.float32)
    if layer.code_bytes:
        code_bytes, codes = layer.code_bytes, cache.codes
        if codes is None:
            raise ValueError("codes: None, expected those of a layer that skips keys")
        expect("codes", codes, (num_blocks, num_kv_heads, block_size, code_bytes), torch.uint8)
        if codes.stride()[2:] != (code_bytes, 1):
            raise ValueError(f"codes: inner strides {codes.stride()[2:]}, expected {(code_bytes, 1)}")
    if layer.shadow is not None:
        of = layer.shadow.codec.encoder.shape[:2]
        if tuple(of) != (num_kv_heads, head_size):
            raise ValueError(f"codec: of {list(of)}, expected {[num_kv_heads, head_size]}")
    if layer.tiers is not None:
        expect("rotation", layer.tiers.codec.rotation, (head_size, head_size), torch.float32)
        if block_size < NUM_FIRST_ANCHORS:
            raise ValueError(f"kv_cache: pages of {block_size} tokens, expected {NUM_FIRST_ANCHORS} or more for copies")


def _expect_contiguous(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: not contiguous")
