"""Which rows of a sequence are looked at: lengths in buckets, and rows drawn evenly from them."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["bucket_of", "length_buckets", "measured_lengths", "sample_lengths"]

NUM_BUCKETS = 14
# one sequence in so many is measured: a pass of its own for each target, for figures that vary little
MEASURED_SHARE = 4
# of all sequences together; bounds memory, and makes short contexts count as much as long ones
MEASURED_ROWS_PER_BUCKET = 64


def length_buckets(min_length: int, max_length: int, num_buckets: int) -> NDArray[np.int32]:
    """Cuts a range of row lengths into buckets whose edges grow by about one ratio.

    Args:
        min_length: shortest row, tokens.
        max_length: longest row, tokens, at least `min_length`.
        num_buckets: buckets wanted, at least 1; fewer come out where lengths are too few to fill them.

    Returns:
        `[num_buckets + 1]` int32, ascending: bucket i holds the lengths edges[i] <= n < edges[i + 1], the first edge
        is `min_length` and the last `max_length + 1`.
    """
    edges = np.geomspace(min_length, max_length + 1, num_buckets + 1).round()
    return np.unique(edges).astype(np.int32)


def bucket_of(lengths: NDArray[np.int64], edges: NDArray[np.int32]) -> NDArray[np.int64]:
    """Returns the bucket of each length.

    Args:
        lengths: tokens, within the buckets.
        edges: `[num_buckets + 1]`, as `length_buckets` returns them.
    """
    return np.searchsorted(edges, lengths, side="right") - 1


def sample_lengths(edges: NDArray[np.int32], seq_len: int, num_rows: int, seed: Sequence[int]) -> NDArray[np.int64]:
    """Draws rows of a sequence, as many from each length bucket as possible.

    Half of all rows are longer than half the sequence, so rows drawn alike would leave short contexts to chance. A
    bucket with fewer rows than its share gives all of them, and the others share what is left.

    Args:
        edges: `[num_buckets + 1]`, as `length_buckets` returns them.
        seq_len: rows that the sequence has; row i sees i + 1 keys.
        num_rows: rows to draw; all rows within the buckets if there are not more.
        seed: the same seed gives the same rows.

    Returns:
        The lengths of the rows drawn, ascending int64.
    """
    generator = np.random.default_rng(seed)
    buckets = [
        np.arange(first, min(end, seq_len + 1))
        for first, end in zip(edges, edges[1:], strict=False)
        if first <= seq_len
    ]
    drawn: list[NDArray[np.int64]] = []
    left = num_rows
    # the smallest first, so that what they lack is known before the larger ones get their share
    for index, bucket in enumerate(sorted(buckets, key=len)):
        share = min(len(bucket), left // (len(buckets) - index))
        drawn.append(generator.choice(bucket, share, replace=False))
        left -= share
    return np.sort(np.concatenate(drawn)).astype(np.int64)


def measured_lengths(
    min_length: int, max_length: int, *, num_sequences: int, seed: int
) -> tuple[NDArray[np.int32], list[NDArray[np.int64]]]:
    """Draws the rows to measure of the first of some sequences.

    Args:
        min_length: shortest row, tokens.
        max_length: tokens of each sequence.
        num_sequences: sequences that there are; one in `MEASURED_SHARE` is measured.
        seed: the same seed gives the same rows.

    Returns:
        The edges of the length buckets, and of each measured sequence the lengths of its rows, as `sample_lengths`
        returns them.
    """
    edges = length_buckets(min_length, max_length, NUM_BUCKETS)
    num_measured = -(-num_sequences // MEASURED_SHARE)
    num_rows = (len(edges) - 1) * max(1, MEASURED_ROWS_PER_BUCKET // num_measured)
    return edges, [sample_lengths(edges, max_length, num_rows, (seed, 1, index)) for index in range(num_measured)]
