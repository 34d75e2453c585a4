"""What a few sequences let expect of a floor, before others confirm it.

The change of perplexity on a few sequences says little: rounding alone moves it by tenths of a percent. Two figures of
the same sequences say more.

KL divergence   is the change to expect where text is as likely as the dense model thinks, and varies ten times less.
                What the lowest floor shows of it is rounding in 16 bits, which moves perplexity either way, so it does
                not count.
spread          between sequences is mostly that rounding, alike with every floor: all floors tell it together.
"""

import math
from collections.abc import Sequence

from vllm_toptheta.evaluation.paired import upper_bound
from vllm_toptheta.store import MeasuredLength

__all__ = ["expect"]

Measured = Sequence[Sequence[MeasuredLength]]


def expect(ladder: Measured, num_sequences: int, *, confidence: float) -> list[list[MeasuredLength]]:
    """Returns what as many sequences as confirm would show of each floor, by floor and length as given.

    KL divergence is as measured. The change of perplexity is what KL lets expect, or what was measured where that is
    larger even at the lower end of its interval.

    Args:
        ladder: what was measured, by ascending floor and length; the lengths are the same with each floor.
        num_sequences: that will confirm.
        confidence: from .5 to 1, with which bounds hold.
    """
    columns = [_expect_at_length(column, num_sequences, confidence) for column in zip(*ladder, strict=True)]
    return [list(row) for row in zip(*columns, strict=True)]


def _expect_at_length(floors: Sequence[MeasuredLength], num_sequences: int, confidence: float) -> list[MeasuredLength]:
    rounding = min(one.kl_divergence for one in floors)
    spread = math.sqrt(sum(one.change_error**2 for one in floors) / len(floors))

    def expect_one(one: MeasuredLength) -> MeasuredLength:
        fewer_errors = math.sqrt(one.num_sequences / num_sequences)
        by_kl = 100 * math.expm1(one.kl_divergence - rounding)
        surely = -upper_bound(-one.change_percent, one.change_error, one.num_sequences, confidence=confidence)
        change, change_error, kl_error = max(by_kl, surely), spread * fewer_errors, one.kl_error * fewer_errors
        return one.model_copy(
            update={
                "num_sequences": num_sequences,
                "num_tokens": one.num_tokens * num_sequences // one.num_sequences,
                "change_percent": change,
                "change_error": change_error,
                "change_bound": upper_bound(change, change_error, num_sequences, confidence=confidence),
                "kl_error": kl_error,
                "kl_bound": upper_bound(one.kl_divergence, kl_error, num_sequences, confidence=confidence),
            }
        )

    return [expect_one(one) for one in floors]
