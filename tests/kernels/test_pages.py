"""The page's tail: where it lies, and that nothing else is there."""

import pytest
import torch

from tests.kernels.paged import empty_cache
from vllm_toptheta.kernels.pages import PAGE_ALIGNMENT, codes_view, padded_page_bytes, value_sum_view
from vllm_toptheta.limits import HEAD_SIZES


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("num_kv_heads", "block_size", "head_size"), [(1, 16, 64), (3, 16, 64), (8, 128, 80)])
def test_tail_and_content_are_disjoint(dtype: torch.dtype, num_kv_heads: int, block_size: int, head_size: int) -> None:
    cache = empty_cache(5, num_kv_heads, block_size, head_size, dtype)
    cache.fill_(1.0)
    value_sum_view(cache).fill_(-7.0)
    assert bool((cache == 1.0).all())
    cache.fill_(2.0)
    assert bool((value_sum_view(cache) == -7.0).all())


def test_view_follows_the_storage_offset() -> None:
    cache = empty_cache(6, 2, 16, 64, torch.bfloat16)
    value_sum_view(cache)[4, 1, 3] = 5.0
    assert value_sum_view(cache[2:])[2, 1, 3] == 5.0


def test_inner_axes_may_lie_token_first() -> None:
    # NHD: the tokens of a page outside, its heads inside; the page's front is filled all the same
    head_first = empty_cache(3, 2, 16, 64, torch.float32)
    token_first = head_first.as_strided(head_first.shape, (head_first.stride(0), 128, 256, 1))
    token_first.zero_()
    value_sum_view(token_first).fill_(3.0)
    assert not token_first.any()
    assert bool((value_sum_view(head_first) == 3.0).all())


def test_pages_are_aligned() -> None:
    assert padded_page_bytes(32768, 3, 64) == 33536
    for head_size in HEAD_SIZES:
        page_bytes = padded_page_bytes(2 * head_size * 16 * 2, 1, head_size)
        assert page_bytes % PAGE_ALIGNMENT == page_bytes % (4 * head_size) == 0


def test_pages_without_a_tail_are_refused() -> None:
    with pytest.raises(ValueError, match="no tail"):
        value_sum_view(torch.zeros(4, 2, 16, 128))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("num_kv_heads", "block_size", "head_size"), [(1, 16, 64), (3, 48, 80)])
def test_shadow_keys_lie_behind_the_sums(
    dtype: torch.dtype, num_kv_heads: int, block_size: int, head_size: int
) -> None:
    content = num_kv_heads * block_size * 2 * head_size
    page_codes = num_kv_heads * block_size * 32
    page_bytes = padded_page_bytes(content * dtype.itemsize, num_kv_heads, head_size, code_bytes=page_codes)
    stride = page_bytes // dtype.itemsize
    inner = (block_size * 2 * head_size, 2 * head_size, 1)
    cache = torch.zeros(4 * stride, dtype=dtype).as_strided(
        (4, num_kv_heads, block_size, 2 * head_size), (stride, *inner)
    )
    cache.fill_(1.0)
    value_sum_view(cache).fill_(-7.0)
    codes_view(cache, 32).fill_(99)
    assert bool((cache == 1.0).all())
    assert bool((value_sum_view(cache) == -7.0).all())
    cache.fill_(2.0)
    value_sum_view(cache).fill_(5.0)
    assert bool((codes_view(cache, 32) == 99).all())
    with pytest.raises(ValueError, match="no room"):
        codes_view(cache, 64 + 32)
