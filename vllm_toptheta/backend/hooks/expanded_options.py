"""Has CPUs verify drafts by the temperatures that requests ask for.

Replaces `rejection_sampler.expand_batch_to_tokens` (0.26 to 0.33), which repeats each request's temperature, top-k and
top-p for each of its drafts. On CPUs without Triton it fills a copy of another dtype, and returns what was allocated
(https://github.com/vllm-project/vllm/pull/42638, closed): samples have a wrong distribution then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vllm_toptheta.backend.hooks.patch import replace


def install() -> None:
    """Let drafts be verified rightly on this CPU; called in workers that speculate."""
    from vllm.v1.sample import rejection_sampler

    replace(rejection_sampler, "expand_batch_to_tokens", _expanding)


def _expanding(expand_batch_to_tokens: Callable[..., Any]) -> Callable[..., Any]:
    def expand(
        x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
    ) -> torch.Tensor:
        counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
        replaced = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
        return replaced.repeat_interleave(counts.long(), output_size=num_tokens)

    return expand
