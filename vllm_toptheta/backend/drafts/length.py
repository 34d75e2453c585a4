"""How many tokens to draft, by what was fastest for loads like this one.

What a draft gains depends on how many are accepted, and on how much less a sparse step costs than a dense one, which
depends on the model, the card, the batch and its context. None of it has to be known: numbers of drafts are tried for a
few steps each, the fastest one is kept, and the others are tried again from time to time, because texts change: the
more seldom, the more time it took. None at all is among them, so a load that drafts would slow down goes without.

Many loads are passed through in a few steps only, as requests come and go. A load that is new begins with what is known
of the one next to it, if that is where the engine comes from; and a number that is tried again when the load ends is
not tried on when it comes back.

Answers do not depend on it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

SETTLING = 3  # steps after a change that may still hold what was scheduled before it, and are not timed
WINDOW = 12  # steps that are timed before there is a choice
CHANGED = 1.3  # times as fast or as slow as before is no longer the same
TRIALS = 0.01  # share of the time that trying one number again may waste
MOST_TRIALS = 0.05  # and that it may take, where it wastes nothing
OF_LAST = 0.5  # share of the last window in what is kept
WORTH = 1.03  # times as fast as none must drafts be, because requests of a batch end one after the other


class Load(NamedTuple):
    """What an engine decodes, in powers of two: loads that are alike are decoded at the same speed.

    Attributes:
        num_seqs: Sequences.
        length: Their mean length, tokens.
    """

    num_seqs: int
    length: int

    @classmethod
    def of(cls, num_seqs: int, num_tokens: int) -> Load:
        """The load of so many sequences that hold so many tokens together."""
        return cls(num_seqs.bit_length(), (num_tokens // max(1, num_seqs)).bit_length())

    def is_next_to(self, other: Load) -> bool:
        """Whether what is known of one says something of the other."""
        return abs(self.num_seqs - other.num_seqs) <= 1 and abs(self.length - other.length) <= 1


@dataclass
class _Timed:
    """A number of drafts.

    Attributes:
        seconds: Per token of a sequence.
        trial: Seconds that it takes to time it again.
        when: Seconds of its load when it was timed last.
    """

    seconds: float
    trial: float
    when: float


@dataclass
class _Known:
    """What is known of a load.

    Attributes:
        choice: How many are drafted.
        timed: What they took, by numbers of drafts.
        total: Seconds that were timed in all.
        steps: Steps of the window that is open.
        taken: Seconds that they took.
        tokens: Tokens that a sequence got in them, in the mean.
        is_borrowed: Whether what is timed is so of another load, the numbers of which stand in the same proportion.
    """

    choice: int
    timed: dict[int, _Timed] = field(default_factory=dict)
    total: float = 0.0
    steps: int = 0
    taken: float = 0.0
    tokens: float = 0.0
    is_borrowed: bool = False

    @property
    def best(self) -> int:
        """The fastest of what was timed; none, unless drafts are worth it."""
        return min(self.timed, key=lambda choice: self.timed[choice].seconds * (WORTH if choice else 1.0))

    def borrow(self, other: _Known) -> None:
        """Begin with what is known of another load, all of it as if it had just been timed."""
        if self.timed or not other.timed:
            return
        self.timed = {choice: replace(one, when=self.total) for choice, one in other.timed.items()}
        self.choice, self.is_borrowed = self.best, True
        self._open()

    def leave(self) -> None:
        """End what is tried again."""
        if self.choice in self.timed and self.choice != self.best:
            self.timed[self.choice].when = self.total
            self.choice = self.best
            self._open()

    def close(self, choices: Iterable[int]) -> None:
        """Take the open window into what is known, choose among `choices`, and open another."""
        seconds = self.taken / max(self.tokens, 1e-9)
        before = self.timed.get(self.choice)
        if before is not None and self.is_borrowed:
            ratio = seconds / before.seconds
            for one in self.timed.values():
                one.seconds *= ratio
                one.trial *= ratio
        elif before is not None:
            if not before.seconds <= CHANGED * seconds <= CHANGED**2 * before.seconds:
                # other texts, of which the other numbers say nothing
                self.timed.clear()
            else:
                seconds = before.seconds + OF_LAST * (seconds - before.seconds)
        self.total += self.taken
        trial = self.taken * (WINDOW + SETTLING) / WINDOW
        self.timed[self.choice] = _Timed(seconds, trial, self.total)
        self.is_borrowed = False
        self._open()
        best = self.best
        self.choice = next((one for one in choices if self._is_due(one, best)), best)

    def _open(self) -> None:
        """Begin a window."""
        self.steps, self.taken, self.tokens = 0, 0.0, 0.0

    def _is_due(self, choice: int, best: int) -> bool:
        if choice not in self.timed:
            return True
        one, since = self.timed[choice], self.total - self.timed[choice].when
        # of `one.trial`, what the best number would have taken is no waste
        waste = one.trial * (one.seconds - self.timed[best].seconds)
        return choice != best and waste <= TRIALS * since * one.seconds and one.trial <= MOST_TRIALS * since


class DraftLength:
    """How many tokens to draft; stands in the place of vLLM's table by batch size.

    Args:
        choices: Numbers of drafts that the engine has graphs for.
        clock: Seconds.

    Attributes:
        current: How many are drafted.
    """

    def __init__(self, choices: Iterable[int], clock: Callable[[], float] = time.perf_counter) -> None:
        # the most first: it is what an operator allows
        self._choices = sorted(set(choices), reverse=True)
        self._clock = clock
        self._known: dict[Load, _Known] = {}
        self._load: Load | None = None
        self._unsettled, self._last = SETTLING, clock()
        self.current = self._choices[0]

    def __getitem__(self, num_seqs: int) -> int:
        """How many to draft for a batch, as vLLM asks its table."""
        return self.current

    def step(self, num_seqs: int, num_cached: int, num_tokens: int, *, is_plain: bool) -> None:
        """Take in that a step has ended, and choose.

        Args:
            num_seqs: Sequences in it.
            num_cached: Tokens that they hold together.
            num_tokens: Tokens that they got.
            is_plain: Whether no prompt was computed in it, and the engine did not wait for requests before it.
        """
        now = self._clock()
        seconds, self._last = now - self._last, now
        if not is_plain or not num_seqs:
            self._unsettled = max(self._unsettled, 1)  # the next one may overlap with it
            return
        load = Load.of(num_seqs, num_cached)
        known = self._known.setdefault(load, _Known(self.current))
        if self._load is not None and load != self._load:
            before = self._known[self._load]
            before.leave()
            if load.is_next_to(self._load):
                known.borrow(before)
        self._load = load
        if known.choice != self.current:
            self._change(known.choice)
        elif self._unsettled:
            self._unsettled -= 1
        else:
            known.steps += 1
            known.taken += seconds
            known.tokens += num_tokens / num_seqs
            if known.steps == WINDOW:
                known.close(self._choices)
                if known.choice != self.current:
                    self._change(known.choice)

    def _change(self, choice: int) -> None:
        self.current, self._unsettled = choice, SETTLING
