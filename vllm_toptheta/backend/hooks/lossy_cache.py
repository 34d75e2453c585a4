"""Keeps what requests without verification write out of the prefixes that others find in the cache.

Replaces `Request.from_engine_core_request` (0.26 to 0.33), which every request passes before its pages are hashed. The
keys and values of a token that was decoded by thresholds are not those of dense attention, so such requests share pages
with each other only. vLLM has salts for that; they come with a request, and whoever sends it need not know.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from copy import copy
from typing import Any

from vllm_toptheta.backend.hooks.patch import replace
from vllm_toptheta.backend.request_choices import ARGUMENT, is_lossy

_SALT = secrets.token_hex(16)  # no request can give it as its own


def install() -> None:
    """Salt them; called in every process."""
    from vllm.v1.request import Request

    replace(Request, "from_engine_core_request", _salting)


def _salting(make: Callable[..., Any]) -> Callable[..., Any]:
    def make_salted(request: Any, *args: Any, **kwargs: Any) -> Any:
        asked = (getattr(request.sampling_params, "extra_args", None) or {}).get(ARGUMENT)
        if is_lossy(asked):
            request = copy(request)
            request.cache_salt = f"{_SALT} {request.cache_salt or ''}"
        return make(request, *args, **kwargs)

    return make_salted
