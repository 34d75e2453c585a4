"""Which pages a sequence fills in a step of any number of tokens: whoever writes a page's tail asks here."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def filled_pages(tokens, query_start_loc_ptr, seq, BLOCK_SIZE: tl.constexpr):
    """Return the page that a sequence's new tokens begin in, and the one behind the last that they fill.

    Args:
        tokens: `Tokens`.
        query_start_loc_ptr: [num_seqs + 1] int32.
        seq: int64, the sequence.
        BLOCK_SIZE: Tokens of a page.
    """
    seq_len = tl.load(tokens.seq_lens + seq)
    query_len = tl.load(query_start_loc_ptr + seq + 1) - tl.load(query_start_loc_ptr + seq)
    return tl.maximum(seq_len - query_len, 0) // BLOCK_SIZE, seq_len // BLOCK_SIZE
