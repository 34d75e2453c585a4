"""How many programs each kv head gets in mode `values`, by what its keys and values were to read before.

Heads of a layer keep very different numbers of keys, and the same heads do from step to step. All programs run at the
same time, so a step takes as long as the one that reads most.
"""

from __future__ import annotations

from collections.abc import Sequence

VALUE_WORK = 2.4  # of a value row that is gathered, measured beside that of a key that is scanned (docs/lab.md)
MOST_OF_A_HEAD = 4  # times as many programs as heads have on average: a head reads all values at most, another none


def balance(rows_read: Sequence[int], rows_cached: int, num_programs: int) -> list[int]:
    """Share out programs so that the largest work of one is as small as whole programs allow.

    Args:
        rows_read: Value rows of each kv head.
        rows_cached: Of a kv head; its keys are all scanned.
        num_programs: Of a kv head, on average.
    """
    # no more than all, or a head had more programs than there is room for
    work = [rows_cached + VALUE_WORK * min(rows, rows_cached) for rows in rows_read]
    total = num_programs * len(work)
    # nearly all at once, the last ones by turns to whoever has the largest share
    programs = [max(1, int(one * total / sum(work)) - 1) for one in work]
    for _ in range(total - sum(programs)):
        programs[max(range(len(work)), key=lambda head: work[head] / programs[head])] += 1
    return programs


def largest_share(rows_read: Sequence[int], rows_cached: int, programs: Sequence[int]) -> float:
    """The largest work of a program, in keys."""
    return max((rows_cached + VALUE_WORK * rows) / number for rows, number in zip(rows_read, programs, strict=True))
