"""Top-Theta attention over the paged KV cache in vectorised torch operations, for CPUs.

Three steps, in the order in which a layer runs them: `write_kv` puts new tokens into the cache, `close_pages` writes
running value sums of pages that became full, then `decode`, and `cpu_prefill` for prompts, compute the output. Layers
with shadow keys take `cpu_shadow` for the last step.

    kv_cache      [num_blocks, num_kv_heads, block_size, 2 * head_size] of memory, filled as `split_cache` says
    block_table   [num_seqs, max_blocks] integer, physical block of each logical block
    seq_lens      [num_seqs] int64, cached tokens of each sequence including the new ones
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

NULL_BLOCK = 0  # block-table entries behind a sequence's end are read as this block and masked


@dataclass(frozen=True)
class DecodeResult:
    """What `decode` computed.

    Attributes:
        output: [num_seqs, num_heads, head_size] float32.
        value_rows_read: [num_seqs, num_kv_heads] int64, value rows fetched from the cache.
        lost_mass: [num_seqs, num_heads] float32, softmax mass of the keys that did not survive.
        keys_read: [num_seqs, num_kv_heads] int64, keys fetched from the cache; None for all that are seen.
    """

    output: torch.Tensor
    value_rows_read: torch.Tensor
    lost_mass: torch.Tensor
    keys_read: torch.Tensor | None = None


@dataclass(frozen=True)
class DecodeBatch:
    """The sequences of a decode step, prepared once and used by every layer.

    Attributes:
        seq_lens: [num_seqs] int64, cached tokens including the new one; at least 1.
        blocks: [num_seqs, max_blocks] int64, physical blocks; `NULL_BLOCK` behind a sequence's end.
        visible: [num_seqs, max_len] bool, positions that hold a token; max_len = max_blocks * block_size.
        min_len: Length of the shortest sequence.
        is_open: [num_seqs, max_len] bool, tokens of the last page where that is not full.
        last_full: [num_seqs] int64, physical block of the last full page; meaningless where there is none.
        has_full: [num_seqs] bool, whether there is one.
    """

    seq_lens: torch.Tensor
    blocks: torch.Tensor
    visible: torch.Tensor
    min_len: int
    is_open: torch.Tensor
    last_full: torch.Tensor
    has_full: torch.Tensor

    @classmethod
    def of_step(cls, block_table: torch.Tensor, seq_lens: torch.Tensor, block_size: int) -> DecodeBatch:
        """Prepare the sequences in the rows of `block_table`."""
        seq_lens = seq_lens.long()
        num_blocks = -(-seq_lens // block_size)
        index = torch.arange(int(num_blocks.max()))
        blocks = block_table[:, : len(index)].long().where(index < num_blocks[:, None], NULL_BLOCK)
        position = torch.arange(len(index) * block_size)
        num_full = seq_lens // block_size
        visible = position < seq_lens[:, None]
        return cls(
            seq_lens=seq_lens,
            blocks=blocks,
            visible=visible,
            min_len=int(seq_lens.min()),
            is_open=visible & (position >= (num_full * block_size)[:, None]),
            last_full=blocks.gather(1, (num_full - 1).clamp(min=0)[:, None]).flatten(),
            has_full=num_full > 0,
        )

    def within(self, sliding_window: int) -> torch.Tensor:
        """[num_seqs, max_len] bool: positions among a sequence's last `sliding_window` tokens, or behind its end."""
        return torch.arange(self.visible.shape[1]) >= (self.seq_lens - sliding_window)[:, None]


