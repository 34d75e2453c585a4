"""Whether live traffic loses more than the evidence of a promise knew.

Where the promise was measured, one token of a query head in a hundred lost more than the p99 of its layer. The watch
looks at the same share of live tokens, window by window, and raises an alarm where it is a few times that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vllm_toptheta.limits import NUM_LOST_MASS_BUCKETS, first_bucket_above

# Three times the 1 % that the p99 leaves, mean of the layers: buckets that the p99 lies in do not count, so text like
# that measured stays far below 1 %. With SmolLM2 at floor 2, of 108 windows of 64 tokens none had more than 1.7 %,
# prose, code and legal text each watched by the evidence of each.
MAX_SHARE = 0.03
# of MAX_SHARE: what ends an alarm, so that it does not swing
CALM = 0.5


@dataclass(eq=False)
class LossWatch:
    """What is watched in the layers of one rank.

    Attributes:
        known: p99 of the lost mass by layer, of the evidence; layers of which no bucket lies above it are left out.
        shares: By layer, the share of the last window's tokens, of all heads, in buckets wholly above `known`.
        is_alarming: Whether their mean was too large, and has not been calm since.
        alarms: How often that began.
    """

    known: Mapping[int, float]
    shares: dict[int, float] = field(default_factory=dict)
    is_alarming: bool = False
    alarms: int = 0

    def __post_init__(self) -> None:
        self.known = {
            layer: mass for layer, mass in self.known.items() if first_bucket_above(mass) < NUM_LOST_MASS_BUCKETS
        }

    @property
    def share(self) -> float | None:
        """Mean over the layers, which have as many tokens each; None before the first window."""
        return sum(self.shares.values()) / len(self.shares) if self.shares else None

    def observe(self, shares: Mapping[int, float]) -> bool:
        """Take in a window; return whether an alarm began or ended.

        Args:
            shares: By layer, those of its tokens beyond what the evidence knew.
        """
        self.shares.update(shares)
        share = self.share or 0.0
        before = self.is_alarming
        self.is_alarming = share > (CALM * MAX_SHARE if before else MAX_SHARE)
        self.alarms += self.is_alarming and not before
        return self.is_alarming != before
