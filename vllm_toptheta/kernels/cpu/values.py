"""Top-Theta attention of one new token per sequence over the paged KV cache, on CPUs: mode `values`, and dense layers.

scores s_j = softmax_scale * q . k_j; survivors s_j >= threshold; weights p_j = exp(s_j - m) / Z with Z over all keys
(denominator compensation) or over the survivors; output sum p_j v_j + lost_mass * mean(v). A sink is a term of m and Z.
Source: arXiv 2502.08363, sections on softmax denominator and value-mean compensation.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch

from vllm_toptheta.kernels.contract import DecodeStep, Layer, LayerCall
from vllm_toptheta.kernels.cpu.batch import Batch
from vllm_toptheta.kernels.cpu.cache import packed_positions, pages_of, split_cache, values_at
from vllm_toptheta.kernels.cpu.scores import capped
from vllm_toptheta.kernels.cpu.scratch import Counted, CpuScratch
from vllm_toptheta.kernels.cpu.thresholds import thresholds_at

# channels of keys a thread, over all kv heads and tokens of a step, below which thresholds make nothing faster
CHANNELS_PER_THREAD = 350_000


def min_step_tokens(num_kv_heads: int, head_size: int) -> int:
    """Tokens of a step, over its sequences, below which vLLM's own attention takes no longer to read all of them.

    684 with 8 kv heads of 128 on two threads, 3,646 with 3 of 64 (docs/performance.md).
    """
    return -(-CHANNELS_PER_THREAD * torch.get_num_threads() // (num_kv_heads * head_size))


@functools.cache
def compiled_for(dtype: torch.dtype, head_size: int, block_size: int) -> ModuleType | None:
    """What reads such caches faster than torch operations do; None without Numba, or if that does not know them."""
    try:
        compiled = importlib.import_module("vllm_toptheta.kernels.cpu.compiled")
    except ImportError:
        return None
    return compiled if compiled.reads(dtype, head_size, block_size) else None


def _compiled(call: LayerCall) -> ModuleType | None:
    cache = call.cache.kv_cache
    return compiled_for(cache.dtype, call.query.shape[2], cache.shape[2])


def is_dense(step: DecodeStep, layer: Layer) -> bool:
    """Whether a layer keeps every key of a step that is prepared."""
    return layer.thresholds is None or step.prepared.keeps_everything


def count_dense(step: DecodeStep, layer: Layer, num_heads: int, num_kv_heads: int, scratch: CpuScratch) -> None:
    """Count a step in which a layer keeps every key, whoever decodes it."""
    if layer.counters is None:
        return
    rows_read = keys_seen(step.prepared, layer)[:, None].expand(-1, num_kv_heads)
    _count(step.prepared, layer, scratch, rows_read, torch.zeros(len(rows_read), num_heads))


def keys_seen(batch: Batch, layer: Layer) -> torch.Tensor:
    """[num_seqs] int64."""
    window = layer.sliding_window
    return batch.seq_lens if window is None else batch.seq_lens.clamp(max=window)


def _count(batch: Batch, layer: Layer, scratch: CpuScratch, rows_read: torch.Tensor, lost_mass: torch.Tensor) -> None:
    keys_read = keys_seen(batch, layer)[:, None].expand_as(rows_read)
    scratch.add(layer.counters, Counted(batch.totals, batch.is_counted, rows_read, lost_mass, keys_read))


def keep_everything(batch: Batch, call: LayerCall, scratch: CpuScratch) -> None:
    """Dense attention of the new tokens, in all modes."""
    if (compiled := _compiled(call)) is not None:
        compiled.decode(batch, call, scratch)
        return
    num_seqs, num_heads, head_size = call.query.shape
    key_cache, value_cache = split_cache(call.cache.kv_cache)
    num_kv_heads = key_cache.shape[1]
    window = call.layer.sliding_window
    visible = batch.visible if window is None else batch.visible & batch.within(window)
    _, numerators, of_sink = _scores(batch, call, key_cache, visible)
    total = numerators.sum(dim=3) + of_sink
    values = pages_of(value_cache, batch.blocks)
    num_blocks, block_size = values.shape[1], values.shape[3]
    # unwritten memory under weight 0 would still make NaN
    open_pages = slice(batch.min_len // block_size, None)
    written = batch.visible.view(num_seqs, num_blocks, 1, block_size, 1)[:, open_pages]
    values[:, open_pages] = values[:, open_pages].where(written, 0.0)
    weights = numerators.unflatten(3, (num_blocks, block_size)).permute(0, 3, 1, 2, 4)
    output = torch.matmul(weights, values).sum(dim=1) / total[..., None]
    call.output.copy_(output.view(num_seqs, num_heads, head_size))
    rows_read = visible.sum(dim=1, keepdim=True).expand(-1, num_kv_heads)
    _count(batch, call.layer, scratch, rows_read, torch.zeros(num_seqs, num_heads))


def keep_survivors(batch: Batch, call: LayerCall, scratch: CpuScratch) -> None:
    """Score every cached key, read only the value rows that some head of the group keeps."""
    if call.layer.thresholds is None:
        raise ValueError("thresholds: None, expected a layer with thresholds")
    if (compiled := _compiled(call)) is not None:
        compiled.decode(batch, call, scratch)
        return
    num_seqs, num_heads, head_size = call.query.shape
    key_cache, value_cache = split_cache(call.cache.kv_cache)
    num_kv_heads = key_cache.shape[1]
    group = num_heads // num_kv_heads
    scores, numerators, of_sink = _scores(batch, call, key_cache, batch.visible)
    of_keys = numerators.sum(dim=3)
    total = of_keys + of_sink

    def anchor_scores(positions: torch.Tensor) -> torch.Tensor:
        flat = scores.flatten(1, 2)
        return flat.gather(2, positions[:, None].expand(-1, num_heads, -1))

    theta = thresholds_at(call.layer.thresholds, batch, anchor_scores, call.layer.sinks)
    limit = theta.view(num_seqs, num_kv_heads, group, 1)
    # some head of the group keeps the key: score minus threshold is not negative (-inf minus -inf, NaN, compares false)
    read = (scores - limit).amax(dim=2) >= 0
    if call.cache.value_sum is not None:
        read |= batch.is_open[:, None]
    positions, valid = packed_positions(read)
    at_positions = positions[:, :, None].expand(-1, -1, group, -1)
    survivors = (scores.gather(3, at_positions) >= limit) & valid[:, :, None]
    kept = numerators.gather(3, at_positions).where(survivors, 0.0)
    kept_sum = kept.sum(dim=3)
    lost_mass = ((of_keys - kept_sum) / total).clamp_(min=0.0)
    output = weigh_values(
        kept,
        kept_sum + of_sink,
        lost_mass,
        values_at(value_cache, batch.blocks, positions),
        positions,
        valid,
        batch,
        denominator=total if call.layer.denominator_compensation else None,
        value_sum=call.cache.value_sum,
    )
    call.output.copy_(output.view(num_seqs, num_heads, head_size))
    _count(batch, call.layer, scratch, valid.sum(dim=2), lost_mass.view(num_seqs, num_heads))


def _scores(
    batch: Batch, call: LayerCall, key_cache: torch.Tensor, visible: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | float]:
    """Scores and exp(s - m) of all keys, [num_seqs, num_kv_heads, group, max_len] float32; -inf and 0 if not seen.

    And exp(sink - m), [num_seqs, num_kv_heads, group] float32, or 0 without sinks.
    """
    layer = call.layer
    num_seqs, num_heads, head_size = call.query.shape
    num_kv_heads = key_cache.shape[1]
    keys = pages_of(key_cache, batch.blocks)
    grouped = call.query.view(num_seqs, 1, num_kv_heads, num_heads // num_kv_heads, head_size).float()
    grouped = grouped * layer.softmax_scale
    scores = torch.matmul(grouped, keys.transpose(3, 4)).permute(0, 2, 3, 1, 4).flatten(3)
    scores = capped(scores, layer.logits_soft_cap)
    # this also replaces what unwritten memory holds, NaN included; in front, every sequence has a token
    masked = slice(0 if layer.sliding_window is not None else batch.min_len, None)
    scores[..., masked] = scores[..., masked].where(visible[:, None, None, masked], -torch.inf)
    maximum, of_sink = with_sinks(scores.amax(dim=3), layer.sinks)
    return scores, torch.exp(scores - maximum[..., None]), of_sink


def with_sinks(maximum: torch.Tensor, sinks: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | float]:
    """m, the largest of scores and sinks, and exp(sink - m), a term of the denominator; 0 without sinks.

    Args:
        maximum: [num_seqs, num_kv_heads, group] float32, the largest scores.
        sinks: As of `Layer`.
    """
    if sinks is None:
        return maximum, 0.0
    of_heads = sinks.float().view(maximum.shape[1:])
    maximum = torch.maximum(maximum, of_heads)
    return maximum, torch.exp(of_heads - maximum)


def weigh_values(
    kept: torch.Tensor,
    kept_sum: torch.Tensor,
    lost_mass: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    valid: torch.Tensor,
    batch: Batch,
    *,
    denominator: torch.Tensor | None,
    value_sum: torch.Tensor | None,
) -> torch.Tensor:
    """The output, [num_seqs, num_kv_heads, group, head_size] float32, of survivors' weights and the rows read.

    Args:
        kept: [num_seqs, num_kv_heads, group, width] float32, exp(s - m) of survivors, 0 elsewhere.
        kept_sum: [num_seqs, num_kv_heads, group] float32, its sums, with what a sink adds to them.
        lost_mass: The same shape.
        values: [num_seqs, num_kv_heads, width, head_size] float32, rows that some head of the group keeps, and those of
            pages that are not full if there is `value_sum`.
        positions, valid: [num_seqs, num_kv_heads, width], which rows these are, and which of them are no padding.
        batch: The sequences.
        denominator: The shape of `kept_sum`, that of the softmax; None for the survivors' sum.
        value_sum: As of `LayerCache`.
    """
    divisor = kept_sum.clamp(min=torch.finfo(torch.float32).tiny) if denominator is None else denominator
    if value_sum is None:
        return torch.matmul(kept, values) / divisor[..., None]
    group = kept.shape[2]
    # one more row of weights sums the values of the page that is still open: its sum stands in no tail yet
    is_open = valid & batch.is_open[:, None].expand(-1, kept.shape[1], -1).gather(2, positions)
    sums = torch.matmul(torch.cat([kept, is_open[:, :, None].float()], dim=2), values)
    closed_sum = value_sum[batch.last_full].masked_fill(~batch.has_full[:, None, None], 0.0)
    mean = (closed_sum + sums[:, :, group]) / batch.seq_lens[:, None, None]
    # without a denominator of all keys nothing is known to be lost, unless no key survived at all
    known_lost = (kept_sum == 0).float() if denominator is None else lost_mass
    return sums[:, :, :group] / divisor[..., None] + known_lost[..., None] * mean[:, :, None]
