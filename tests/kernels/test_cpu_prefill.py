"""Prompts on the CPU against the fp32 reference."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.test_cpu import TOLERANCE, sequences
from vllm_toptheta.kernels.cpu import prefill as cpu_prefill
from vllm_toptheta.reference import dense_attention, gather_sequence


@pytest.mark.parametrize("sinks", [None, torch.linspace(-4.0, 6.0, 9)], ids=["without sinks", "with sinks"])
@pytest.mark.parametrize("soft_cap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize(("context", "length"), [(0, 1), (0, 50), (33, 50), (49, 50)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prefill(
    dtype: torch.dtype,
    context: int,
    length: int,
    window: int | None,
    soft_cap: float | None,
    sinks: torch.Tensor | None,
) -> None:
    paged, _ = sequences([length], "gqa 3", 16, dtype)
    query = torch.randn(length - context, 9, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    output = cpu_prefill.prefill(
        query,
        paged.kv_cache,
        paged.block_table[0],
        seq_len=length,
        softmax_scale=0.125,
        logits_soft_cap=soft_cap,
        sliding_window=window,
        sinks=sinks,
    )
    assert output.dtype == dtype
    key, value = gather_sequence(paged.interleaved, paged.block_table[0], length)
    for index in range(len(query)):
        end = context + index + 1
        start = 0 if window is None else max(0, end - window)
        expected = dense_attention(
            query[index : index + 1],
            key[start:end],
            value[start:end],
            softmax_scale=0.125,
            logits_soft_cap=soft_cap,
            sinks=sinks,
        )
        tolerance = TOLERANCE if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-2}
        torch.testing.assert_close(output[index : index + 1].float(), expected.output, **tolerance)
