"""How the CPU kernels fill the pages of a KV cache, and how they read them.

kv_cache    [num_blocks, num_kv_heads, block_size, 2 * head_size] of memory, filled as `split_cache` says: as vLLM's own
            CPU attention fills it where it works on vectors, so that prompts and dense layers can be left to that
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

NULL_BLOCK = 0  # block-table entries behind a sequence's end are read as this block and masked


def split_cache(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and the values of a cache, each [num_blocks, num_kv_heads, block_size, head_size].

    Within a page and head, all keys stand in front of all values. Keys lie channel by channel, the tokens of a page
    side by side, so that a vector holds one channel of many keys and scores need no sums across it; values lie token by
    token, because single ones are read.
    """
    keys, values = halves_of(kv_cache)
    return keys.flatten(2).unflatten(2, (keys.shape[3], keys.shape[2])).transpose(2, 3), values


def halves_of(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same memory as vLLM's own attention takes it: keys have the shape of values, whatever their axes hold."""
    num_blocks, num_kv_heads, block_size, content = kv_cache.shape
    first, second = kv_cache.view(num_blocks, num_kv_heads, 2 * block_size, content // 2).chunk(2, dim=2)
    return first, second


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


def pages_of(cache: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Pages of a batch, [num_seqs, max_blocks, num_kv_heads, block_size, head_size] float32.

    Args:
        cache: Either of what `split_cache` returns.
        blocks: [num_seqs, max_blocks] int64, physical blocks.
    """
    # index_select on the block axis copies whole rows; advanced indexing would go element by element
    pages = cache.index_select(0, blocks.flatten()).float()
    return pages.view(*blocks.shape, *pages.shape[1:])


def keys_at(cache: torch.Tensor, blocks: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The keys at `positions`, [num_seqs, num_kv_heads, width, head_size] float32.

    Args:
        cache: The keys that `split_cache` returns.
        blocks: As for `pages_of`.
        positions: [num_seqs, num_kv_heads, width] int64, tokens of each sequence.
    """
    num_kv_heads, block_size = cache.shape[1:3]
    block = blocks[:, None].expand(-1, num_kv_heads, -1).gather(2, positions // block_size)
    return cache[block, torch.arange(num_kv_heads)[:, None], positions % block_size].float()


def values_at(cache: torch.Tensor, blocks: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The values at `positions`, [num_seqs, num_kv_heads, width, head_size] float32.

    Args:
        cache: The values that `split_cache` returns.
        blocks, positions: As for `keys_at`.
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
