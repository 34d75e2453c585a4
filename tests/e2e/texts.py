"""Prompts, and how two greedy texts are compared.

After a first difference two greedy runs go their own ways. A difference is one only if the two best candidates of that
step lay further apart than rounding can move them; what stands behind one that is excused is not compared.
"""

from __future__ import annotations

import math
from typing import Any

import torch

ON_GPU = torch.cuda.is_available()
# nats between the two best tokens: float32 with other summation orders stays well below, as does float16 on the GPU
ROUNDING = 0.05 if ON_GPU else 5e-3
# of the tokens: float32 parts hardly ever, whereas float16 may early in one of three prompts
LEAST_COMPARED = 0.5 if ON_GPU else 0.9


def cut(text_ids: list[int], lengths: list[int]) -> list[list[int]]:
    """Prompts of these lengths, each from another place of the text."""
    starts = [index * 97 for index in range(len(lengths))]
    return [text_ids[start : start + length] for start, length in zip(starts, lengths, strict=True)]


def assert_same_text(
    actual: list[dict[str, Any]],
    expected: list[dict[str, Any]],
    rounding: float = ROUNDING,
    least_compared: float = LEAST_COMPARED,
) -> None:
    """Compare outputs of `generate`, prompt by prompt.

    Args:
        actual, expected: The outputs.
        rounding: Nats between the two best tokens up to which either may be chosen.
        least_compared: Share of the tokens that stand before any difference.
    """
    compared = total = 0
    for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
        # answers that are no numbers are all alike
        assert all(math.isfinite(best) for run in (one, other) for best, *_ in run["top2"]), f"prompt {index}"
        pairs = zip(one["token_ids"], other["token_ids"], strict=True)
        step = next((step for step, (a, b) in enumerate(pairs) if a != b), None)
        total += len(one["token_ids"])
        compared += len(one["token_ids"]) if step is None else step + 1
        if step is not None:
            gap = max(run["top2"][step][0] - run["top2"][step][1] for run in (one, other))
            assert gap < rounding, (
                f"prompt {index}, token {step}: {one['token_ids'][step:]} {other['token_ids'][step:]}"
            )
    assert compared >= least_compared * total > 0, f"{compared} of {total} tokens compared"