@dataclass(frozen=True)
class ClosedPages:
    """Pages that become full in a step; a row for each sequence that fills at least one.

    Attributes:
        blocks: [num_rows, max_pages] int64, physical blocks in the sequence's order, `NULL_BLOCK` where padded.
        valid: [num_rows, max_pages] bool, False where padded.
        previous: [num_rows] int64, the block before the first of the row; meaningless for a sequence's first block.
        is_first: [num_rows] bool, the row starts with a sequence's first block.
    """

    blocks: torch.Tensor
    valid: torch.Tensor
    previous: torch.Tensor
    is_first: torch.Tensor

    @classmethod
    def of_step(
        cls, block_table: torch.Tensor, context_lens: torch.Tensor, seq_lens: torch.Tensor, block_size: int
    ) -> ClosedPages | None:
        """The pages that fill up while sequences grow from `context_lens` to `seq_lens` (both [num_seqs])."""
        first, end = context_lens // block_size, seq_lens // block_size
        rows = torch.nonzero(end > first).flatten()
        if not len(rows):
            return None
        first, end = first[rows], end[rows]
        page = first[:, None] + torch.arange(int((end - first).max()))
        valid = page < end[:, None]
        table = block_table[rows].long()
        return cls(
            blocks=table.gather(1, page.clamp(max=table.shape[1] - 1)).where(valid, NULL_BLOCK),
            valid=valid,
            previous=table.gather(1, (first - 1).clamp(min=0)[:, None]).flatten(),
            is_first=first == 0,
        )


