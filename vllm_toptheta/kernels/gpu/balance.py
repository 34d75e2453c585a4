"""How many programs each kv head gets of a GPU's kernel in CUDA C++, by what was read for it before.

Heads of a layer keep very different numbers of keys, and the same heads do from step to step. All programs run at the
same time, so a step takes as long as the one that has most work. Work is in keys that are scanned.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_toptheta.kernels.contract import Counters

VALUE_WORK = 2.4  # of a value row that is gathered, measured beside that of a key that is scanned (docs/lab.md)
LIGHT_WORK, HEAVY_WORK = 2.0, 8.0  # of a key that is weighed by its copy, and of one that is read exactly; likewise
MOST_OF_A_HEAD = 4  # times as many programs as heads have on average, because no key is more work than that


def counted_of(counters: Counters) -> torch.Tensor:
    """What work is known by, int64: rows cached, then of kv heads value rows read, or keys and copies if any."""
    if counters.keys_read is not None and counters.copies_read is not None:
        return torch.cat([counters.totals[2:3], counters.keys_read, counters.copies_read])
    return torch.cat([counters.totals[2:3], counters.value_rows_read])


def work_of(counted: Sequence[int], num_kv_heads: int) -> list[float]:
    """Work of kv heads, by what `counted_of` has counted of a number of steps."""
    rows_cached, *read = counted
    if len(read) > num_kv_heads:
        return tiers_work(read[:num_kv_heads], read[num_kv_heads:], rows_cached)
    return values_work(read, rows_cached)


def values_work(rows_read: Sequence[int], rows_cached: int) -> list[float]:
    """Work of kv heads in mode `values`.

    Args:
        rows_read: Value rows of each kv head.
        rows_cached: Of a kv head; its keys are all scanned.
    """
    return [rows_cached + VALUE_WORK * min(rows, rows_cached) for rows in rows_read]


def tiers_work(keys_read: Sequence[int], copies_read: Sequence[int], rows_cached: int) -> list[float]:
    """Work of kv heads whose keys have copies.

    Args:
        keys_read: Keys of each kv head that were read exactly.
        copies_read: Values that were read as copies.
        rows_cached: Of a kv head; the copies of its keys are all scanned.
    """
    return [
        min(rows_cached + LIGHT_WORK * light + HEAVY_WORK * heavy, MOST_OF_A_HEAD * rows_cached)
        for light, heavy in zip(copies_read, keys_read, strict=True)
    ]


def balance(work: Sequence[float], num_programs: int) -> list[int]:
    """Share out programs so that the largest work of one is as small as whole programs allow.

    Args:
        work: Of each kv head, of which none is more than `MOST_OF_A_HEAD` times another.
        num_programs: Of a kv head, on average.
    """
    total = num_programs * len(work)
    # nearly all at once, the last ones by turns to whoever has the largest share
    programs = [max(1, int(one * total / sum(work)) - 1) for one in work]
    for _ in range(total - sum(programs)):
        programs[max(range(len(work)), key=lambda head: work[head] / programs[head])] += 1
    return programs


def largest_share(work: Sequence[float], programs: Sequence[int]) -> float:
    """The largest work of a program."""
    return max(one / number for one, number in zip(work, programs, strict=True))
