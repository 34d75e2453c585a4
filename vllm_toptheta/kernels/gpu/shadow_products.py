"""Products of codes and queries in the scan of shadow keys: how bytes become operands of the tensor cores.

Tokens are the rows of a product, or its columns (`HEADS_FIRST`); codes are integers of 8 bits, or float16, in which
they and the sums of their products are exact as well.
"""

from __future__ import annotations

import triton
import triton.language as tl

_HALVES_ASM: tl.constexpr = tl.constexpr(
    "{ .reg .b32 t; and.b32 $0, $2, 0x0F0F0F0F; shr.u32 t, $2, 4; and.b32 $1, t, 0x0F0F0F0F; }"
)
# 0x6400 with n in its last bits is the float16 1024 + n
_FLOAT16_HALVES_ASM: tl.constexpr = tl.constexpr(
    "{ .reg .b32 t, l, h, o; mov.b32 o, 0x64006400; and.b32 l, $4, 0x0F0F0F0F; shr.u32 t, $4, 4; "
    "and.b32 h, t, 0x0F0F0F0F; "
    "prmt.b32 t, l, 0x64, 0x4140; sub.rn.f16x2 $0, t, o; prmt.b32 t, l, 0x64, 0x4342; sub.rn.f16x2 $1, t, o; "
    "prmt.b32 t, h, 0x64, 0x4140; sub.rn.f16x2 $2, t, o; prmt.b32 t, h, 0x64, 0x4342; sub.rn.f16x2 $3, t, o; }"
)


@triton.jit
def halves(codes, FLOAT: tl.constexpr, PACKED: tl.constexpr):
    """Lower and upper halves of bytes; `PACKED` takes four at a time where Triton would take them one by one."""
    if PACKED and FLOAT:
        lower, upper = tl.inline_asm_elementwise(
            _FLOAT16_HALVES_ASM, "=r,=r,=r,=r,r", [codes], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
    elif PACKED:
        lower, upper = tl.inline_asm_elementwise(
            _HALVES_ASM, "=r,=r,r", [codes], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
        )
    elif FLOAT:
        lower, upper = (codes & 15).to(tl.float16), (codes >> 4).to(tl.float16)
    else:
        lower, upper = (codes & 15).to(tl.int8), (codes >> 4).to(tl.int8)
    return lower, upper


@triton.jit
def load_query(
    query_codes_ptr,  # [num_heads, 2 * CODE_BYTES] int8, from the half's first channel on
    head,  # [COLUMNS]
    token,  # [COLUMNS], which token of a row a column is for
    mask,  # [COLUMNS]
    CODE_BYTES: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    FLOAT: tl.constexpr,
):
    """Half of the channels of the group's queries, [ROW_BYTES, COLUMNS], 0 where another token's codes are."""
    byte = tl.arange(0, ROW_BYTES)
    query = tl.load(
        query_codes_ptr + head[None, :] * (2 * CODE_BYTES) + (byte % CODE_BYTES)[:, None],
        mask=mask[None, :] & (byte[:, None] // CODE_BYTES == token[None, :]),
        other=0,
    )
    if FLOAT:
        query = query.to(tl.float16)
    return query


@triton.jit
def products(codes, query, accumulator, FLOAT: tl.constexpr, HEADS_FIRST: tl.constexpr):
    """`accumulator` [ROWS, COLUMNS] plus sums of products, by either orientation of the tensor cores' product."""
    dtype: tl.constexpr = tl.float32 if FLOAT else tl.int32
    if HEADS_FIRST:
        product = tl.dot(tl.trans(query), tl.trans(codes), acc=tl.trans(accumulator), out_dtype=dtype)
        return tl.trans(product)
    else:
        return tl.dot(codes, query, acc=accumulator, out_dtype=dtype)
