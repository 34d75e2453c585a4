"""The guard: what happens to a layer whose thresholds lose more of live traffic than they may.

The lost mass of every decoded token is known exactly. The guard looks at windows of tokens: when more than `limit` of a
window has lost more than the bound, the layer's thresholds are lowered by a step, down to none at all (dense). It
raises them again when windows have been calm for a while, and waits twice as long each time that this proved wrong, so
that it does not swing between two steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vllm_toptheta.limits import DEFAULT_MAX_LOST_MASS, LOST_MASS_EDGES, first_bucket_above

# by how much thresholds are lowered at each level, in scaled logits; at the last one every key is kept
RELAXATION = (0.0, 0.5, 1.0, 2.0, 3.0, math.inf)
CALM = 0.5  # of the limit: what counts as calm
FIRST_PATIENCE, LONGEST_PATIENCE = 4, 256  # calm windows before thresholds are raised by a step


@dataclass
class LayerGuard:
    """The state of one layer.

    Attributes:
        limit: Share of tokens that may lose more than the bound.
        max_lost_mass: What a token of a query head may lose; the bound is the edge of the histogram above it.
        level: Index into `RELAXATION`.
        patience: Calm windows that it takes to go back a level.
        calm: Calm windows so far, in a row.
        is_probing: Whether the last step was back, and no window since has confirmed it.
        share_above: That of the last window.
        alarms: Windows above the limit so far.
    """

    limit: float
    max_lost_mass: float = DEFAULT_MAX_LOST_MASS
    level: int = 0
    patience: int = FIRST_PATIENCE
    calm: int = 0
    is_probing: bool = False
    share_above: float = 0.0
    alarms: int = 0

    @property
    def first_above(self) -> int:
        """The first bucket of lost mass that lies wholly above the bound."""
        return first_bucket_above(self.max_lost_mass)

    @property
    def bound(self) -> float:
        """`max_lost_mass`, rounded up to an edge of the histogram."""
        return LOST_MASS_EDGES[self.first_above - 1]

    @property
    def relaxation(self) -> float:
        """By how much the layer's thresholds are lowered, scaled logits; infinite where it is dense."""
        return RELAXATION[self.level]

    def observe(self, share_above: float) -> bool:
        """Take in a window of tokens; return whether `level` changed.

        Args:
            share_above: Share of the window's tokens, of all heads, whose lost mass lies above the bound.
        """
        self.share_above = share_above
        if share_above > self.limit:
            self.alarms += 1
            if self.is_probing:
                self.patience = min(2 * self.patience, LONGEST_PATIENCE)
            self.is_probing, self.calm = False, 0
            return self._move(+1)
        if share_above > CALM * self.limit:
            self.calm = 0
            return False
        self.calm += 1
        if self.level and self.calm >= self.patience:
            self.is_probing, self.calm = True, 0
            return self._move(-1)
        if self.calm >= self.patience:
            # nothing to go back from: what was learnt about an earlier text is forgotten
            self.is_probing, self.patience = False, FIRST_PATIENCE
        return False

    def _move(self, step: int) -> bool:
        before = self.level
        self.level = min(max(self.level + step, 0), len(RELAXATION) - 1)
        return self.level != before
