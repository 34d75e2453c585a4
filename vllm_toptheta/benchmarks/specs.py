"""Batches that are timed, in vLLM's grammar: requests, new tokens of each, and the context that they end."""

from __future__ import annotations

import re

from vllm_toptheta.errors import BenchmarkError
from vllm_toptheta.limits import MAX_QUERY_LEN

_SPEC = re.compile(r"(\d*)q(\d+)(k?)(?:s(\d+)(k?))?")


def parse_spec(spec: str) -> list[int]:
    """Context lengths of a batch in vLLM's grammar, parts joined by underscores: 2q1s32k_30q1s1k.

    Raises:
        BenchmarkError: It is malformed, or a request has more than one new token.
    """
    lens, query_len = parse_batch(spec)
    if query_len != 1:
        raise BenchmarkError(f"{spec!r} has requests of several new tokens, where only decoding is measured")
    return lens


def parse_batch(spec: str) -> tuple[list[int], int]:
    """Like `parse_spec`, and the new tokens of each request, the last ones of its context: 4 of 32q4s32k.

    Raises:
        BenchmarkError: It is malformed, or requests differ in their new tokens, or have more than kernels take.
    """
    lens: list[int] = []
    query_lens = set()
    for part in spec.split("_"):
        match = _SPEC.fullmatch(part)
        if match is None:
            raise BenchmarkError(f"{spec!r} is no batch", remedy="Write <requests>q1s<context>, as in 32q1s32k")
        requests, query, query_unit, context, context_unit = match.groups()
        if not 1 <= int(query) <= MAX_QUERY_LEN or query_unit:
            raise BenchmarkError(
                f"{spec!r} has requests of {query}{query_unit} new tokens, not of 1 to {MAX_QUERY_LEN}"
            )
        query_lens.add(int(query))
        length = int(context or query) * (1024 if context_unit else 1)
        if not length or requests == "0":
            raise BenchmarkError(f"{spec!r} has no requests or no context")
        lens += [length] * int(requests or 1)
    if len(query_lens) > 1:
        raise BenchmarkError(f"{spec!r} has requests of different numbers of new tokens")
    return lens, query_lens.pop()
