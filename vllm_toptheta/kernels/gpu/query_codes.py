"""Queries as integers of 8 bits, a step for each head, as scans multiply them with the codes of keys."""

from __future__ import annotations

import triton
import triton.language as tl

MIDDLE = tl.constexpr(7.5)  # of the codes of keys
_QUERY_LEVELS = tl.constexpr(127.0)


@triton.jit
def quantized(lower, upper):
    """Return the steps of projected queries [16], and the codes of both halves of their channels, as float32."""
    step = tl.max(tl.maximum(tl.abs(lower), tl.abs(upper)), axis=1) / _QUERY_LEVELS
    step = tl.where(step > 0.0, step, 1.0)
    return step, tl.floor(lower / step[:, None] + 0.5), tl.floor(upper / step[:, None] + 0.5)


@triton.jit
def store_query_codes(target, lower, upper, mask_g, HALF: tl.constexpr):
    """Write codes from `target` on, and those of the upper half of the channels HALF bytes behind."""
    # by way of int32: a float that is converted to int8 saturates on some targets only
    tl.store(target, lower.to(tl.int32).to(tl.int8), mask=mask_g[:, None])
    tl.store(target + HALF, upper.to(tl.int32).to(tl.int8), mask=mask_g[:, None])
