"""What a program of the decode kernels finds out and works out, bound together; all of it is in registers.

Triton takes named tuples for these too, and compiles what it would for their fields one by one.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Share(NamedTuple):
    """What a program has to do of a step.

    Attributes:
        kv_head: int64, whose keys it reads.
        program: Its number among those of the kv head.
        num_kv_heads: Of the step.
        max_dense_len: The longest sequence that keeps every key in this step.
        size: Work of a share.
        entry: Work of each sequence before its first unit.
        multiple: What the work of each sequence is rounded up to a multiple of.
        end: Where it ends, in work.
    """

    kv_head: Any
    program: Any
    num_kv_heads: Any
    max_dense_len: Any
    size: Any
    entry: Any
    multiple: Any
    end: Any


class Group(NamedTuple):
    """The kv head of a program, and the query heads that share it.

    Attributes:
        kv_head: int64.
        mask, head: [G_PAD], which queries there are, and the numbers of their heads.
        number: [G_PAD], which of a sequence's new tokens they are of.
        scale: Factor on products of their queries and keys, as these are stored.
        key_base: Where its keys start in the cache.
        list_index: int64, which of the lists are the program's.
    """

    kv_head: Any
    mask: Any
    head: Any
    number: Any
    scale: Any
    key_base: Any
    list_index: Any


class Units(NamedTuple):
    """What a program has to do of a sequence.

    Attributes:
        seq: The sequence.
        seq_len: Its tokens.
        is_dense: Whether it keeps everything.
        first, end: The first unit that is the program's, and the one behind its last.
    """

    seq: Any
    seq_len: Any
    is_dense: Any
    first: Any
    end: Any


class Span(NamedTuple):
    """The keys of a piece.

    Attributes:
        block_row: Where the blocks of the sequence start.
        start, end: Positions in the sequence.
        token: The new token whose query it is: one for all, or, of several, [G_PAD].
        seen: Where keys end that the token sees, likewise.
    """

    block_row: Any
    start: Any
    end: Any
    token: Any
    seen: Any


class Walked(NamedTuple):
    """What a walk of listed keys adds up; by lane, so that it reduces nothing but the maximum.

    Attributes:
        output: [D_PAD, G_PAD] float32, weighted values.
        maximum: [G_PAD] float32.
        lane_kept, lane_lost: [WALK_TILE, G_PAD] float32, weights of survivors and of other keys.
        lane_read: [WALK_TILE] int32, rows of values.
    """

    output: Any
    maximum: Any
    lane_kept: Any
    lane_lost: Any
    lane_read: Any


class Piece(NamedTuple):
    """A piece of a sequence.

    Attributes:
        output: [D_PAD, G_PAD] float32, weighted values.
        maximum, kept_sum, lost_sum: [G_PAD] float32.
        value_rows_read, keys_read, copies_read: int32.
    """

    output: Any
    maximum: Any
    kept_sum: Any
    lost_sum: Any
    value_rows_read: Any
    keys_read: Any
    copies_read: Any
