"""What nobody has run is refused, unless somebody wants to try it."""

from __future__ import annotations

import os

from vllm_toptheta.limits import ALLOW_UNTESTED

TRY = f"try it with {ALLOW_UNTESTED}=1"

# whose kernel of mode `values` in CUDA C++ no card has run
_UNTESTED_HEADS = (96,)


def allows_untested() -> bool:
    """Whether the environment lets this process try it."""
    return os.environ.get(ALLOW_UNTESTED) == "1"


def allows_heads(head_size: int) -> bool:
    """Whether the kernel of mode `values` in CUDA C++ is taken for heads of a size; that in Triton is, if not."""
    return head_size not in _UNTESTED_HEADS or allows_untested()
