"""A paged KV cache as vLLM lays it out, filled by hand: permuted pages, tails, NaN wherever nothing was written."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_toptheta.kernels.contract import Layer, LayerCache, ShadowLayer, TailStep, TierLayer
from vllm_toptheta.kernels.cpu.batch import prepare_tails
from vllm_toptheta.kernels.cpu.cache import split_cache, write_kv
from vllm_toptheta.kernels.cpu.tails import write_tails
from vllm_toptheta.kernels.pages import padded_page_bytes, value_sum_view


def empty_cache(
    num_blocks: int,
    num_kv_heads: int,
    block_size: int,
    head_size: int,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    code_bytes: int = 0,
) -> torch.Tensor:
    """[num_blocks, num_kv_heads, block_size, 2 * head_size], NaN throughout, with room for a tail behind each page.

    `code_bytes` are those of a token's shadow key; such pages end in bytes that are no codes of anything.
    """
    content = num_kv_heads * block_size * 2 * head_size
    page_codes = num_kv_heads * block_size * code_bytes
    page = padded_page_bytes(content * dtype.itemsize, num_kv_heads, head_size, code_bytes=page_codes)
    stride = page // dtype.itemsize
    memory = torch.full((num_blocks * stride,), torch.nan, device=device).to(dtype)  # float8 cannot be filled
    return memory.as_strided(
        (num_blocks, num_kv_heads, block_size, 2 * head_size), (stride, block_size * 2 * head_size, 2 * head_size, 1)
    )


@dataclass
class PagedSequences:
    """Sequences in permuted pages; block 0 stays unwritten, as vLLM's null block does."""

    kv_cache: torch.Tensor
    block_table: torch.Tensor  # [num_seqs, max_blocks] int32; behind a sequence's end it names blocks of others
    seq_lens: torch.Tensor  # [num_seqs] int64, grows with `append`

    @classmethod
    def allocate(
        cls,
        max_lens: list[int],
        *,
        num_kv_heads: int,
        head_size: int,
        block_size: int,
        dtype: torch.dtype,
        generator: torch.Generator,
        code_bytes: int = 0,
    ) -> PagedSequences:
        width = max(-(-length // block_size) for length in max_lens)
        num_blocks = 1 + width * len(max_lens)
        order = torch.randperm(num_blocks - 1, generator=generator).int() + 1
        return cls(
            empty_cache(num_blocks, num_kv_heads, block_size, head_size, dtype, code_bytes=code_bytes),
            order.view(len(max_lens), width),
            torch.zeros(len(max_lens), dtype=torch.int64),
        )

    @property
    def interleaved(self) -> torch.Tensor:
        """The cache as the reference reads it: a token's key and value side by side, a copy."""
        return torch.cat(split_cache(self.kv_cache), dim=-1)

    @property
    def value_sum(self) -> torch.Tensor:
        return value_sum_view(self.kv_cache)

    def append(self, new_lens: list[int], generator: torch.Generator) -> None:
        """Write random tokens until the sequences are `new_lens` long, as one step of the engine does."""
        block_size, head_size = self.kv_cache.shape[2], self.kv_cache.shape[3] // 2
        before, after = self.seq_lens, torch.tensor(new_lens)
        slots = torch.cat(
            [
                self.block_table[row, position // block_size] * block_size + position % block_size
                for row in range(len(new_lens))
                for position in [torch.arange(int(before[row]), int(after[row]))]
            ]
        )
        shape = (len(slots), self.kv_cache.shape[1], head_size)
        key, value = torch.randn(2, *shape, generator=generator).to(self.kv_cache.dtype)
        write_kv(key, value, self.kv_cache, slots)
        self.seq_lens = after
        self.write_tails(before)

    def write_tails(
        self,
        before: torch.Tensor,
        shadow: ShadowLayer | None = None,
        codes: torch.Tensor | None = None,
        tiers: TierLayer | None = None,
    ) -> None:
        """Write the tails of a step that began when the sequences were as long as `before` says."""
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), (self.seq_lens - before).cumsum(0)]).int()
        step = TailStep(self.block_table, self.seq_lens.int(), starts, max_query_len=0)
        cache = LayerCache(self.kv_cache, self.value_sum, codes)
        write_tails(prepare_tails(step, self.kv_cache.shape[2]), cache, Layer(1.0, shadow=shadow, tiers=tiers))
