"""The only way in which a function of vLLM's is replaced."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import vllm

from vllm_toptheta.errors import UnsupportedError

MARK = "__toptheta__"


def replace(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a method of a class of vLLM's, once per process; a second call does nothing.

    The replacement bears `MARK`, and the original as `__wrapped__`.

    Args:
        owner: The class.
        name: Of the method, of instances or of the class.
        make: Makes the replacement of the original, which is bound if it is one of the class.

    Raises:
        UnsupportedError: There is no such method in the installed vLLM.
    """
    original = getattr(owner, name, None)
    if original is None:
        raise UnsupportedError(
            f"attention backend toptheta replaces {owner.__name__}.{name}, which vLLM {vllm.__version__} does not have",
            remedy="Install a supported version",
        )
    if hasattr(original, MARK):
        return
    replacement = functools.wraps(original)(make(original))
    setattr(replacement, MARK, True)
    setattr(owner, name, staticmethod(replacement) if inspect.ismethod(original) else replacement)
