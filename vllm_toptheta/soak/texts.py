"""Whether what was generated under load is what the same server generates when it is left alone.

Greedy texts are compared token by token. After a first difference two runs go their own ways, so only that one counts,
and it is one only if the two best candidates of that step lay further apart than rounding moves them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pydantic import BaseModel, Field

from vllm_toptheta.soak.client import Outcome

AS_SERVED = "as served"  # of prompts that ask for nothing


class Texts(BaseModel):
    """A comparison with the quiet server's texts."""

    compared: int = Field(description="Answers with at least one token, those of clients that left included.")
    tokens: int = Field(description="Tokens up to the first differences.")
    equal: int = Field(description="Answers equal to the quiet server's as far as they go.")
    near_ties: int = Field(description="Answers that differ first where the two best candidates are a rounding apart.")
    different: list[str] = Field(description="The others: prompt, step and how far apart its candidates were.")
    largest_gap: float = Field(description="Between the two best candidates at a first difference, nats.")


def compare_by_choice(outcomes: Iterable[Outcome], quiet: Mapping[int, Outcome], rounding: float) -> dict[str, Texts]:
    """`compare` the answers of each choice of prompts, `AS_SERVED` first."""
    found: dict[str, list[Outcome]] = {AS_SERVED: []}
    for outcome in outcomes:
        found.setdefault(outcome.prompt.choice or AS_SERVED, []).append(outcome)
    return {choice: compare(of_choice, quiet, rounding) for choice, of_choice in found.items()}


def compare(outcomes: Iterable[Outcome], quiet: Mapping[int, Outcome], rounding: float) -> Texts:
    """Compare answers with those of the quiet server.

    Args:
        outcomes: Any; those without tokens are left out.
        quiet: The quiet server's, by the index of the prompt.
        rounding: Nats that the distance of two candidates may be moved by.
    """
    texts = Texts(compared=0, tokens=0, equal=0, near_ties=0, different=[], largest_gap=0.0)
    for outcome in outcomes:
        if not outcome.tokens:
            continue
        expected = quiet[outcome.prompt.index]
        texts.compared += 1
        pairs = zip(outcome.tokens, expected.tokens, strict=False)
        step = next((step for step, (one, other) in enumerate(pairs) if one != other), None)
        texts.tokens += len(outcome.tokens) if step is None else step
        if step is None:
            texts.equal += 1
            continue
        gap = max(outcome.gaps[step], expected.gaps[step])
        texts.largest_gap = max(texts.largest_gap, gap)
        if gap < rounding:
            texts.near_ties += 1
        else:
            texts.different.append(f"prompt {outcome.prompt.index}, token {step}: {gap:.4f} nats apart")
    return texts
