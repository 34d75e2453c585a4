"""Random steps in which drafts are verified, so that sequences have several new tokens, and what the reference says."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from tests.kernels import decode_case
from tests.kernels.decode_case import (
    DEVICE,
    Case,
    Shape,
    check_closed_pages,
    error_of_dtype,
    make_case,
    place_thresholds,
    reference,
)
from vllm_toptheta.kernels.contract import Counters
from vllm_toptheta.kernels.gpu.cuda.value_split import ValueLoader
from vllm_toptheta.kernels.gpu.scratch import Scratch, Sizes
from vllm_toptheta.kernels.gpu.tuning import LaunchConfig
from vllm_toptheta.kernels.gpu.values import decode


@dataclass(frozen=True)
class Verified:
    """A step in which sequences have several new tokens.

    Attributes:
        case: The step's sequences, and queries of all new tokens.
        tokens: The same of sequences that are cut off behind each new token, as if it were the last.
        query_lens: New tokens of each sequence.
    """

    case: Case
    tokens: Case
    query_lens: tuple[int, ...]

    @classmethod
    def make(cls, shape: Shape, query_lens: tuple[int, ...], threshold: float | None = None) -> Verified:
        """Draw one; the page tails that new tokens fill are NaN, and without a threshold, some are placed."""
        case = make_case(shape, threshold)
        generator = torch.Generator(DEVICE).manual_seed(shape.seed + 1)
        rows, lens = [], []
        for row, (length, number) in enumerate(zip(shape.lens, query_lens, strict=True)):
            old = (length - number) // shape.block_size
            case.value_sum[case.block_table[row, old : -(-length // shape.block_size)].long()] = torch.nan
            rows += [row] * number
            lens += [max(0, length - number + 1 + index) for index in range(number)]
        query = torch.randn(len(rows), shape.num_heads, shape.head_size, generator=generator, device=DEVICE)
        case = replace(case, query=query.to(case.query.dtype))
        tokens = replace(
            case,
            shape=replace(shape, lens=tuple(lens)),
            block_table=case.block_table[rows],
            seq_lens=torch.tensor(lens, dtype=torch.int32, device=DEVICE),
        )
        if threshold is None:
            place_thresholds(tokens, generator)
        return cls(case, tokens, query_lens)

    @property
    def max_query_len(self) -> int:
        return max(self.query_lens)

    def run(
        self, config: LaunchConfig | None = None, loader: ValueLoader | None = None, **options: Any
    ) -> tuple[torch.Tensor, Counters]:
        """Output and counters of the kernel that a loader loads, or `loader_of`; its memory starts out as NaN."""
        shape, number = self.case.shape, self.max_query_len
        sizes = Sizes(len(shape.lens), shape.num_heads, shape.num_kv_heads, shape.head_size, max_query_len=number)
        loader = loader or decode_case.loader_of(replace(shape, num_heads=shape.num_heads * number))
        kv_dtype = self.case.kv_cache.dtype
        scratch = Scratch.allocate(sizes, kv_dtype=kv_dtype, device=DEVICE, config=config, loader=loader)
        for buffer in scratch[2:]:
            buffer.view(torch.int32).fill_(0x7FFF_FFFF)  # NaN
        counters = Counters.allocate(shape.num_heads, shape.num_kv_heads, DEVICE)
        output = torch.full_like(self.case.query, torch.nan, dtype=shape.dtype)
        step, call = self.case.records(output, counters=counters, **options)
        starts = torch.tensor([0, *self.query_lens], device=DEVICE).cumsum(0).int()
        decode(step._replace(query_start_loc=starts, max_query_len=number), call, scratch)
        return output, counters

    def check(self, output: torch.Tensor, counters: Counters) -> None:
        """Compare with the reference, token by token; rows read are those that some token of a sequence keeps."""
        shape, tokens = self.case.shape, self.tokens
        # all new tokens of a sequence keep every key where the first of them does
        max_dense_len = shape.max_dense_len + self.max_query_len - 1
        rows_read = torch.zeros(shape.num_kv_heads, dtype=torch.int64, device=DEVICE)
        lost_mass = torch.zeros(shape.num_heads, dtype=torch.float64, device=DEVICE)
        totals = [0, 0, sum(shape.lens), 1, 0]
        token = 0
        for length, number in zip(shape.lens, self.query_lens, strict=True):
            read = torch.zeros(shape.num_kv_heads, length, dtype=torch.bool, device=DEVICE)
            is_dense = length <= max_dense_len
            for seen in range(length - number + 1, length + 1):
                if length == 0:
                    assert not output[token].any()
                else:
                    result = reference(tokens, token, max_dense_len=length if is_dense else 0)
                    error = float((output[token].float() - result.output[0]).abs().max())
                    assert error <= 2 * error_of_dtype(tokens, token, result) + 1e-3, (length, seen, error)
                    read[:, :seen] |= result.survivors[0].view(shape.num_kv_heads, -1, seen).any(1)
                    lost = reference(tokens, token, max_dense_len=length if is_dense else 0, exact=True).lost_mass[0]
                    lost_mass += lost
                token += 1
            if length:
                totals[0] += number
                totals[1] += number * is_dense
                if shape.value_mean and not is_dense:  # rows from the first open page on are read for the mean
                    read[:, (length - number + 1) // shape.block_size * shape.block_size :] = True
                rows_read += read.sum(1)
        assert counters.value_rows_read.tolist() == rows_read.tolist()
        assert counters.totals.tolist() == totals
        torch.testing.assert_close(counters.lost_mass, lost_mass, rtol=1e-3, atol=1e-4 * len(output))
        sparse = totals[0] - totals[1]
        assert counters.lost_mass_histogram.sum(dim=1).tolist() == [sparse] * shape.num_heads
        if shape.value_mean:
            check_closed_pages(self.case)
