"""What makes up for the keys left out: the softmax denominator (SDC) and the mean of the values (VMC).

Source of the method: Top-Theta Attention, arXiv 2502.08363, sections on softmax denominator compensation and value
mean compensation.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from vllm_toptheta.reference.scores import count, kept
from vllm_toptheta.reference.thresholds import per_row

__all__ = ["FULL_COMPENSATION", "Compensation", "Denominator", "causal_value_mean"]

_MAX_RELATIVE_THRESHOLD = 60.0  # scaled logits

Denominator = Literal["none", "exact", "offline", "exp_threshold", "candidates", "shadow"]


@dataclass(frozen=True)
class Compensation:
    """How a row accounts for its discarded keys.

    With m the largest of the row's scores and its sink, if it has one, and kept = sum over the survivors of
    exp(s_j - m), the denominator is Z = kept + missing + exp(sink - m), the weights are exp(s_j - m) / Z and the lost
    mass is missing / Z. `denominator` says what is known of missing:

    * `none`: 0, so the weights of the survivors, and of a sink, add up to 1;
    * `exact`: the sum of exp(s_j - m) over the discarded keys, so Z is the dense denominator;
    * `offline`: `offline_sum`, the mean of that sum measured at calibration (0 where nothing is discarded);
    * `exp_threshold`: r * num_discarded * exp(theta - m). The paper has r = 1, which overestimates the missing mass
      about tenfold; r = mean of exp(s - theta) over discarded scores, measured at calibration, repairs it;
    * `candidates`: the sum of exp(s_j - m) over the discarded candidates, whose scores are known, and for each key that
      is no candidate r * exp(theta - m), with an r of those keys;
    * `shadow`: the sum of exp(s~_j - m) over the discarded keys, s~_j being the score of the shadow of a key that is no
      candidate, and the exact score of a candidate.

    With `value_mean`, lost mass times the mean of all value rows of the row is added to the output.

    Attributes:
        denominator: what the softmax denominator knows of the discarded keys.
        value_mean: whether the lost mass is given to the mean of the values.
        offline_sum: missing mass, relative to exp(m), not negative, read by `offline` only; a number or a tensor that
            broadcasts to `[num_queries, num_heads]`.
        exp_threshold_scale: r, not negative, read by `exp_threshold` and `candidates` only; a number or a tensor that
            broadcasts to `[num_queries, num_heads]`.

    Raises:
        ValueError: `denominator` is unknown, `offline` comes without `offline_sum`, or a quantity is negative.
    """

    denominator: Denominator = "exact"
    value_mean: bool = True
    offline_sum: Tensor | float | None = None
    exp_threshold_scale: Tensor | float = 1.0

    def __post_init__(self) -> None:
        if self.denominator not in get_args(Denominator):
            raise ValueError(f"denominator: {self.denominator!r} is none of {', '.join(get_args(Denominator))}")
        if self.denominator == "offline" and self.offline_sum is None:
            raise ValueError("offline_sum: the denominator 'offline' needs the sum measured at calibration")
        for field in ("offline_sum", "exp_threshold_scale"):
            quantity = getattr(self, field)
            if quantity is not None and bool((torch.as_tensor(quantity) < 0).any()):
                raise ValueError(f"{field}: cannot be negative")

    def select_rows(self, rows: slice, like: Tensor) -> "Compensation":
        """Returns the compensation of some query rows, as a caller needs that works on a part of them.

        Args:
            rows: which of the query rows.
            like: `[num_queries, num_heads]`, as for `thresholds.per_row`: all rows of the caller.
        """
        return dataclasses.replace(
            self,
            offline_sum=None if self.offline_sum is None else per_row("offline_sum", self.offline_sum, like)[rows],
            exp_threshold_scale=per_row("exp_threshold_scale", self.exp_threshold_scale, like)[rows],
        )

    def missing_mass(
        self,
        exponentials: Tensor,
        survivors: Tensor,
        num_discarded: Tensor,
        relative_threshold: Tensor,
        candidates: Tensor | None = None,
        estimates: Tensor | None = None,
    ) -> Tensor:
        """Returns what the denominator adds to the survivors' sum.

        Args:
            exponentials: `[num_queries, num_heads, seq_len]` float, exp(s_j - m), 0 at the keys that a row does not
                see.
            survivors: `[num_queries, num_heads, seq_len]` bool.
            num_discarded: `[num_queries, num_heads]` int64, keys seen and not kept.
            relative_threshold: `[num_queries, num_heads]` float, theta - m, scaled logits.
            candidates: the keys whose scores `candidates` knows, of the shape of `survivors` and among the keys that
                a row sees; None for other denominators.
            estimates: what `shadow` takes for `exponentials`, of their shape; None for other denominators.

        Returns:
            `[num_queries, num_heads]` of the dtype of `exponentials`, relative to exp(m); 0 where nothing is discarded.

        Raises:
            ValueError: `offline_sum` or `exp_threshold_scale` holds NaN or does not broadcast, or `candidates` or
                `shadow` comes without what it reads.
        """
        match self.denominator:
            case "exact":
                return kept(exponentials, ~survivors).sum(dim=-1)
            case "offline":
                assert self.offline_sum is not None  # noqa: S101 - checked when built
                offline_sum = per_row("offline_sum", self.offline_sum, relative_threshold)
                return torch.where(num_discarded > 0, offline_sum, 0.0)
            case "exp_threshold":
                return self._estimated_mass(num_discarded, relative_threshold)
            case "candidates":
                if candidates is None:
                    raise ValueError("candidates: the denominator 'candidates' needs them")
                known = candidates & ~survivors
                known_mass = kept(exponentials, known).sum(dim=-1)
                return known_mass + self._estimated_mass(num_discarded - count(known), relative_threshold)
            case "shadow":
                if estimates is None:
                    raise ValueError("shadow_scores: the denominator 'shadow' needs them")
                return kept(estimates, ~survivors).sum(dim=-1)
            case "none":
                return torch.zeros_like(relative_threshold)

    def _estimated_mass(self, num_keys: Tensor, relative_threshold: Tensor) -> Tensor:
        """What r makes of keys whose scores are unknown."""
        scale = per_row("exp_threshold_scale", self.exp_threshold_scale, relative_threshold)
        # a threshold above every score leaves no survivor, and then any finite mass loses everything, or what a sink
        # leaves: stopping far above changes no result and keeps the sum from overflowing
        return scale * num_keys * relative_threshold.clamp(max=_MAX_RELATIVE_THRESHOLD).exp()


# the paper's method where every key is scored: exact denominator and value mean
FULL_COMPENSATION = Compensation()


def causal_value_mean(value: Tensor, num_queries: int) -> Tensor:
    """Returns, for every query, the mean of the value rows that it sees.

    Args:
        value: `[seq_len, num_kv_heads, head_size]` float.
        num_queries: the queries are the last `num_queries` positions.

    Returns:
        `[num_queries, num_kv_heads, head_size]` of the dtype of `value`.
    """
    seq_len = value.shape[0]
    num_before = seq_len - num_queries
    row_lengths = torch.arange(num_before + 1, seq_len + 1, device=value.device)
    sums = value[:num_before].sum(dim=0) + value[num_before:].cumsum(dim=0)
    return sums / row_lengths[:, None, None]
