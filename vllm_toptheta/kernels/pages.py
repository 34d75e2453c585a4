"""The side data that lives in the tail of a KV page.

A page of one layer holds `block_size` tokens of keys and values, and behind them, up to the page's stride, a tail:

    | K and V of the page's tokens, num_kv_heads x block_size x 2 head_size elements | value_sum | codes | padding |

    value_sum   float32 [num_kv_heads, head_size]   sum of the value rows of the sequence from its first token to the
                                                    last token of this page; valid once the page is full
    codes       uint8 [num_kv_heads, block_size, code_bytes]   shadow keys, or copies of keys and values, where a layer
                                                    has them; valid once the page is full

Copies (`codec.TierCodec`) fill the bytes of a head one kind after the other, so that each is dense:

    | keys, uint8 [block_size, head_size / 2] | values, uint8 [block_size, head_size / 4] | steps of keys, float16
    [block_size] | steps of values, float16 [block_size] |

Byte j of a key holds channel j in its lower half and channel j + head_size / 2 in its upper half; byte j of a value
holds channel j + i * head_size / 4 in its bits 2 i and 2 i + 1.

Where pages are split from longer ones, they are dense, and each head's tail is its last row, as long as a token's key
and value; there are no codes:

    | K and V of a token, 2 head_size elements of two bytes | ... | value_sum, float32 [head_size] |

Because the tail is part of the page, vLLM accounts for its memory, prefix caching shares it together with the keys
and values it was computed from, and it is freed with them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

PAGE_ALIGNMENT = 256  # bytes; keeps every page and every tail aligned for the widest vector loads
_FLOAT_BYTES = 4


def padded_page_bytes(content_bytes: int, num_kv_heads: int, head_size: int, *, code_bytes: int = 0) -> int:
    """Bytes of a page whose keys and values take `content_bytes`, with its tail.

    `code_bytes` are those of the codes of all tokens and heads of the page, 0 where there are none. Pages are
    aligned, and whole numbers of rows of `head_size` elements of up to 4 bytes.
    """
    row_bytes = head_size * _FLOAT_BYTES
    alignment = math.lcm(PAGE_ALIGNMENT, row_bytes)
    return -(-(content_bytes + num_kv_heads * row_bytes + code_bytes) // alignment) * alignment


def value_sum_view(kv_cache: torch.Tensor) -> torch.Tensor:
    """The `value_sum` of every page of a layer, as a view of the cache's memory.

    Args:
        kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size], any dtype; the three inner axes fill a page's
            front without gaps (in any order), the block stride is the padded page.

    Returns:
        [num_blocks, num_kv_heads, head_size] float32.

    Raises:
        ValueError: The pages have no room for a tail.
    """
    num_blocks, num_kv_heads, block_size, content_size = kv_cache.shape
    head_size = content_size // 2
    element = kv_cache.element_size()
    content = num_kv_heads * block_size * content_size
    page_bytes = kv_cache.stride(0) * element
    if page_bytes < padded_page_bytes(content * element, num_kv_heads, head_size):
        raise ValueError(
            f"KV pages of {page_bytes} bytes have no tail behind their {content * element} bytes of K and V"
        )
    offset = (kv_cache.storage_offset() + content) * element
    return torch.empty(0, dtype=torch.float32, device=kv_cache.device).set_(
        kv_cache.untyped_storage(),
        offset // _FLOAT_BYTES,
        (num_blocks, num_kv_heads, head_size),
        (page_bytes // _FLOAT_BYTES, head_size, 1),
    )


def tail_row_view(kv_cache: torch.Tensor) -> torch.Tensor:
    """The `value_sum` of every page of a layer whose heads have a row for it, as a view of the cache's memory.

    Args:
        kv_cache: [num_blocks, num_kv_heads, block_size + 1, 2 * head_size] of two bytes each, last axis dense.

    Returns:
        [num_blocks, num_kv_heads, head_size] float32.

    Raises:
        ValueError: A row is not as long as the sums.
    """
    if kv_cache.element_size() != 2:
        raise ValueError(f"KV pages of {kv_cache.dtype} have no row as long as the sums of values")
    return kv_cache[:, :, -1].view(torch.float32)


def codes_view(kv_cache: torch.Tensor, code_bytes: int) -> torch.Tensor:
    """The codes of every page of a layer, as a view of the cache's memory.

    Args:
        kv_cache: As for `value_sum_view`.
        code_bytes: Bytes of a token's shadow key or copies.

    Returns:
        [num_blocks, num_kv_heads, block_size, code_bytes] uint8.

    Raises:
        ValueError: The pages have no room for them.
    """
    num_blocks, num_kv_heads, block_size, content_size = kv_cache.shape
    head_size, element = content_size // 2, kv_cache.element_size()
    content = num_kv_heads * block_size * content_size
    page_bytes = kv_cache.stride(0) * element
    page_codes = num_kv_heads * block_size * code_bytes
    if page_bytes < padded_page_bytes(content * element, num_kv_heads, head_size, code_bytes=page_codes):
        raise ValueError(f"KV pages of {page_bytes} bytes have no room for {page_codes} bytes of codes")
    offset = (kv_cache.storage_offset() + content) * element + num_kv_heads * head_size * _FLOAT_BYTES
    return torch.empty(0, dtype=torch.uint8, device=kv_cache.device).set_(
        kv_cache.untyped_storage(),
        offset,
        (num_blocks, num_kv_heads, block_size, code_bytes),
        (page_bytes, block_size * code_bytes, code_bytes, 1),
    )


class CopyViews(NamedTuple):
    """Copies of keys and values of every page, as views of the cache's memory.

    Attributes:
        key_codes: [num_blocks, num_kv_heads, block_size, head_size / 2] uint8.
        value_codes: [num_blocks, num_kv_heads, block_size, head_size / 4] uint8.
        key_step, value_step: [num_blocks, num_kv_heads, block_size] float16.
    """

    key_codes: torch.Tensor
    value_codes: torch.Tensor
    key_step: torch.Tensor
    value_step: torch.Tensor

    @classmethod
    def of(cls, codes: torch.Tensor, head_size: int) -> CopyViews:
        """Those in `codes_view`'s bytes."""
        block_size = codes.shape[2]
        key, value = block_size * head_size // 2, block_size * head_size // 4
        parts = codes.flatten(2).split([key, value, 2 * block_size, 2 * block_size], dim=2)
        return cls(
            parts[0].unflatten(2, (block_size, -1)),
            parts[1].unflatten(2, (block_size, -1)),
            parts[2].view(torch.float16),
            parts[3].view(torch.float16),
        )
