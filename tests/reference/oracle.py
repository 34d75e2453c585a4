"""An independent oracle: Top-Theta attention as loops over Python floats, one key at a time."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Row:
    """What the loops give for one query and head."""

    output: list[float]
    survivors: set[int]
    lost_mass: float


def scores_of_row(
    query: Sequence[float], keys: Sequence[Sequence[float]], softmax_scale: float, soft_cap: float | None
) -> list[float]:
    scores = [softmax_scale * sum(q * k for q, k in zip(query, key, strict=True)) for key in keys]
    return scores if soft_cap is None else [soft_cap * math.tanh(score / soft_cap) for score in scores]


def attend_row(
    scores: Sequence[float],
    values: Sequence[Sequence[float]],
    *,
    threshold: float,
    target_k: int,
    placement: str,
    denominator: str,
    value_mean: bool,
    offline_sum: float,
    exp_threshold_scale: float,
    cap_k: int | None,
    sink: float | None = None,
) -> Row:
    n = len(scores)
    largest = max(scores) if sink is None else max(*scores, sink)
    of_sink = 0.0 if sink is None else math.exp(sink - largest)
    exact = sum(math.exp(score - largest) for score in scores) + of_sink
    theta = threshold
    if placement == "post_softmax":
        theta = largest + math.log(exact) + math.log(threshold)
        survivors = [j for j in range(n) if math.exp(scores[j] - largest) / exact >= threshold]
    else:
        survivors = [j for j in range(n) if scores[j] >= threshold]
    if cap_k is not None:
        survivors = survivors[-cap_k:]
    if n <= target_k:
        survivors = list(range(n))

    kept = sum(math.exp(scores[j] - largest) for j in survivors)
    num_discarded = n - len(survivors)
    if denominator == "none":
        total = kept + of_sink
    elif denominator == "exact":
        total = exact
    elif denominator == "offline":
        total = kept + of_sink + (offline_sum if num_discarded else 0.0)
    else:
        total = kept + of_sink + exp_threshold_scale * num_discarded * math.exp(theta - largest)

    weights = {j: math.exp(scores[j] - largest) / total for j in survivors}
    lost_mass = 1.0 - sum(weights.values()) - (of_sink / total if total else 0.0)
    output = [0.0] * len(values[0])
    for d in range(len(output)):
        output[d] = sum(weight * values[j][d] for j, weight in weights.items())
        if value_mean:
            output[d] += lost_mass * sum(value[d] for value in values) / n
    return Row(output, set(survivors), lost_mass)


def make_inputs(
    seed: int,
    *,
    num_queries: int,
    seq_len: int,
    num_kv_heads: int,
    num_queries_per_kv: int,
    head_size: int,
    dtype: torch.dtype = torch.float64,
    integers: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns query, key and value; with `integers` products are exact, so that ties are ties."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        if integers:
            return torch.randint(-2, 3, shape, generator=generator).to(dtype)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return (
        draw(num_queries, num_kv_heads * num_queries_per_kv, head_size),
        draw(seq_len, num_kv_heads, head_size),
        draw(seq_len, num_kv_heads, head_size),
    )
