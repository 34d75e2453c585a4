"""Outcomes and prompts made up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from vllm_toptheta.soak.client import Outcome
from vllm_toptheta.soak.traffic import Behaviour, Prompt

PROMPT = Prompt(index=0, token_ids=tuple(range(20)), max_tokens=4)


@pytest.fixture
def make_outcome() -> Callable[..., Outcome]:
    """An outcome of `PROMPT`, finished unless said otherwise."""

    def make(tokens: str = "", gaps: list[float] | None = None, **changes: Any) -> Outcome:
        fields: dict[str, Any] = {"prompt": PROMPT, "behaviour": Behaviour.WHOLE, "ending": "finished", **changes}
        return Outcome(tokens=list(tokens), gaps=gaps or [1.0] * len(tokens), **fields)

    return make