def split_cache(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and the values of a cache, each [num_blocks, num_kv_heads, block_size, head_size].

    Within a page and head, all keys stand in front of all values: keys are read whole and in order, values row by row,
    and side by side each would drag the other through the memory bus.
    """
    num_blocks, num_kv_heads, block_size, content = kv_cache.shape
    halves = kv_cache.view(num_blocks, num_kv_heads, 2 * block_size, content // 2)
    return halves[:, :, :block_size], halves[:, :, block_size:]


def write_kv(key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Write new tokens into their slots; a negative slot is padding and is skipped.

    Args:
        key, value: [num_tokens, num_kv_heads, head_size].
        kv_cache: Written in place.
        slot_mapping: [num_tokens] integer, block * block_size + offset.
    """
    key_cache, value_cache = split_cache(kv_cache)
    block_size = kv_cache.shape[2]
    written = slot_mapping >= 0
    if not bool(written.all()):
        key, value, slot_mapping = key[written], value[written], slot_mapping[written]
    blocks, offsets = slot_mapping // block_size, slot_mapping % block_size
    key_cache[blocks, :, offsets] = key.to(kv_cache.dtype)
    value_cache[blocks, :, offsets] = value.to(kv_cache.dtype)


def close_pages(kv_cache: torch.Tensor, value_sum: torch.Tensor, pages: ClosedPages) -> None:
    """Write the running value sum of every page in `pages`.

    A page's sum is made from its predecessor's sum and its own rows, never by adding tokens one at a time, so writing
    it again (a step repeated, a token rejected and replaced) gives the same sum, up to rounding.

    Args:
        kv_cache: The pages' rows must have been written.
        value_sum: [num_blocks, num_kv_heads, head_size] float32, written in place.
        pages: Which pages, from `ClosedPages.of_step`.
    """
    _, value_cache = split_cache(kv_cache)
    sums = value_cache[pages.blocks].sum(dim=3, dtype=torch.float32)
    sums.masked_fill_(~pages.valid[:, :, None, None], 0.0)
    sums = sums.cumsum(dim=1)
    # a sequence may begin behind a prefix that another one computes in this very step: first those that others stand on
    pending = torch.ones(len(pages.blocks), dtype=torch.bool)
    while bool(pending.any()):
        unwritten = pages.blocks[pending][pages.valid[pending]]
        ready = pending & (pages.is_first | ~torch.isin(pages.previous, unwritten))
        before = value_sum[pages.previous[ready]].masked_fill(pages.is_first[ready, None, None], 0.0)
        value_sum[pages.blocks[ready][pages.valid[ready]]] = (before[:, None] + sums[ready])[pages.valid[ready]]
        pending &= ~ready


def decode(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    batch: DecodeBatch,
    *,
    softmax_scale: float,
    threshold: torch.Tensor | None = None,
    logits_soft_cap: float | None = None,
    sliding_window: int | None = None,
    denominator_compensation: bool = True,
    value_sum: torch.Tensor | None = None,
) -> DecodeResult:
    """One new token per sequence: score every cached key, read only the value rows that some head of the group keeps.

    scores s_j = softmax_scale * q . k_j; survivors s_j >= threshold; weights p_j = exp(s_j - m) / Z with Z over all
    keys (denominator compensation) or over the survivors; output sum p_j v_j + lost_mass * mean(v).
    arXiv 2502.08363, sections on softmax denominator and value-mean compensation.

    Args:
        query: [num_seqs, num_heads, head_size].
        kv_cache: See the module's head.
        batch: The sequences.
        softmax_scale: Factor on q . k.
        threshold: [num_seqs, num_heads] float32, scaled logits; -inf keeps every key; None does so for all.
        logits_soft_cap: Cap c of c * tanh(s / c), or None.
        sliding_window: Number of most recent keys that are seen, or None for all.
        denominator_compensation: Sum the softmax denominator over all keys instead of the survivors.
        value_sum: [num_blocks, num_kv_heads, head_size] float32, running sums of full pages, for the value-mean
            compensation; None switches it off.
    """
    num_seqs, num_heads, head_size = query.shape
    num_kv_heads = kv_cache.shape[1]
    group = num_heads // num_kv_heads
    visible = batch.visible if sliding_window is None else batch.visible & batch.within(sliding_window)

    key_cache, value_cache = split_cache(kv_cache)
    keys = _pages(key_cache, batch)
    grouped = query.view(num_seqs, 1, num_kv_heads, group, head_size).float() * softmax_scale
    # [num_seqs, num_kv_heads, group, max_len]
    scores = torch.matmul(grouped, keys.transpose(3, 4)).permute(0, 2, 3, 1, 4).flatten(3)
    if logits_soft_cap is not None:
        scores = logits_soft_cap * torch.tanh(scores / logits_soft_cap)
    # this also replaces what unwritten memory holds, NaN included; in front, every sequence has a token
    masked = slice(0 if sliding_window is not None else batch.min_len, None)
    scores[..., masked] = scores[..., masked].where(visible[:, None, None, masked], -torch.inf)
    numerators = torch.exp(scores - scores.amax(dim=3, keepdim=True))
    total = numerators.sum(dim=3)

    if threshold is None:
        values = _pages(value_cache, batch)
        num_blocks, block_size = values.shape[1], values.shape[3]
        # unwritten memory under weight 0 would still make NaN
        open_pages = slice(batch.min_len // block_size, None)
        written = batch.visible.view(num_seqs, num_blocks, 1, block_size, 1)[:, open_pages]
        values[:, open_pages] = values[:, open_pages].where(written, 0.0)
        weights = numerators.unflatten(3, (num_blocks, block_size)).permute(0, 3, 1, 2, 4)
        output = torch.matmul(weights, values).sum(dim=1) / total[..., None]
        return DecodeResult(
            output=output.view(num_seqs, num_heads, head_size),
            value_rows_read=visible.sum(dim=1, keepdim=True).expand(-1, num_kv_heads),
            lost_mass=torch.zeros(num_seqs, num_heads),
        )

    limit = threshold.view(num_seqs, num_kv_heads, group, 1)
    # some head of the group keeps the key: score minus threshold is not negative (-inf minus -inf, NaN, compares false)
    read = (scores - limit).amax(dim=2) >= 0
    if value_sum is not None:
        read |= batch.is_open[:, None]
    positions, valid = packed_positions(read)
    at_positions = positions[:, :, None].expand(-1, -1, group, -1)
    survivors = (scores.gather(3, at_positions) >= limit) & valid[:, :, None]
    kept = numerators.gather(3, at_positions).where(survivors, 0.0)
    kept_sum = kept.sum(dim=3)
    lost_mass = ((total - kept_sum) / total).clamp_(min=0.0)
    output = weigh_values(
        kept,
        kept_sum,
        lost_mass,
        token_rows(value_cache, batch.blocks, positions),
        positions,
        valid,
        batch,
        denominator=total if denominator_compensation else None,
        value_sum=value_sum,
    )
    return DecodeResult(
        output=output.view(num_seqs, num_heads, head_size),
        value_rows_read=valid.sum(dim=2),
        lost_mass=lost_mass.view(num_seqs, num_heads),
    )


def weigh_values(
    kept: torch.Tensor,
    kept_sum: torch.Tensor,
    lost_mass: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    valid: torch.Tensor,
    batch: DecodeBatch,
    *,
    denominator: torch.Tensor | None,
    value_sum: torch.Tensor | None,
) -> torch.Tensor:
    """The output, [num_seqs, num_kv_heads, group, head_size] float32, of survivors' weights and the rows read.

    Args:
        kept: [num_seqs, num_kv_heads, group, width] float32, exp(s - m) of survivors, 0 elsewhere.
        kept_sum: [num_seqs, num_kv_heads, group] float32, its sums.
        lost_mass: The same shape.
        values: [num_seqs, num_kv_heads, width, head_size] float32, rows that some head of the group keeps, and those of
            pages that are not full if there is `value_sum`.
        positions, valid: [num_seqs, num_kv_heads, width], which rows these are, and which of them are no padding.
        batch: The sequences.
        denominator: The shape of `kept_sum`, that of the softmax; None for the survivors' sum.
        value_sum: As for `decode`.
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


def _pages(cache: torch.Tensor, batch: DecodeBatch) -> torch.Tensor:
    """The batch's pages of a cache, [num_seqs, max_blocks, num_kv_heads, block_size, head_size] float32."""
    # index_select on the block axis copies whole rows; advanced indexing would go element by element
    pages = cache.index_select(0, batch.blocks.flatten()).float()
    return pages.view(*batch.blocks.shape, *pages.shape[1:])


def packed_positions(read: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The positions marked in `read`, [num_seqs, num_kv_heads, max_len] bool, packed to the left.

    Returns:
        [num_seqs, num_kv_heads, width] int64, 0 where padded, and a mask of the same shape, False where padded; width
        is that of the row with most marks, at least 1.
    """
    seq, head, position = torch.nonzero(read, as_tuple=True)
    rank = read.cumsum(dim=2)
    counts = rank[:, :, -1]
    width = max(1, int(counts.max()))
    positions = torch.zeros(*counts.shape, width, dtype=torch.int64)
    positions[seq, head, rank[seq, head, position] - 1] = position
    return positions, torch.arange(width) < counts[..., None]


def token_rows(cache: torch.Tensor, blocks: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The rows at `positions`, [num_seqs, num_kv_heads, width, head_size] float32.

    Args:
        cache: Either of what `split_cache` returns.
        blocks: [num_seqs, max_blocks] int64, physical blocks.
        positions: [num_seqs, num_kv_heads, width] int64, tokens of each sequence.
    """
    num_blocks, num_kv_heads, block_size, head_size = cache.shape
    # pages are whole numbers of rows (kernels.pages), so all rows stand in one matrix, which index_select copies row by
    # row, while advanced indexing would go element by element
    rows_per_page, rows_per_head = cache.stride(0) // head_size, cache.stride(1) // head_size
    num_rows = (num_blocks - 1) * rows_per_page + (num_kv_heads - 1) * rows_per_head + block_size
    rows = cache.as_strided((num_rows, head_size), (head_size, 1))
    block = blocks[:, None].expand(-1, num_kv_heads, -1).gather(2, positions // block_size)
    head = torch.arange(num_kv_heads)[:, None]
    index = block * rows_per_page + head * rows_per_head + positions % block_size
    return F.embedding(index, rows).float()
