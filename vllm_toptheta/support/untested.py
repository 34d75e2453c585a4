"""What nobody has run is refused, unless somebody wants to try it."""

from __future__ import annotations

import os

from vllm_toptheta.limits import ALLOW_UNTESTED

TRY = f"try it with {ALLOW_UNTESTED}=1"


def allows_untested() -> bool:
    """Whether the environment lets this process try it."""
    return os.environ.get(ALLOW_UNTESTED) == "1"
